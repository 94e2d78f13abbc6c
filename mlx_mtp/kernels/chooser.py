"""Which operations of a pair our kernels compute on this machine, and why the others stay with stock MLX.

The choice is by operation and shape and holds for every number of rows: a row's bits must not depend on its company.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

from mlx_mtp.drafter import Drafter
from mlx_mtp.kernels.dispatch import DISPATCH
from mlx_mtp.kernels.families import FAMILIES, Family, key_of
from mlx_mtp.kernels.operations import (
    ATTEND_TILED,
    HEAD_CHOOSE,
    AttentionShape,
    Operation,
    Projected,
    Subject,
    head_of,
    operation_of,
    operations_of,
)
from mlx_mtp.kernels.table import Kernels
from mlx_mtp.target import Target

NO_METAL = "no Metal on this machine"
NO_KERNEL = "no kernel of ours computes this"
UNTESTED = "not tested yet on this chip"


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
    """Kernels of the target's passes over a round's rows, of its prefill, of the drafter, and the table."""

    kernels: Kernels
    prefill_kernels: Kernels
    drafter_kernels: Kernels
    rows: tuple[Row, ...]


def choose_kernels(
    target: Target, drafter: Drafter | None, *, has_metal: bool, verdicts: Mapping[Operation, Verdict]
) -> Choice:
    """Ours where the kernel supports an operation, passed and won on this chip; elsewhere stock, and the reason."""
    rows: list[Row] = []
    ours: dict[Operation, Callable[..., Any]] = {}
    for operation, subject in operations_of(target, drafter).items():
        family, verdict = FAMILIES.get(key_of(operation.name, subject)), verdicts.get(operation)
        stays = _why_stock(family, subject, has_metal, verdict)
        if family is None or verdict is None or stays is not None:
            rows.append(Row(operation, "stock", stays or NO_KERNEL))
            continue
        rows.append(Row(operation, "ours", verdict.reason))
        ours[operation] = partial(family.kernel, **verdict.how)
    by_name = {name: make(own) for name, make in DISPATCH.items() if (own := _named(ours, name))}
    # A chunk has more rows than our products are made for: there only attention is ours.
    prefill = {name: by_name.pop(name) for name in (ATTEND_TILED,) if name in by_name}
    shared = Kernels(**by_name)
    own_head = operation_of(HEAD_CHOOSE, Projected(target.embedding, target.dtype))
    return Choice(
        kernels=replace(shared, head_choose=ours.get(own_head)),
        prefill_kernels=Kernels(**prefill),
        drafter_kernels=shared if drafter is None else _with_head(shared, ours, drafter, target),
        rows=tuple(rows),
    )


def _with_head(
    shared: Kernels, ours: Mapping[Operation, Callable[..., Any]], drafter: Drafter, target: Target
) -> Kernels:
    """The drafter's kernels: its head is the table of all tokens, or clusters of them."""
    name, head = head_of(drafter, target.dtype)
    own: dict[str, Any] = {name: ours.get(operation_of(name, head))}
    return replace(shared, **own)


def equip(target: Target, drafter: Drafter | None, choice: Choice) -> tuple[Target, Drafter | None]:
    """Both with the chosen kernels; compiled rounds hold what they were made with."""
    equipped = replace(target, kernels=choice.kernels, prefill_kernels=choice.prefill_kernels)
    return equipped, None if drafter is None else replace(drafter, kernels=choice.drafter_kernels)


def _why_stock(
    family: Family | None, subject: Subject, has_metal: bool, verdict: Verdict | None
) -> str | None:
    """The first reason for stock operations, None if there is none."""
    if family is None:
        return NO_KERNEL
    unsupported = family.unsupported(*((subject,) if isinstance(subject, AttentionShape) else subject))
    if unsupported is not None:
        return unsupported
    if not has_metal:
        return NO_METAL
    if verdict is None:
        return UNTESTED
    return None if verdict.use else verdict.reason


def _named(ours: Mapping[Operation, Callable[..., Any]], name: str) -> dict[Operation, Callable[..., Any]]:
    return {operation: kernel for operation, kernel in ours.items() if operation.name == name}
