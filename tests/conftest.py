"""For all tests: a temporary home for our own files, and `pytest --mlx-device cpu` for where MLX computes.

Commands in other processes inherit the home and keep their own choice of device.
"""

import importlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import pytest

pytest_plugins = ["msl.fixture", "pytester"]
DEVICES = {"cpu": mx.cpu, "gpu": mx.gpu}
HOME = pytest.StashKey[tempfile.TemporaryDirectory[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mlx-device", choices=("auto", *DEVICES), default="auto", help="where MLX computes")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As a shell leaves it to what it starts with &; commands in tests of Ctrl-C would inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    device = config.getoption("--mlx-device")
    if device != "auto":
        mx.set_default_device(mx.Device(DEVICES[device]))
    config.stash[HOME] = tempfile.TemporaryDirectory(prefix="mlx-mtp-tests-")
    settle_in(Path(config.stash[HOME].name))


def settle_in(home: Path) -> None:
    """Make `home` the place of records and kept copies, here and in processes started from here."""
    os.environ["XDG_DATA_HOME"] = str(home / "data")
    os.environ["XDG_CACHE_HOME"] = str(home / "cache")
    if sys.platform == "darwin":  # where platformdirs asks for the home folder alone
        os.environ["HOME"] = str(home)


@pytest.fixture(autouse=True)
def own_home(request: pytest.FixtureRequest) -> None:
    """No test sees which model another one used last."""
    settle_in(Path(tempfile.mkdtemp(dir=request.config.stash[HOME].name)))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Gives a module of bench/, whose modules find each other as they do when run as scripts."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "bench")
    return importlib.import_module


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[HOME].cleanup()
