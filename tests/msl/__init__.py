"""Runs Metal source on a CPU in the place of `mx.fast.metal_kernel`: README.md."""

from .build import CompileError
from .counters import Counts, Traffic
from .launch import Fault, Launch, Settings
from .stand_in import Runner, StandIn, kernel_maker

_own = Runner()
metal_kernel = kernel_maker(lambda: _own)

__all__ = [
    "metal_kernel",
    "Runner",
    "Settings",
    "Launch",
    "Counts",
    "Traffic",
    "Fault",
    "CompileError",
    "StandIn",
    "kernel_maker",
]
