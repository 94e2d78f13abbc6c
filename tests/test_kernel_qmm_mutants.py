"""Faults planted in the skinny products' Metal source: each must be seen by the kind of check that is made for it."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.kernels.skinny import Body
from mlx_mtp.weights import DenseWeight, Weight
from msl import Fault
from msl.stand_in import Runner
from planted import planted_in
from qmm_cases import assert_near, multiply, quantised, random_rows, same_bits, table_of

COLUMNS, DEPTH = 21, 704
FORMATS: dict[str, Weight] = {
    "4-bit": quantised(COLUMNS, DEPTH, seed=1),
    "8-bit": quantised(COLUMNS, DEPTH, seed=2, bits=8),
    "mxfp4": quantised(COLUMNS, DEPTH, seed=3, mode="mxfp4"),
    "mxfp8": quantised(COLUMNS, DEPTH, seed=4, mode="mxfp8"),
    "nvfp4": quantised(COLUMNS, DEPTH, seed=5, mode="nvfp4"),
    "dense": DenseWeight(random_rows(COLUMNS, DEPTH, seed=6)),
}


def near(weight: Weight, body: Body) -> None:
    """Against float64."""
    x = random_rows(9, DEPTH, seed=7)
    assert_near(multiply(weight, x, body=body), weight, x)


def place(weight: Weight, body: Body) -> None:
    """Rows of the identity, some of every group and of every place in a word, bring out the table."""
    out = np.array(multiply(weight, mx.eye(DEPTH)[5::11], body=body)).astype(np.float64)
    assert np.allclose(out, table_of(weight).T[5::11], rtol=1e-6, atol=1e-6)


def bits(weight: Weight, body: Body) -> None:
    """A row alone, with others, in either body."""
    x = random_rows(9, DEPTH, seed=8)
    expected = mx.concatenate([multiply(weight, x[row : row + 1]) for row in range(9)])
    for rows in (2, 4, 9):
        assert same_bits(multiply(weight, x[:rows], body=body), expected[:rows])
    assert same_bits(multiply(weight, x, body=body, tile=7), expected)


def memory(weight: Weight, body: Body) -> None:
    """Nothing out of bounds, nothing raced for; nothing compared."""
    for rows, tile in ((9, 8), (5, 3)):
        multiply(weight, random_rows(rows, DEPTH, seed=9), body=body, tile=tile)


CHECKS = {check.__name__: check for check in (near, place, bits, memory)}


@dataclass(frozen=True, slots=True)
class Mutant:
    """In `file`, `sound` becomes `faulty`; `check` sees it in `weight`'s format and `body`."""

    file: str
    sound: str
    faulty: str
    check: str
    weight: str = "4-bit"
    body: Body = "scalar"
    unseen: tuple[str, ...] = field(default=())  # checks that it passes: why there is more than one


QMM, SKINNY, GEMM = "verify_qmm.metal", "skinny.metal", "verify_gemm.metal"
MUTANTS = {
    "group of another word": Mutant(
        QMM, "word * WORD / GROUP;\n    const float scale", "word / GROUP;\n    const float scale", "place"
    ),
    "group of another column": Mutant(
        QMM,
        "long(column) * (depth / GROUP) + word * WORD / GROUP;\n    const float scale",
        "long(column) * (depth / 32) + word * WORD / GROUP;\n    const float scale",
        "memory",
    ),
    "group of another segment": Mutant(
        QMM, "segment * SEGMENT / GROUP", "segment / GROUP", "place", body="matrix"
    ),
    "scale and bias swapped": Mutant(
        QMM, "metal::fma(w[k], scale, bias)", "metal::fma(w[k], bias, scale)", "near"
    ),
    "nibbles in pairs": Mutant(
        QMM,
        "q[k] = float(values[k].x);\n      q[k + 4]",
        "q[2 * k] = float(values[k].x);\n      q[2 * k + 1]",
        "place",
    ),
    "bytes of a pair swapped": Mutant(
        QMM,
        "q[4 * half_word] = float(even.x);\n      q[4 * half_word + 1] = float(odd.x)",
        "q[4 * half_word + 1] = float(even.x);\n      q[4 * half_word] = float(odd.x)",
        "place",
        "8-bit",
    ),
    "nibbles of a byte swapped": Mutant(
        QMM,
        "(packed & 0x0fu) | (packed & 0xf0u) << 12",
        "(packed & 0xf0u) >> 4 | (packed & 0x0fu) << 16",
        "place",
        body="matrix",
    ),
    "word from another lane": Mutant(
        QMM, "(2 * u & 2) | place >> 1", "(2 * u & 2) | (place & 1)", "place", "8-bit", "matrix"
    ),
    "sign lost": Mutant(QMM, "(codes & 0x00080008u) << 12 | ", "", "near", "mxfp4"),
    "exponent off by one": Mutant(QMM, "half2(256.0h)", "half2(128.0h)", "near", "mxfp8"),
    "one scale for two groups": Mutant(
        QMM, "u > 0 && u * WORD % GROUP == 0", "false", "near", "nvfp4", "matrix"
    ),
    "dense word too far": Mutant(
        GEMM, "u * (WORD / 2) + place", "u * WORD + place", "place", "dense", "matrix"
    ),
    "one lane's sum missing": Mutant(
        SKINNY, "for (int word = lane; word", "for (int word = lane; lane != 13 && word", "near"
    ),
    "last round left out": Mutant(
        SKINNY, "word < depth / WORD;", "word < depth / WORD / CHAINS * CHAINS;", "near"
    ),
    "tree without its last step": Mutant(
        SKINNY, "struct LaneSums<COUNT, CHAINS>", "struct LaneSums<COUNT, CHAINS / 2>", "near"
    ),
    "sums given to the wrong lane": Mutant(
        SKINNY,
        "kept = upper ? values[2 * i + 1] : values[2 * i];",
        "kept = upper ? values[2 * i] : values[2 * i + 1];",
        "near",
    ),
    "chains by number of rows": Mutant(
        SKINNY,
        "for (int word = lane; word",
        "for (int word = (lane + ROWS) % CHAINS; word",
        "bits",
        unseen=("near", "place", "memory"),
    ),
    "two roundings where rows are many": Mutant(
        SKINNY,
        "metal::fma(values[k], w[c][k], sums[r * COLUMNS + c])",
        "ROWS < 3 ? metal::fma(values[k], w[c][k], sums[r * COLUMNS + c]) : "
        "values[k] * w[c][k] + sums[r * COLUMNS + c]",
        "bits",
        unseen=("near", "place", "memory"),
    ),
    "tree in another order": Mutant(
        SKINNY,
        "sums[0][t].thread_elements()[e] + sums[1][t]",
        "sums[0][t].thread_elements()[e] + sums[3][t]",
        "near",
        body="matrix",
    ),
    "segments by another simdgroup": Mutant(
        SKINNY,
        "for (int segment = simd; segment",
        "for (int segment = (simd + 1) % SPLITS; segment",
        "bits",
        body="matrix",
        unseen=("near", "place", "memory"),
    ),
    "missing barrier": Mutant(
        SKINNY, "threadgroup_barrier(mem_flags::mem_threadgroup);", "", "memory", body="matrix"
    ),
    "barrier for other memory": Mutant(
        SKINNY,
        "threadgroup_barrier(mem_flags::mem_threadgroup);",
        "threadgroup_barrier(mem_flags::mem_device);",
        "memory",
        body="matrix",
        unseen=("near", "bits"),
    ),
    "row beyond the last read": Mutant(
        SKINNY, "min(first_row + r, rows - 1)", "(first_row + r)", "memory", unseen=("near",)
    ),
    "row beyond the last read into the matrix": Mutant(
        SKINNY,
        "min(first_row + t * 8 + place * 2 + e, rows - 1)",
        "(first_row + t * 8 + place * 2 + e)",
        "memory",
        body="matrix",
        unseen=("near",),
    ),
    "row beyond the last written": Mutant(
        SKINNY, "int(lane) < ROWS * COLUMNS && row < rows &&", "int(lane) < ROWS * COLUMNS &&", "memory"
    ),
    "column beyond the last written": Mutant(
        SKINNY, "row < rows && first_column + item % 8 < columns", "row < rows", "memory", body="matrix"
    ),
    "column beyond the last read": Mutant(
        SKINNY, "min(first_column + across, columns - 1)", "first_column + across", "memory", body="matrix"
    ),
}


@pytest.fixture
def planted(request: pytest.FixtureRequest) -> Iterator[Mutant]:
    mutant: Mutant = MUTANTS[request.param]
    with planted_in(mutant.file, (mutant.sound, mutant.faulty)):
        yield mutant


@pytest.mark.parametrize("planted", MUTANTS, indirect=True)
def test_fault_is_seen(metal: Runner, planted: Mutant) -> None:
    weight = FORMATS[planted.weight]
    for check in planted.unseen:
        metal.settings(check=False)
        CHECKS[check](weight, planted.body)
    metal.settings(check=planted.check == "memory")
    with pytest.raises(Fault if planted.check == "memory" else AssertionError):
        CHECKS[planted.check](weight, planted.body)


@pytest.mark.parametrize("name", FORMATS)
def test_sound_source_passes_every_check(metal: Runner, name: str) -> None:
    for check in CHECKS.values():
        metal.settings(check=check is memory)
        for body in ("scalar", "matrix"):
            check(FORMATS[name], body)
