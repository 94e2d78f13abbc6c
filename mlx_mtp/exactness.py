"""Which promise holds on this machine, derived: every operation of a traced pass classified, then compared bitwise.

(a) MTP on equals MTP off bitwise, if and only if every operation computes each row from that row, its position, the
weights and the K/V below it, and never from the number of rows, the batch, the bucket, the capacity or the ring.
(b) Otherwise every token is still drawn from the target's own logits, on K/V whose rounding depends on the drafts.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import mlx.core as mx

from mlx_mtp.exactness_compare import OpVerdict, compare, verdicts_of
from mlx_mtp.exactness_graph import trace_passes
from mlx_mtp.exactness_metal import READ_IN, Backend
from mlx_mtp.exactness_probe import measure, rows_are_invariant
from mlx_mtp.exactness_rules import Here, Measured
from mlx_mtp.sampling import Sampling, sampler_class
from mlx_mtp.target import Target
from mlx_mtp.versions import find_versions, release_of

GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True, slots=True)
class Probed:
    """One bitwise comparison that was made on this machine."""

    what: str
    equal: bool


@dataclass(frozen=True, slots=True)
class Exactness:
    """Which promise holds, and every operation of a round with the reason; those that break (a) come first."""

    promise: Literal["a", "b"]
    holds: bool  # promise (a)
    backend: str
    rows: tuple[OpVerdict, ...]
    probed: tuple[Probed, ...]

    @property
    def breaking(self) -> tuple[OpVerdict, ...]:
        return tuple(row for row in self.rows if row.invariant is False)

    @property
    def unknown(self) -> tuple[OpVerdict, ...]:
        return tuple(row for row in self.rows if row.invariant is None)

    @property
    def refuting(self) -> tuple[Probed, ...]:
        """Comparisons that found other bits."""
        return tuple(probed for probed in self.probed if not probed.equal)

    def why_not(self) -> list[str]:
        """What stands against promise (a), a line each, the weightiest first; empty where it holds."""
        lines = [f"{row.op} ({row.count}): {row.reason}" for row in self.breaking]
        lines += [f"unknown: {row.op} ({row.count}): {row.reason}" for row in self.unknown]
        if lines:
            return lines
        return [f"no operation should do it, but {probed.what}: other bits" for probed in self.refuting]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def exactness_of(
    target: Target, samplings: Sequence[Sampling] = (), *, passed: Collection[str] = ()
) -> Exactness:
    """Derive the promise for this target on this machine, for greedy and `samplings`; some passes of up to 17 rows.

    passed: operations whose kernels of ours the machine's self-test found equal bit by bit.
    """
    measured = measure(target)
    here = Here(backend_here(), measured, frozenset(passed))
    whole = Probed("whole passes of 1 to 16 rows, two buckets, a batch of 2", rows_are_invariant(target))
    return derive(target, here, samplings, probed=(*_probed(measured), whole))


def derive(
    target: Target, here: Here, samplings: Sequence[Sampling] = (), *, probed: tuple[Probed, ...] = ()
) -> Exactness:
    """The same for any machine, from what is known of it; nothing is evaluated."""
    rows: dict[tuple[str, bool | None, str], OpVerdict] = {}
    for sampler in dict.fromkeys(sampler_class([one]) for one in (GREEDY, *samplings)):
        for row in verdicts_of(compare(trace_passes(target, sampler)), here):
            key = (row.op, row.invariant, row.reason)
            rows[key] = max(row, rows.get(key, row), key=lambda one: one.count)
    order = {False: 0, None: 1, True: 2}
    listed = tuple(sorted(rows.values(), key=lambda row: (order[row.invariant], -row.count, row.op)))
    holds = all(row.invariant is True for row in listed) and all(one.equal for one in probed)
    return Exactness("a" if holds else "b", holds, str(here.backend), listed, probed)


def backend_here() -> Backend:
    """Where MLX computes now; the generation from the architecture's name, such as applegpu_g13s."""
    version = release_of(find_versions(("mlx",))[0].version or "") or (0,)
    if mx.default_device().type == mx.cpu:
        return Backend("cpu", mlx=version)
    return backend_of(str(mx.device_info()["architecture"]), version)


def backend_of(architecture: str, version: tuple[int, ...] = READ_IN) -> Backend:
    """ "applegpu_g13s" -> Metal, generation 13, size "s"; both unknown where the name is another."""
    _, _, name = architecture.rpartition("_g")
    digits, size = name[:-1], name[-1:]
    if not architecture.startswith("applegpu") or not digits.isdecimal():
        return Backend("metal", mlx=version)
    return Backend("metal", int(digits), size, version)


def _probed(measured: Measured) -> tuple[Probed, ...]:
    found = [Probed(f"rows times a matrix, {k} x {n}", equal) for (k, n), equal in measured.products.items()]
    found += [Probed(f"attention of head size {dim}", equal) for dim, equal in measured.attention.items()]
    others = {
        "softmax with more masked keys": measured.masked,
        "routed experts": measured.mixture,
        "head and choice in one": measured.choice,
    }
    for what, equal in others.items():
        if equal is not None:
            found.append(Probed(what, equal))
    return tuple(found)
