"""The fixture `metal`: for one test, kernels run as Metal source on the CPU.

Where clang for x86-64 Linux cannot run, tests that need it are deselected, and pytest's header says so: on a Mac
the kernels' self-test does on the GPU what it can.
"""

from collections.abc import Iterator

import mlx.core as mx
import pytest

from .build import runs_here, runtime
from .stand_in import Runner, kernel_maker

active: list[Runner] = []


def active_runner() -> Runner:
    """Of the test that runs: a kernel may have been made, and kept, by a test before it."""
    if not active:
        raise RuntimeError(
            "a kernel made under the fixture `metal` was called by a test without that fixture"
        )
    return active[-1]


STAND_IN = kernel_maker(active_runner)  # one for all tests: kernels that the library keeps stay valid


def pytest_report_header() -> str:
    return "Metal source: " + (
        "on this CPU" if runs_here() else "not on this machine, its tests are left out"
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if runs_here():
        return
    left_out = [
        item for item in items if isinstance(item, pytest.Function) and "compiler" in item.fixturenames
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def compiler() -> None:
    """For tests that run Metal source without the fixture `metal`."""
    runtime()


@pytest.fixture
def metal(compiler: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runner]:
    """Takes the place of `mx.fast.metal_kernel`; compiled functions run as they are written, for values exist then."""
    runner = Runner()
    monkeypatch.setattr(mx.fast, "metal_kernel", STAND_IN)
    mx.disable_compile()
    active.append(runner)
    yield runner
    active.pop()
    mx.enable_compile()
