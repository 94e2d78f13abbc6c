"""The fixture `metal`: for one test, kernels run as Metal source on the CPU."""

from collections.abc import Iterator

import mlx.core as mx
import pytest

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


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runner]:
    """Takes the place of `mx.fast.metal_kernel`; compiled functions run as they are written, for values exist then."""
    runner = Runner()
    monkeypatch.setattr(mx.fast, "metal_kernel", STAND_IN)
    mx.disable_compile()
    active.append(runner)
    yield runner
    active.pop()
    mx.enable_compile()
