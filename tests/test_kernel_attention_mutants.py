"""Faults planted in attention's Metal source and bodies: each must be seen by the kind of check that is made for it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import mlx.core as mx
import pytest

from attention_cases import Heads, assert_near, attended, buffers, lowest, past, same_bits, sight, usual_rows
from mlx_mtp.kernels import prefill_attention, verify_attention
from msl import Fault
from msl.stand_in import Runner
from planted import made_anew, planted_in, spoilt

RING, FULL = Heads(4, 2, 32, 24), Heads(4, 2, 32, None)
# One row of so few keys has its leaves shared out to several threadgroups, and narrow slices.
SHORT = Heads(4, 1, 256, None)
SHAPES = {"ring": RING, "full": FULL, "short": SHORT}


def near(metal: Runner, shape: Heads) -> None:
    """Against float64: ragged members, wrapped rings, more positions than a chunk has."""
    known = past(shape, 320, seed=1, batch=2)
    for rows in (1, 3):
        assert_near(attended(known, [280, 30], rows), known, [280, 30], rows)
    many = Heads(64, 1, 32, shape.window)
    known = past(many, 40, seed=2)
    assert_near(attended(known, [30], 3), known, [30], 3)


def bits(metal: Runner, shape: Heads) -> None:
    """Rows alone, and with others."""
    known = past(shape, 300, seed=3, dtype=mx.float32)
    single = mx.concatenate([attended(known, [at], 1) for at in range(270, 275)])
    assert same_bits(attended(known, [270], 5), single)


def poison(metal: Runner, shape: Heads) -> None:
    """A row's keys and values are no numbers: rows before it keep their bits."""
    known = past(shape, 300, seed=4)
    expected = attended(known, [267], 2)
    keys, values = buffers(known, [267], 3, usual_rows(shape, 270))
    slot = 269 % keys.shape[2] if shape.window else 269
    values[:, :, slot] = mx.nan
    keys[:, :, slot] = mx.nan
    queries = known.queries[:, 267:270].transpose(0, 2, 1, 3)
    out = verify_attention.verify_attention(queries, keys, values, sight(shape, [267], 270))
    assert same_bits(out[:2], expected)


def traffic(metal: Runner, shape: Heads) -> None:
    """Buffer rows that nobody sees are not read."""
    known = past(shape, 300, seed=5)
    for rows in (1, 3):
        with metal.run(count=True):
            metal.reset()
            attended(known, [270], rows, bucket=512)
        seen = (min(271, shape.window or 271) + rows - 1) * shape.kv_heads * shape.dim * 2
        for kind in ("keys", "values"):
            read = [done.counts.read[kind].requested for done in metal.launches if kind in done.counts.read]
            assert sum(read) == seen, (kind, rows)


def memory(metal: Runner, shape: Heads) -> None:
    """Nothing out of bounds, nothing raced for, nothing read before it was written; nothing compared."""
    known = past(Heads(shape.heads * 3, 2, shape.dim, shape.window), 320, seed=6)
    with metal.run(check=True):
        attended(known, [290], 3)
        attended(known, [290], 1)
        chunk(past(shape, 300, seed=7), 250, 262)


def chunk_near(metal: Runner, shape: Heads) -> None:
    known = past(Heads(3, 1, 32, shape.window), 300, seed=8)
    assert_near(chunk(known, 270, 281), known, [270], 11)


def chunk_bits(metal: Runner, shape: Heads) -> None:
    """A chunk and a verify pass."""
    known = past(shape, 300, seed=9, dtype=mx.float32)
    assert same_bits(chunk(known, 280, 284), attended(known, [280], 4))


def chunk(known, low: int, high: int) -> mx.array:  # type: ignore[no-untyped-def]
    first = lowest(known.shape, low)
    queries = known.queries[:, low:high].transpose(0, 2, 1, 3)
    keys, values = (x[:, :, first:high] for x in (known.keys, known.values))
    return prefill_attention.prefill_attention(queries, keys, values, low, first, known.shape.window)


CHECKS = {check.__name__: check for check in (near, bits, poison, traffic, memory, chunk_near, chunk_bits)}


@dataclass(frozen=True, slots=True)
class Mutant:
    """In `place`, a .metal file or a kernel of verify_attention.py, each `sound` becomes `faulty`; `check` sees it."""

    place: str
    changes: tuple[tuple[str, str], ...]
    check: str
    shape: str = "ring"
    unseen: tuple[str, ...] = ()  # checks that it passes: why there is more than one


COMMON, VERIFY, PREFILL = "attention.metal", "verify_attention.metal", "prefill_attention.metal"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
MUTANTS = {
    "window one too long": Mutant(
        COMMON, (("key > first + row - window)", "key >= first + row - window)"),), "near"
    ),
    "window one too short": Mutant(
        COMMON, (("key > first + row - window)", "key > first + row - window + 1)"),), "near"
    ),
    "row does not see itself": Mutant(
        COMMON, (("key <= first + row &&", "key < first + row &&"),), "near", "full"
    ),
    "mask from the slot": Mutant(
        VERIFY, (("rows.sees(row / GQA, key)", "rows.sees(row / GQA, rows.slot(key))"),), "near"
    ),
    "mask by head, not by position": Mutant(
        VERIFY, (("rows.sees(row / GQA, key)", "rows.sees(row % GQA, key)"),), "near", "full"
    ),
    "ring not wrapped inside a leaf": Mutant(
        COMMON, (("ring > 0 && slot + keys >= ring ? slot + keys - ring : slot", "slot"),), "near"
    ),
    "another query head": Mutant(
        COMMON, (("row % GQA * D", "(GQA - 1 - row % GQA) * D"),), "near", "full", unseen=("bits", "memory")
    ),
    "keys of another K/V head": Mutant(
        "LEAF_PASS", (("keys + buffer", "keys + (buffer ^ (size_t(sizes[2]) * D))"),), "near"
    ),
    "position of the first member for all": Mutant("LEAF_PASS", (("first[batch] +", "first[0] +"),), "near"),
    "second chunk stands where the first does": Mutant(
        "LEAF_PASS", (("first[batch] + skipped", "first[batch]"),), "near"
    ),
    "partitions not scaled to a new peak": Mutant(
        VERIFY, (("next, sum * keep[i]", "next, sum"),), "near", unseen=("bits",)
    ),
    "leaves not scaled to their partition": Mutant(
        VERIFY, (("factor = scale_between(top, peak)", "factor = 1"),), "near", "full"
    ),
    "partitions merged from the last to the first": Mutant(
        VERIFY,
        (
            ("tops[from + thread_index]", "tops[from + count - 1 - thread_index]"),
            ("sums[size_t(from + i)", "sums[size_t(from + count - 1 - i)"),
        ),
        "chunk_bits",
        unseen=("near", "bits"),
    ),
    "order of sums by the number of rows": Mutant(
        VERIFY,
        (
            (
                "weights[row * LEAF + i], own[i][c]",
                "weights[row * LEAF + (i + rows.count) % LEAF], own[(i + rows.count) % LEAF][c]",
            ),
        ),
        "bits",
        unseen=("near",),
    ),
    "partitions begin at the lowest key": Mutant(
        VERIFY,
        (
            (
                "const int key = leaf * LEAF + place;",
                "const int key = leaf * LEAF + place + rows.lowest() % LEAF;",
            ),
            (
                "const int slot = rows.slot(leaf * LEAF);",
                "const int slot = rows.slot(leaf * LEAF + rows.lowest() % LEAF);",
            ),
            ("rows.live(leaf * LEAF + i)", "rows.live(leaf * LEAF + i + rows.lowest() % LEAF)"),
        ),
        "chunk_bits",
    ),
    "weight 0 times no number": Mutant(
        COMMON, (("edge && weight == 0 ? sum : next", "next"),), "poison", unseen=("near", "bits")
    ),
    "weight 0 times no number in a full layer": Mutant(
        COMMON, (("edge && weight == 0 ? sum : next", "next"),), "poison", "full", unseen=("near", "bits")
    ),
    "keys read that nobody sees": Mutant(
        VERIFY,
        (("rows.slot(key), rows.live(key)", "rows.slot(max(key, 0)), true"),),
        "traffic",
        unseen=("near",),
    ),
    "values read that nobody sees": Mutant(
        VERIFY, (("rows.live(leaf * LEAF + i) && column < D", "column < D"),), "traffic", unseen=("near",)
    ),
    "no barrier before weights are read": Mutant(
        VERIFY,
        ((f"thread_index);\n  {BARRIER}\n  for (int low", "thread_index);\n  for (int low"),),
        "memory",
    ),
    "no barrier before queries are overwritten": Mutant(
        VERIFY,
        ((f"{BARRIER}\n    stage_queries", "stage_queries"),),
        "memory",
    ),
    "barrier of the wrong memory": Mutant(
        VERIFY,
        (
            (
                f"thread_index);\n    {BARRIER}",
                "thread_index);\n    threadgroup_barrier(mem_flags::mem_device);",
            ),
        ),
        "memory",
    ),
    "shared leaf: a threadgroup scores its neighbour's keys": Mutant(
        VERIFY, (("piece * (LEAF / PIECES) +", "(piece / 2 * 2) * (LEAF / PIECES) +"),), "near", "short"
    ),
    "shared leaf: scores summed as weights": Mutant(
        VERIFY, (("RAW ? weight_of(weight, peaks[of_leaf]) : weight", "weight"),), "near", "short"
    ),
    "shared leaf: peaks already scaled": Mutant(
        VERIFY, (("peaks[at] = top;", "peaks[at] = factor;"),), "near", "short"
    ),
    "shared leaf: total of another row": Mutant(
        VERIFY,
        (("totals[leaf * ROWS + row] = total", "totals[leaf * ROWS + (row + 1) % count] = total"),),
        "near",
        "short",
    ),
    "shared leaf: weights rounded on the way": Mutant(
        VERIFY,
        (("weight_of(weight, peaks[of_leaf])", "float(bfloat(weight_of(weight, peaks[of_leaf])))"),),
        "bits",
        "short",
    ),
    "shared leaf: values of the next slice": Mutant(
        VERIFY,
        (("* D + slice * SLICE + i % SLICE", "* D + (slice + 1) % (D / SLICE) * SLICE + i % SLICE"),),
        "near",
        "short",
    ),
    "no barrier before tops are read": Mutant(
        VERIFY,
        (
            (
                f"rows.count * GQA;\n  {BARRIER}\n  for (int row = thread_index",
                "rows.count * GQA;\n  for (int row = thread_index",
            ),
        ),
        "memory",
        "short",
    ),
    "chunk: heads of a tile's first position": Mutant(
        PREFILL, (("rows.sees((head + row) / GQA, key)", "rows.sees(row / GQA, key)"),), "chunk_near"
    ),
    "chunk: no barrier behind a span": Mutant(
        PREFILL, ((f"      }}\n    }}\n    {BARRIER}\n  }}\n", "      }\n    }\n  }\n"),), "memory", "full"
    ),
    "chunk: one partition for a span": Mutant(
        PREFILL, (("leaf == high || (leaf + 1) % LEAVES == 0", "leaf == high"),), "chunk_near"
    ),
}


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Mutant]:
    mutant: Mutant = MUTANTS[request.param]
    if mutant.place.endswith(".metal"):
        with planted_in(mutant.place, *mutant.changes):
            yield mutant
    else:
        kernel = getattr(verify_attention, mutant.place)
        faulty = replace(kernel, body=spoilt(kernel.body, *mutant.changes))
        monkeypatch.setattr(verify_attention, mutant.place, faulty)
        with made_anew():
            yield mutant


@pytest.mark.parametrize("planted", MUTANTS, indirect=True)
def test_fault_is_seen(metal: Runner, planted: Mutant) -> None:
    shape = SHAPES[planted.shape]
    for check in planted.unseen:
        CHECKS[check](metal, shape)
    with pytest.raises(Fault if planted.check == "memory" else AssertionError):
        CHECKS[planted.check](metal, shape)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_sound_source_passes_every_check(metal: Runner, shape: str, check: str) -> None:
    CHECKS[check](metal, SHAPES[shape])
