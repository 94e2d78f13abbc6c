"""`pytest --mlx-device cpu`: which device MLX computes on; its own choice if left out. Commands in other processes keep
theirs."""

import mlx.core as mx
import pytest

DEVICES = {"cpu": mx.cpu, "gpu": mx.gpu}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mlx-device", choices=("auto", *DEVICES), default="auto", help="where MLX computes")


def pytest_configure(config: pytest.Config) -> None:
    device = config.getoption("--mlx-device")
    if device != "auto":
        mx.set_default_device(mx.Device(DEVICES[device]))
