"""Gemma 4 with multi-token prediction on MLX: the same text as plain decoding, several tokens a round.

Importing this package imports neither mlx nor mlx-lm: each public name is fetched when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mlx_mtp.api import generate, generate_batch, stream_generate
    from mlx_mtp.engine import Engine
    from mlx_mtp.errors import (
        BusyError,
        CheckpointError,
        ContextError,
        EngineError,
        GenerationError,
        HubError,
        KernelError,
        MachineError,
        MemoryRefusal,
        MtpError,
        PairError,
        ParameterError,
        PromptError,
        StorageError,
    )
    from mlx_mtp.handles import Handle
    from mlx_mtp.memory import MemoryEstimate, estimate_memory
    from mlx_mtp.pair import Pair, load
    from mlx_mtp.progress import Progress
    from mlx_mtp.sampling import Sampling
    from mlx_mtp.self_check import SelfCheck, selfcheck

_HOME = {
    "load": "pair",
    "generate": "api",
    "stream_generate": "api",
    "generate_batch": "api",
    "Engine": "engine",
    "Handle": "handles",
    "Sampling": "sampling",
    "estimate_memory": "memory",
    "MemoryEstimate": "memory",
    "Pair": "pair",
    "Progress": "progress",
    "selfcheck": "self_check",
    "SelfCheck": "self_check",
    "MtpError": "errors",
    "CheckpointError": "errors",
    "PairError": "errors",
    "PromptError": "errors",
    "ContextError": "errors",
    "ParameterError": "errors",
    "MemoryRefusal": "errors",
    "HubError": "errors",
    "StorageError": "errors",
    "MachineError": "errors",
    "KernelError": "errors",
    "GenerationError": "errors",
    "EngineError": "errors",
    "BusyError": "errors",
}

__all__ = [
    "load",
    "generate",
    "stream_generate",
    "generate_batch",
    "Engine",
    "Handle",
    "Sampling",
    "estimate_memory",
    "MemoryEstimate",
    "Pair",
    "Progress",
    "selfcheck",
    "SelfCheck",
    "MtpError",
    "CheckpointError",
    "PairError",
    "PromptError",
    "ContextError",
    "ParameterError",
    "MemoryRefusal",
    "HubError",
    "StorageError",
    "MachineError",
    "KernelError",
    "GenerationError",
    "EngineError",
    "BusyError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = vars(import_module(f"{__name__}.{_HOME[name]}"))[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
