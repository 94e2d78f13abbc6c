"""Gemma 4 with multi-token prediction on MLX: the same text as plain decoding, several tokens a round.

Importing this package imports neither mlx nor mlx-lm: each public name is fetched when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mlx_mtp.api import generate, generate_batch, stream_generate
    from mlx_mtp.errors import (
        CheckpointError,
        GenerationError,
        MemoryRefusal,
        MtpError,
        PairError,
        ParameterError,
        PromptError,
    )
    from mlx_mtp.pair import load
    from mlx_mtp.sampling import Sampling

_HOME = {
    "load": "pair",
    "generate": "api",
    "stream_generate": "api",
    "generate_batch": "api",
    "Sampling": "sampling",
    "MtpError": "errors",
    "CheckpointError": "errors",
    "PairError": "errors",
    "PromptError": "errors",
    "ParameterError": "errors",
    "MemoryRefusal": "errors",
    "GenerationError": "errors",
}

__all__ = [
    "load",
    "generate",
    "stream_generate",
    "generate_batch",
    "Sampling",
    "MtpError",
    "CheckpointError",
    "PairError",
    "PromptError",
    "ParameterError",
    "MemoryRefusal",
    "GenerationError",
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
