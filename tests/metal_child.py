"""The test process on a machine without Metal: kernels run as Metal source on the CPU, one of them broken if asked.

python metal_child.py [fault]
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_mtp.kernels import self_test_process
from mlx_mtp.kernels.families import FAMILIES, Family
from mlx_mtp.kernels.operations import PROJECT
from mlx_mtp.weights import QuantizedWeight
from msl.stand_in import Runner, kernel_maker

Fault = Callable[[mx.array, mx.array], mx.array]  # rows and the right result -> what the kernel gives


def wrong_value(x: mx.array, y: mx.array) -> mx.array:
    """The last column's sign."""
    return mx.concatenate([y[..., :-1], -y[..., -1:]], axis=-1)


def other_bits_by_rows(x: mx.array, y: mx.array) -> mx.array:
    """The least bit of a value, and only among 4 rows or more."""
    rows = x.size // x.shape[-1]
    return (
        y
        if rows < 4
        else mx.concatenate([y[..., :1].view(mx.uint16) ^ 1, y[..., 1:].view(mx.uint16)], -1).view(y.dtype)
    )


def raises(x: mx.array, y: mx.array) -> mx.array:
    raise RuntimeError("[metal::Device] no such function")


def sleeps(x: mx.array, y: mx.array) -> mx.array:
    time.sleep(600)
    return y


def spins(x: mx.array, y: mx.array) -> mx.array:
    while True:
        y = y + 0


def is_killed(x: mx.array, y: mx.array) -> mx.array:
    os.kill(os.getpid(), signal.SIGSEGV)
    return y


def prints(x: mx.array, y: mx.array) -> mx.array:
    """Whatever a library writes to stdout is no answer."""
    os.write(1, b'{"done": true}\n')
    return y


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (wrong_value, other_bits_by_rows, raises, sleeps, spins, is_killed, prints)
}


def broken(family: Family, fault: Fault) -> Family:
    def kernel(weight: Any, x: mx.array, **how: Any) -> mx.array:
        return fault(x, family.kernel(weight, x, **how))

    return family._replace(kernel=kernel)


def main() -> None:
    runner = Runner()
    mx.fast.metal_kernel = kernel_maker(lambda: runner)
    mx.disable_compile()
    if len(sys.argv) > 1:
        key = (PROJECT, QuantizedWeight)
        FAMILIES[key] = broken(FAMILIES[key], FAULTS[sys.argv[1]])
    self_test_process.main()


if __name__ == "__main__":
    main()
