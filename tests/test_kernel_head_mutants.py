"""Faults planted in the head's Metal source: each must be seen by the kind of check that is made for it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest

from head_cases import GEMMA, GREEDY, NARROW, choice_of, head_with, rows_of
from mlx_mtp.kernels import head_choose
from mlx_mtp.kernels.launch import Kernel
from mlx_mtp.kernels.verify_gemm import verify_gemm
from mlx_mtp.sampling import Sampling, choose
from msl import Fault
from msl.stand_in import Runner
from planted import made_anew, planted_in, spoilt
from qmm_cases import quantised


def same_tokens(vocab_size: int, cap: float | None, batch: list[Sampling]) -> None:
    """Against `sampling.choose` on all logits, which have the same bits; positions and members differ."""
    weight = quantised(vocab_size, 64, seed=1)
    x = rows_of(len(batch), 8, 64, seed=2, dtype=mx.bfloat16)
    choice = choice_of(batch, 8, seed=3, vocab_size=vocab_size)
    tokens, _ = head_choose.head_choose(weight, cap, x, *choice)
    assert tokens.tolist() == head_choose.reference(weight, cap, x, *choice)[0].tolist()


def drawn(metal: Runner) -> None:
    same_tokens(1300, 2.5, [NARROW, GREEDY, GEMMA])
    same_tokens(1300, 2.5, [replace(GEMMA, temperature=0.2), replace(GEMMA, temperature=3.0, top_p=1.0)])


def greedy(metal: Runner) -> None:
    same_tokens(1301, None, [GREEDY])
    for best in ([29, 31, 90], [47]):
        weight, x = head_with(np.where(np.isin(np.arange(100), best), 1.0, 0.0).astype(np.float32))
        choice = choice_of([GREEDY], 1, seed=11, vocab_size=100)
        assert head_choose.head_choose(weight, None, x, *choice)[0].item() == best[0]


def few(metal: Runner) -> None:
    """Fewer groups than candidates."""
    same_tokens(100, None, [replace(GEMMA, temperature=3.0, top_p=1.0)] * 3)
    check(np.where(np.arange(72) % 8 == 3, 1.0, -1.0).astype(np.float32))


def scattered(metal: Runner) -> None:
    """The best 64 all over 1,500 groups, several of them in one."""
    logits = np.random.default_rng(4).normal(0, 1e-3, 12_000).astype(np.float32)
    best = np.concatenate([np.arange(20) * 600, np.arange(44) + 8000])
    logits[best] = 25 + 0.01 * np.random.default_rng(5).permutation(64)
    check(logits)


def ties(metal: Runner) -> None:
    logits = np.full(1536, -1.0, np.float32)
    logits[20:820] = 1.0  # the 64th best group's second logit is level with its best
    tokens = check(logits)
    assert tokens <= set(range(20, 84)) and max(tokens) > 75


def check(logits: np.ndarray) -> set[int]:
    """The tokens of 100 positions, as `sampling.choose` has them."""
    weight, row = head_with(logits)
    x = mx.broadcast_to(row, (1, 100, 32))
    choice = choice_of([Sampling(3.0, top_k=64)], 100, seed=6, vocab_size=len(logits))
    tokens, _ = head_choose.head_choose(weight, None, x, *choice)
    assert tokens.tolist() == choose(verify_gemm(weight, x), *choice)[0].tolist()
    return set(tokens[0].tolist())


def reads(metal: Runner) -> None:
    """One in each group: no group is looked into."""
    logits = np.zeros(8192, np.float32)
    logits[np.arange(64) * 9] = 10 + np.arange(64)
    weight, x = head_with(logits)
    metal.reset()
    with metal.run(count=True):
        head_choose.head_choose(weight, None, x, *choice_of([GEMMA], 1, seed=7, vocab_size=8192))
    assert metal.counts["choose_gemm"].read["table"].distinct == 0


def memory(metal: Runner) -> None:
    """Nothing out of bounds, nothing raced for, nothing read before it was written; nothing compared."""
    weight = quantised(8010, 64, seed=8)
    x = rows_of(2, 5, 64, seed=9, dtype=mx.bfloat16)
    choice = choice_of([GEMMA, GREEDY], 5, seed=10, vocab_size=8010)
    with metal.run(check=True):
        head_choose.head_choose(weight, 30.0, x, *choice)


CHECKS = {one.__name__: one for one in (drawn, greedy, few, scattered, ties, reads, memory)}


@dataclass(frozen=True, slots=True)
class Mutant:
    """In `place`, a .metal file or one of head_choose.py's kernels, `sound` becomes `faulty`; `check` sees it."""

    place: str
    sound: str
    faulty: str
    check: str
    unseen: tuple[str, ...] = ()  # checks that it passes: why there is more than one


CHOOSE, HEAD = "choose.metal", "head_choose.metal"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
MUTANTS = {
    "last token of a group left out": Mutant(
        HEAD, "for (int i = 0; i < NEIGHBOURS; i++)", "for (int i = 0; i < NEIGHBOURS - 1; i++)", "greedy"
    ),
    "tie to the higher id": Mutant(
        HEAD, "best = better_of(best, item);", "best = item >> 32 >= best >> 32 ? item : best;", "greedy"
    ),
    "the last one that is not the best for the second": Mutant(
        HEAD, "second = max(second, uint(", "second = (uint(", "scattered", unseen=("greedy",)
    ),
    "groups are never looked into": Mutant(
        HEAD, "seconds[group] >= least", "false", "scattered", unseen=("greedy", "reads")
    ),
    "groups are always looked into": Mutant(
        HEAD, "seconds[group] >= least", "true", "reads", unseen=("drawn", "scattered")
    ),
    "a second level with the edge is left out": Mutant(
        HEAD,
        "seconds[group] >= least",
        "seconds[group] > least",
        "ties",
        unseen=("drawn",),
    ),
    "fewer groups than candidates are not looked into": Mutant(
        HEAD, "groups < BEST ? 0 : simd_min", "simd_min", "few", unseen=("drawn", "scattered")
    ),
    "only a thread's first group": Mutant(
        HEAD, "at < count ? items[at]", "at < MERGE_THREADS ? items[at]", "scattered", unseen=("drawn",)
    ),
    "not capped when looked into": Mutant(
        HEAD,
        "ranked_logit<T, CAPPED>(sums[0], cap, temperature)), token)",
        "ranked_logit<T, false>(sums[0], cap, temperature)), token)",
        "drawn",
        unseen=("scattered",),
    ),
    "temperature of the first member": Mutant(
        "_group_kernel", "temperature[row / sizes[3]]", "temperature[0]", "drawn", unseen=("scattered",)
    ),
    "noise of the first position": Mutant("_draw_kernel", "positions[row]", "positions[0]", "drawn"),
    "looks into groups of the first row": Mutant("_draw_kernel", "x + size_t(row) * depth", "x", "drawn"),
    "no barrier before a group is ranked": Mutant(
        HEAD, f"  {BARRIER}\n  const int row = simd * 32", "  const int row = simd * 32", "memory"
    ),
    "no barrier before heads are ranked": Mutant(
        HEAD, f"  {BARRIER}\n  int before = 0;", "  int before = 0;", "memory"
    ),
    "no barrier before tokens are ranked": Mutant(
        HEAD,
        f"  {BARRIER}\n  const ulong item = found[worker];",
        "  const ulong item = found[worker];",
        "memory",
    ),
    "one set of tallies": Mutant(HEAD, "tallies + turn % 2 * simdgroups", "tallies", "memory"),
}


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Mutant]:
    mutant: Mutant = MUTANTS[request.param]

    change = (mutant.sound, mutant.faulty)
    if mutant.place.endswith(".metal"):
        with planted_in(mutant.place, change):
            yield mutant
    else:
        sound = getattr(head_choose, mutant.place)

        def kernel(*stored: object) -> Kernel:
            made: Kernel = sound(*stored)
            return replace(made, body=spoilt(made.body, change))

        monkeypatch.setattr(head_choose, mutant.place, kernel)
        with made_anew():
            yield mutant


@pytest.mark.parametrize("planted", MUTANTS, indirect=True)
def test_fault_is_seen(metal: Runner, planted: Mutant) -> None:
    for name in planted.unseen:
        CHECKS[name](metal)
    with pytest.raises(Fault if planted.check == "memory" else AssertionError):
        CHECKS[planted.check](metal)


@pytest.mark.parametrize("name", CHECKS)
def test_sound_source_passes_every_check(metal: Runner, name: str) -> None:
    CHECKS[name](metal)
