"""Operations that a round launches on Metal, counted in its graph: stock MLX against our kernels, five published sizes.

    python bench/launches.py --json bench/results/launches.json

Nothing is evaluated and no weights exist. Each operation counts as one launch, although MLX makes two of some (a
two-pass attention, a multi-block sort); the record says what was counted. What mx.compile fuses is fused here as well.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from metal_graph import COPY, as_on_metal, graph_of, launches, leaf
from report import record, save
from synthetic import configs_of, weightless_tensors

from mlx_mtp.config import DrafterConfig, TargetConfig
from mlx_mtp.drafter import Drafter, make_drafter
from mlx_mtp.kernels.chooser import Verdict, choose_kernels, equip
from mlx_mtp.kernels.operations import operations_of
from mlx_mtp.published_configs import SIZES
from mlx_mtp.round import Rounds
from mlx_mtp.sampling import Sampling, sampler_class, sampling_arrays
from mlx_mtp.state import State, kv_shapes
from mlx_mtp.target import Target, make_target

CONTEXT = 1024  # rows of a full layer that attention walks
DTYPE = mx.bfloat16
SAMPLINGS = {"greedy": Sampling(temperature=0.0), "1.0 / 64 / 0.95": Sampling(1.0, top_k=64, top_p=0.95)}
DRAFTS = (0, 3)


def pair_without_weights(size: str) -> tuple[Target, Drafter]:
    """The published 4-bit target and its 4-bit drafter, of no size in memory."""
    return pair_of_configs(*configs_of(size))


def pair_of_configs(target_config: TargetConfig, drafter_config: DrafterConfig) -> tuple[Target, Drafter]:
    target = make_target(target_config, weightless_tensors(target_config, DTYPE))
    return target, make_drafter(drafter_config, weightless_tensors(drafter_config, DTYPE))


def with_kernels(target: Target, drafter: Drafter) -> tuple[Target, Drafter]:
    """The pair as it would run where every kernel of ours passed its self-test and won its race."""
    verdicts = {operation: Verdict(True, "counted") for operation in operations_of(target, drafter)}
    choice = choose_kernels(target, drafter, has_metal=True, verdicts=verdicts)
    stock = [row for row in choice.rows if row.by == "stock"]
    if stock:
        raise AssertionError(f"every operation has a kernel, got stock for {stock}")
    equipped, small = equip(target, drafter, choice)
    assert small is not None
    return equipped, small


def state_of(target: Target, sampling: Sampling, *, pending: int, batch: int = 1) -> State:
    """A state of no size with `pending` drafts."""
    arrays = sampling_arrays(sampling, target.text.vocab_size)
    return State(
        kv=tuple((leaf(s, DTYPE), leaf(s, DTYPE)) for s in kv_shapes(target.text, batch, 2 * CONTEXT)),
        length=leaf((batch,), mx.int32),
        last=leaf((batch,), mx.uint32),
        hidden=leaf((batch, 1, target.text.hidden_size), DTYPE),
        drafts=leaf((batch, pending), mx.uint32),
        seed=leaf((batch,), mx.uint32),
        sampling={name: leaf((batch,), array.dtype) for name, array in arrays.items()},
        counts=None,
        active=leaf((batch,), mx.bool_),
    )


def count_round(
    target: Target, drafter: Drafter, sampling: Sampling, *, pending: int, drafts: int, batch: int = 1
) -> Counter[str]:
    """Launches by name of a compiled round that verifies `pending` drafts and makes `drafts` more."""
    state = state_of(target, sampling, pending=pending, batch=batch)
    with as_on_metal() as kernels:
        rounds = Rounds(target, drafter)
        after, tokens, n = rounds(state, k=drafts, bucket=CONTEXT, sampler=sampler_class([sampling]))
        return launches(graph_of(_arrays(after, tokens, n)), kernels)


def _arrays(after: State, tokens: mx.array, n: mx.array) -> Sequence[mx.array]:
    """What a round gives, without what it only hands through."""
    kv = [buffer for both in after.kv for buffer in both]
    return [*kv, after.length, after.last, after.hidden, after.drafts, tokens, n]


def parts_of_round(
    target: Target, drafter: Drafter, sampling: Sampling, drafts: int
) -> dict[str, Counter[str]]:
    """Launches of the verify part (with accept and commit) and of the drafts, which are what a round has beyond it."""
    verify = count_round(target, drafter, sampling, pending=drafts, drafts=0)
    whole = count_round(target, drafter, sampling, pending=drafts, drafts=drafts)
    draft = whole - verify
    draft[COPY] = 0  # one row: nothing moves
    if drafts == 0:
        verify[COPY] = 0
    return {"verify": +verify, "draft": +draft}


def table() -> dict[str, Any]:
    """size -> "stock" or "ours" -> sampling -> drafts -> launches of both parts and their sum, and the names."""
    found: dict[str, Any] = {}
    for size in SIZES:
        pair = pair_without_weights(size)
        for which, (target, drafter) in {"stock": pair, "ours": with_kernels(*pair)}.items():
            for how, sampling in SAMPLINGS.items():
                for drafts in DRAFTS:
                    parts = parts_of_round(target, drafter, sampling, drafts)
                    sums = {part: sum(names.values()) for part, names in parts.items()}
                    found.setdefault(size, {}).setdefault(which, {}).setdefault(how, {})[f"k={drafts}"] = {
                        **sums,
                        "round": sum(sums.values()),
                        "by name": dict((parts["verify"] + parts["draft"]).most_common()),
                    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the record here")
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    found = table()
    for size, sets in found.items():
        for which, hows in sets.items():
            for how, ks in hows.items():
                print(
                    f"{size:8} {which:6} {how:16}",
                    {k: {p: v[p] for p in v if p != "by name"} for k, v in ks.items()},
                )
    save(
        record("launches a round, counted in its graph", {"context": CONTEXT, "dtype": "bfloat16"}, found),
        args.json,
    )


if __name__ == "__main__":
    main()
