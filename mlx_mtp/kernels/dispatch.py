"""Operations that take one of our kernels or stock MLX, by the shape and format of what they are called with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_mtp.attention import Sight, attend, attend_tiled
from mlx_mtp.kernels.operations import (
    ADD_NORM,
    ATTEND,
    ATTEND_TILED,
    EXPERTS,
    NORM_ROTATE,
    PROJECT,
    AttentionShape,
    HeadSize,
    Operation,
    Projected,
    Routed,
    RowSize,
    operation_of,
)
from mlx_mtp.kernels.table import AddNorm, Attend, AttendTiled, Mixture, NormRotate, Project
from mlx_mtp.layers import Experts, OnChoice, Rotation, add_norm, mixture, norm_rotate
from mlx_mtp.weights import DenseWeight, QuantizedWeight, Weight


@dataclass(frozen=True, slots=True)
class _Projects:
    """`project` by matrix; what is no plain weight (a measurement's stand-in) multiplies by itself."""

    ours: Mapping[Operation, Project]

    def __call__(self, weight: Weight, x: mx.array) -> mx.array:
        if isinstance(weight, DenseWeight | QuantizedWeight):
            kernel = self.ours.get(operation_of(PROJECT, Projected(weight, x.dtype)))
            if kernel is not None:
                return kernel(weight, x)
        return weight.project(x)


@dataclass(frozen=True, slots=True)
class _Mixtures:
    """`experts` by layer."""

    ours: Mapping[Operation, Mixture]

    def __call__(
        self,
        experts: Experts,
        x: mx.array,
        eps: float,
        project: Project,
        on_choice: OnChoice | None = None,
    ) -> mx.array:
        operation = operation_of(EXPERTS, Routed(experts, x.dtype))
        return self.ours.get(operation, mixture)(experts, x, eps, project, on_choice)


@dataclass(frozen=True, slots=True)
class _Attends:
    """`attend` by heads and window."""

    ours: Mapping[Operation, Attend]

    def __call__(self, queries: mx.array, keys: mx.array, values: mx.array, sight: Sight) -> mx.array:
        operation = operation_of(ATTEND, _shape(queries, keys, sight.window))
        return self.ours.get(operation, attend)(queries, keys, values, sight)


@dataclass(frozen=True, slots=True)
class _AttendsTiled:
    """`attend_tiled` by heads and window."""

    ours: Mapping[Operation, AttendTiled]

    def __call__(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        first_query: int,
        first_key: int,
        window: int | None,
    ) -> mx.array:
        operation = operation_of(ATTEND_TILED, _shape(queries, keys, window))
        kernel = self.ours.get(operation, attend_tiled)
        return kernel(queries, keys, values, first_query, first_key, window)


@dataclass(frozen=True, slots=True)
class _NormRotates:
    """`norm_rotate` by the size of a head."""

    ours: Mapping[Operation, NormRotate]

    def __call__(
        self,
        raw: mx.array,
        gain: mx.array,
        rotation: Rotation,
        eps: float,
        values: mx.array | None = None,
    ) -> tuple[mx.array, mx.array | None]:
        operation = operation_of(NORM_ROTATE, HeadSize(raw.shape[-1], raw.dtype))
        return self.ours.get(operation, norm_rotate)(raw, gain, rotation, eps, values)


@dataclass(frozen=True, slots=True)
class _AddNorms:
    """`add_norm` by the width of a row."""

    ours: Mapping[Operation, AddNorm]

    def __call__(
        self,
        x: mx.array,
        y: mx.array,
        gain: mx.array,
        eps: float,
        *,
        scalar: mx.array | None = None,
        then: mx.array | None = None,
    ) -> tuple[mx.array, mx.array | None]:
        operation = operation_of(ADD_NORM, RowSize(x.shape[-1], x.dtype))
        return self.ours.get(operation, add_norm)(x, y, gain, eps, scalar=scalar, then=then)


def _shape(queries: mx.array, keys: mx.array, window: int | None) -> AttentionShape:
    _, heads, _, dim = queries.shape
    return AttentionShape(heads, keys.shape[1], dim, window, queries.dtype)


DISPATCH: dict[str, Callable[[Any], Any]] = {
    PROJECT: _Projects,
    EXPERTS: _Mixtures,
    ATTEND: _Attends,
    ATTEND_TILED: _AttendsTiled,
    NORM_ROTATE: _NormRotates,
    ADD_NORM: _AddNorms,
}
