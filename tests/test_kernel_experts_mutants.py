"""Faults planted in the MoE block's Metal source: each must be seen by the kind of check that is made for it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest

from expert_cases import (
    check_choice,
    check_combined,
    check_pairs,
    check_scores,
    check_sorted,
    make_experts,
    mix,
    routing_of,
    routings,
    rows_alone,
    rows_for,
)
from msl import Fault
from msl.stand_in import Runner
from planted import planted_in
from qmm_cases import random_rows, same_bits
from test_kernel_experts import assert_read_once, pairs_of

LAYER = make_experts(8, 2, 64, 64, seed=1)
SHARED = np.tile(np.array([[5, 2]]), (14, 1))  # runs of more than a tile


def scores(metal: Runner) -> None:
    check_scores(LAYER, rows_for(LAYER, 3))


def choice(metal: Runner) -> None:
    """Ties, among them zeros of both signs, and NaN."""
    given = np.array(mx.random.randint(-3, 3, (9, 64), key=mx.random.key(2)).astype(mx.float32))
    given[0] = np.where(np.arange(64) % 3, 0.0, -0.0)
    given[1, 7] = -np.nan  # its bits are below all others
    check_choice(mx.array(given), 1 + random_rows(1, 64, seed=3)[0] / 8, 4)


def sort(metal: Runner) -> None:
    for ids in routings(9, 64, 4).values():
        check_sorted(routing_of(ids, 64, mx.float32), ids)


def pairs(metal: Runner) -> None:
    for ids in (routings(5, 8, 2)["any"], SHARED):
        check_pairs(LAYER, rows_for(LAYER, len(ids)), ids)


def combined(metal: Runner) -> None:
    check_combined(LAYER, 2, mx.float32)


def company(metal: Runner) -> None:
    """Rows alone and together, everyone at the same experts."""
    x = rows_for(LAYER, 14)
    for rows in (4, 14):
        alone = mx.concatenate([pairs_of(LAYER, x[row : row + 1], SHARED[:1]) for row in range(rows)])
        assert same_bits(pairs_of(LAYER, x[:rows], SHARED[:rows]), alone)
    assert same_bits(mix(LAYER, x[:3]), rows_alone(lambda row: mix(LAYER, row), x[:3]))


def bytes_read(metal: Runner) -> None:
    metal.settings(count=True)
    for rows in (3, 14):
        metal.reset()
        pairs_of(LAYER, rows_for(LAYER, rows), SHARED[:rows])
        assert_read_once(metal, "gate_up", "gate", LAYER.gate, 2)
        assert_read_once(metal, "down", "down", LAYER.down, 2)


def memory(metal: Runner) -> None:
    """Nothing out of bounds, nothing raced for, nothing read that was not written; nothing compared."""
    metal.settings(check=True)
    mix(LAYER, rows_for(LAYER, 5))
    pairs_of(LAYER, rows_for(LAYER, 14), SHARED)


Check = Callable[[Runner], None]


@dataclass(frozen=True, slots=True)
class Mutant:
    """In `file`, `sound` becomes `faulty`; `check` sees it, and those of `unseen` do not."""

    file: str
    sound: str
    faulty: str
    check: Check
    unseen: tuple[Check, ...] = ()


ROWS, EXPERTS, ROUTER = "expert_rows.metal", "verify_experts.metal", "verify_router.metal"
MUTANTS = {
    "gate and up swapped": Mutant(
        ROWS,
        "c % 2 ? up.load(column + c / 2, word) : gate.load(column + c / 2, word)",
        "c % 2 ? gate.load(column + c / 2, word) : up.load(column + c / 2, word)",
        pairs,
        unseen=(company, bytes_read, memory),
    ),
    "scales of gate for up": Mutant(ROWS, "c % 2 ? up.affine(", "c % 2 ? gate.affine(", pairs),
    "group of another word": Mutant(ROWS, "+ word / WORDS_A_GROUP;", "+ word / 8;", pairs),
    "idle lanes' words left out": Mutant(ROWS, "word < uint(WORDS);", "word < uint(WORDS) - 1;", pairs),
    "chains by number of rows": Mutant(
        ROWS,
        "for (uint word = lane; word",
        "for (uint word = (lane + ROWS) % CHAINS; word",
        company,
        unseen=(pairs, scores, bytes_read),
    ),
    "two roundings where rows are many": Mutant(
        ROWS,
        "metal::fma(x[k], w[c][k], sums[r * COLUMNS + c])",
        "ROWS < 3 ? metal::fma(x[k], w[c][k], sums[r * COLUMNS + c]) : x[k] * w[c][k] + sums[r * COLUMNS + c]",
        company,
        unseen=(pairs, scores, bytes_read),
    ),
    "kept words read again": Mutant(ROWS, "again = true;", "", bytes_read, unseen=(pairs, company)),
    "kept scales without a barrier": Mutant(
        ROWS, "simdgroup_barrier(mem_flags::mem_threadgroup);", "", memory, unseen=(bytes_read,)
    ),
    "kept scales behind another barrier": Mutant(
        ROWS,
        "simdgroup_barrier(mem_flags::mem_threadgroup);",
        "simdgroup_barrier(mem_flags::mem_device);",
        memory,
    ),
    "kept scales of another group": Mutant(
        ROWS, "affine[at / W::WORDS_A_GROUP], w);", "affine[at / W::WORDS], w);", pairs
    ),
    "second half takes the first one's columns": Mutant(
        EXPERTS, "columns.part(taken)", "columns.part(0)", pairs
    ),
    "run without its last pair": Mutant(EXPERTS, "uint(run[1] + run[2])", "uint(run[1] + run[2] - 1)", pairs),
    "threadgroups past the last run go on": Mutant(
        EXPERTS, "if (index >= uint(runs[0]))", "if (index > uint(runs[0]))", bytes_read
    ),
    "scores of rows that are not there": Mutant(
        ROUTER, "if (lane / COLUMNS < count) {", "if (lane / COLUMNS < uint(ROWS)) {", memory
    ),
    "row of the next slot": Mutant(EXPERTS, "uint(order[at]) / SLOTS", "uint(order[at] + 1) / SLOTS", pairs),
    "gelu of up": Mutant(EXPERTS, "T(gelu(sum) * up)", "T(gelu(up) * sum)", pairs),
    "gelu without its cube": Mutant(EXPERTS, "0.044715f", "0.0f", pairs),
    "gated at the pair's place in its run": Mutant(
        EXPERTS,
        "const uint pair = order[first + lane / COLUMNS];\n      gated",
        "const uint pair = first + lane / COLUMNS;\n      gated",
        pairs,
    ),
    "combined from the last slot on": Mutant(
        EXPERTS,
        "uint pair = row * SLOTS; pair < (row + 1) * SLOTS; pair++",
        "uint pair = (row + 1) * SLOTS; pair-- > row * SLOTS;",
        combined,
    ),
    "combined by the weights of another row": Mutant(
        EXPERTS, "float(weights[pair])", "float(weights[pair % SLOTS])", combined
    ),
    "norm without its barrier": Mutant(
        EXPERTS, "threadgroup_barrier(mem_flags::mem_threadgroup);", "", memory
    ),
    "norm of one simdgroup": Mutant(EXPERTS, "i < THREADS / 32;", "i < 1;", combined),
    "router's gain for the experts": Mutant(
        ROUTER, "float(experts_gain[n])", "float(router_gain[n])", scores, unseen=(memory,)
    ),
    "norm without a gain": Mutant(ROUTER, "T(gain * float(T(x * inverse)))", "T(x * inverse)", scores),
    "ties to the lower id": Mutant(
        ROUTER,
        "id = keys[i] == highest ? int(lane + 32 * i) : id;\n    }\n    id = simd_max(id);",
        "id = keys[i] == highest && id < 0 ? int(lane + 32 * i) : id;\n    }\n    id = int(simd_min(uint(id)));",
        choice,
        unseen=(scores, sort, memory),
    ),
    "zeros of two signs": Mutant(ROUTER, "value + 0.0f", "value", choice),
    "NaN by its bits": Mutant(ROUTER, "isnan(value) ? 0xFFFFFFFFu :", "", choice),
    "an expert chosen twice": Mutant(ROUTER, "keys[i] = id == int(lane + 32 * i) ? 0 : keys[i];", "", choice),
    "weights without the experts' scales": Mutant(ROUTER, " * float(scales[own_id])", "", choice),
    "softmax of all but one": Mutant(ROUTER, "total += part;", "total += slot ? part : 0.0f;", choice),
    "sort without its barrier": Mutant(
        ROUTER, "threadgroup_barrier(mem_flags::mem_threadgroup);", "", memory
    ),
    "run begins with its equals": Mutant(ROUTER, "ids[pair] < expert;", "ids[pair] <= expert;", sort),
    "pairs in falling order": Mutant(
        ROUTER,
        "order[begin++] = pair;",
        "order[begin + --length] = pair;",
        sort,
        unseen=(pairs, company, memory),
    ),
    "experts counted by their own simdgroup": Mutant(ROUTER, "i < simd; i++", "i < 0; i++", sort),
}


IN_CI = (
    "gate and up swapped",
    "group of another word",
    "two roundings where rows are many",
    "kept words read again",
    "kept scales without a barrier",
    "second half takes the first one's columns",
    "run without its last pair",
    "threadgroups past the last run go on",
    "combined from the last slot on",
    "ties to the lower id",
    "sort without its barrier",
    "run begins with its equals",
)
EACH = [pytest.param(name, marks=() if name in IN_CI else pytest.mark.slow) for name in MUTANTS]


@pytest.fixture
def planted(request: pytest.FixtureRequest) -> Iterator[Mutant]:
    mutant: Mutant = MUTANTS[request.param]
    with planted_in(mutant.file, (mutant.sound, mutant.faulty)):
        yield mutant


@pytest.mark.parametrize("planted", EACH, indirect=True)
def test_fault_is_seen(metal: Runner, planted: Mutant) -> None:
    with pytest.raises((Fault, AssertionError)):
        planted.check(metal)


@pytest.mark.slow
@pytest.mark.parametrize("planted", [name for name in MUTANTS if MUTANTS[name].unseen], indirect=True)
def test_fault_needs_its_check(metal: Runner, planted: Mutant) -> None:
    for check in planted.unseen:
        check(metal)


@pytest.mark.slow
def test_sound_source_passes_every_check(metal: Runner) -> None:
    for check in (scores, choice, sort, pairs, combined, company, bytes_read, memory):
        check(metal)
