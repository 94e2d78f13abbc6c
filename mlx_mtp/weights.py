"""One weight matrix, dense or quantised, behind the same three operations: project, look up, gather experts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mtp.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """`weight [..., N, K]` as stored; a leading axis counts experts."""

    weight: mx.array
    transposed: mx.array = field(init=False, repr=False)  # a view, kept so that no round makes it again

    def __post_init__(self) -> None:
        object.__setattr__(self, "transposed", self.weight.swapaxes(-1, -2))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def dtype(self) -> mx.Dtype:
        return self.weight.dtype

    @property
    def arrays(self) -> list[mx.array]:
        return [self.weight, self.transposed]

    def project(self, x: mx.array) -> mx.array:
        """x [..., K] -> [..., N]."""
        return x @ self.transposed

    def rows(self, ids: mx.array) -> mx.array:
        """ids [...] -> rows of the table [..., K]."""
        return self.weight[ids]

    def project_experts(self, x: mx.array, experts: mx.array) -> mx.array:
        """x [..., 1 or E, 1, K], experts [..., E] -> [..., E, 1, N]."""
        return mx.gather_mm(x, self.transposed, _own_rows(x, experts), experts)


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """An MLX-quantised matrix: packed `weight`, `scales`; `biases` if affine, `global_scale` for nvfp4 experts."""

    weight: mx.array
    scales: mx.array
    biases: mx.array | None
    group_size: int
    bits: int
    mode: str
    dtype: mx.Dtype  # of the rows this matrix gives out
    global_scale: mx.array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.weight.shape[:-1], self.weight.shape[-1] * 32 // self.bits)

    @property
    def arrays(self) -> list[mx.array]:
        parts = (self.weight, self.scales, self.biases, self.global_scale)
        return [part for part in parts if part is not None]

    @property
    def _format(self) -> dict[str, Any]:
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def project(self, x: mx.array) -> mx.array:
        """x [..., K] -> [..., N]."""
        return mx.quantized_matmul(x, self.weight, self.scales, self.biases, transpose=True, **self._format)

    def rows(self, ids: mx.array) -> mx.array:
        """ids [...] -> dequantised rows of the table [..., K]."""
        biases = None if self.biases is None else self.biases[ids]
        return mx.dequantize(self.weight[ids], self.scales[ids], biases, dtype=self.dtype, **self._format)

    def project_experts(self, x: mx.array, experts: mx.array) -> mx.array:
        """x [..., 1 or E, 1, K], experts [..., E] -> [..., E, 1, N]."""
        return mx.gather_qmm(
            x,
            self.weight,
            self.scales,
            self.biases,
            _own_rows(x, experts),
            experts,
            transpose=True,
            global_scale=self.global_scale,
            **self._format,
        )


Weight = DenseWeight | QuantizedWeight


def _own_rows(x: mx.array, experts: mx.array) -> mx.array:
    """x [..., 1 or E, 1, K], experts [..., E] -> [..., E]: which row of x goes to each expert.

    MLX would find the same, by three operations for every product.
    """
    count = math.prod(x.shape[:-2])
    rows = np.arange(count, dtype=np.uint32).reshape(x.shape[:-2])
    return mx.array(np.broadcast_to(rows, experts.shape))


def load_weights(tensors: Mapping[str, Weight | mx.array]) -> None:
    """Evaluate every array, one tensor at a time.

    What is still lazy when a round is traced would become part of the trace and be computed again in every round.
    Raises CheckpointError where a file ends earlier than its header said.
    """
    for name, tensor in tensors.items():
        try:
            mx.eval(tensor if isinstance(tensor, mx.array) else tensor.arrays)
        except RuntimeError as error:
            if not str(error).startswith("[read]"):
                raise
            raise CheckpointError(
                f"{name}: its file became shorter while it was read; wait until nothing writes to it and load the "
                "model again"
            ) from None
