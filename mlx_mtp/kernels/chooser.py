"""Which operations of a pair our kernels compute on this machine, and why the others stay with stock MLX.

The choice is by operation and shape and holds for every number of rows: a row's bits must not depend on its company.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import mlx.core as mx

from mlx_mtp.attention import Sight, attend, attend_tiled
from mlx_mtp.drafter import Drafter
from mlx_mtp.kernels import verify_attention, verify_experts, verify_gemm, verify_qmm
from mlx_mtp.kernels.operations import (
    ATTEND,
    ATTEND_TILED,
    EXPERTS,
    PROJECT,
    AttentionShape,
    Operation,
    Projected,
    Routed,
    Subject,
    operation_of,
    operations_of,
)
from mlx_mtp.kernels.table import Attend, AttendTiled, Kernels, Mixture, Project
from mlx_mtp.layers import Experts, mixture
from mlx_mtp.target import Target
from mlx_mtp.weights import DenseWeight, QuantizedWeight, Weight

NO_METAL = "no Metal on this machine"
NO_KERNEL = "no kernel of ours computes this"
UNTESTED = "not tested yet on this chip"


class Family(NamedTuple):
    """A kernel, the same in plain MLX, and who says of an example why the kernel does not compute it (None: it does)."""

    kernel: Callable[..., Any]
    reference: Callable[..., Any]
    unsupported: Callable[..., str | None]  # takes what a Subject holds


FAMILIES: dict[tuple[str, type], Family] = {  # by operation and the kind of its weights
    (PROJECT, QuantizedWeight): Family(verify_qmm.verify_qmm, verify_qmm.reference, verify_qmm.unsupported),
    (PROJECT, DenseWeight): Family(verify_gemm.verify_gemm, verify_gemm.reference, verify_gemm.unsupported),
    (EXPERTS, Routed): Family(
        verify_experts.verify_experts, verify_experts.reference, verify_experts.unsupported
    ),
    (ATTEND, AttentionShape): Family(
        verify_attention.verify_attention, verify_attention.reference, verify_attention.unsupported
    ),
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the self-test and the race said about one operation on this chip."""

    use: bool
    reason: str  # "equal, and 1.9x as fast at 4 rows", "slower at 1 row"
    how: Mapping[str, Any] = field(default_factory=dict)  # arguments for the kernel, such as its body


class Row(NamedTuple):
    """One line of the table that `doctor` shows."""

    operation: Operation
    by: Literal["ours", "stock"]
    reason: str


@dataclass(frozen=True, slots=True)
class Choice:
    """Kernels of the target's and the drafter's passes, those of prefill, and the table."""

    kernels: Kernels
    prefill_kernels: Kernels
    rows: tuple[Row, ...]


def choose_kernels(
    target: Target, drafter: Drafter | None, *, has_metal: bool, verdicts: Mapping[Operation, Verdict]
) -> Choice:
    """Ours where the kernel supports an operation, passed and won on this chip; elsewhere stock, and the reason."""
    rows: list[Row] = []
    ours: dict[str, dict[Operation, Callable[..., Any]]] = {}
    for operation, subject in operations_of(target, drafter).items():
        family, verdict = family_of(operation.name, subject), verdicts.get(operation)
        stays = _why_stock(family, subject, has_metal, verdict)
        if family is None or verdict is None or stays is not None:
            rows.append(Row(operation, "stock", stays or NO_KERNEL))
            continue
        rows.append(Row(operation, "ours", verdict.reason))
        ours.setdefault(operation.name, {})[operation] = partial(family.kernel, **verdict.how)
    by_name: dict[str, Any] = {name: DISPATCH[name](own) for name, own in ours.items()}
    # A chunk has more rows than our products are made for: there only attention is ours.
    tiled = {name: by_name.pop(name) for name in (ATTEND_TILED,) if name in by_name}
    return Choice(Kernels(**by_name), Kernels(**tiled), tuple(rows))


def equip(target: Target, drafter: Drafter | None, choice: Choice) -> tuple[Target, Drafter | None]:
    """Both with the chosen kernels; compiled rounds hold what they were made with."""
    equipped = replace(target, kernels=choice.kernels, prefill_kernels=choice.prefill_kernels)
    return equipped, None if drafter is None else replace(drafter, kernels=choice.kernels)


def family_of(name: str, subject: Subject) -> Family | None:
    """The kernels that might compute an operation, None where there are none."""
    form = type(subject.weight) if isinstance(subject, Projected) else type(subject)
    return FAMILIES.get((name, form))


def _why_stock(
    family: Family | None, subject: Subject, has_metal: bool, verdict: Verdict | None
) -> str | None:
    """The first reason for stock operations, None if there is none."""
    if family is None:
        return NO_KERNEL
    unsupported = family.unsupported(*(subject if not isinstance(subject, AttentionShape) else (subject,)))
    if unsupported is not None:
        return unsupported
    if not has_metal:
        return NO_METAL
    if verdict is None:
        return UNTESTED
    return None if verdict.use else verdict.reason


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

    def __call__(self, experts: Experts, x: mx.array, eps: float, project: Project) -> mx.array:
        operation = operation_of(EXPERTS, Routed(experts, x.dtype))
        return self.ours.get(operation, mixture)(experts, x, eps, project)


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


def _shape(queries: mx.array, keys: mx.array, window: int | None) -> AttentionShape:
    _, heads, _, dim = queries.shape
    return AttentionShape(heads, keys.shape[1], dim, window, queries.dtype)


DISPATCH: dict[str, Callable[[Any], Any]] = {
    PROJECT: _Projects,
    EXPERTS: _Mixtures,
    ATTEND: _Attends,
    ATTEND_TILED: _AttendsTiled,
}
