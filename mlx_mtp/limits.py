"""MLX's process-wide memory limits, for whoever owns the process: commands and the engine, never the library.

The reserve is `admission.budget_bytes`'s. Without Metal nothing is set: MLX's CPU backend wires nothing and keeps only
32 MiB of freed buffers.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from mlx_mtp.admission import budget_bytes
from mlx_mtp.machine import Machine

# Kernel panics in IOGPUMemory.cpp are reported where most of the memory is wired while buffers come and go (mlx issue
# 3186: none in 4 hours when nothing was wired). What Metal recommends is the most that it accepts; we stay below.
WIRED_SHARE = 0.9
CACHE_SHARE, CACHE_AT_MOST = (
    1 / 16,
    2 * 2**30,
)  # freed buffers that MLX keeps; a prefill chunk's scratch fits in


def wired_bytes(machine: Machine) -> int:
    """How much may be wired: what models may take, and never all that Metal would accept; 0 without Metal."""
    if machine.gpu_budget_bytes is None:
        return 0
    return min(budget_bytes(machine), int(machine.gpu_budget_bytes * WIRED_SHARE))


def cache_bytes(machine: Machine) -> int:
    """How much of what it has freed MLX may keep for the next allocation."""
    return min(int(machine.memory_bytes * CACHE_SHARE), CACHE_AT_MOST)


@contextmanager
def memory_limits(machine: Machine) -> Iterator[None]:
    """Set MLX's wired, memory and cache limits with a reserve, and put the previous ones back, also on an error."""
    if not machine.has_metal:
        yield
        return
    import mlx.core as mx

    with ExitStack() as previous:
        for set_limit, limit in (
            (mx.set_memory_limit, budget_bytes(machine)),
            (mx.set_cache_limit, cache_bytes(machine)),
            (mx.set_wired_limit, wired_bytes(machine)),
        ):
            previous.callback(set_limit, set_limit(limit))
        yield
