"""Skinny products over every K of Gemma, every number of rows and every tile; minutes, hence slow."""

import mlx.core as mx
import pytest

from mlx_mtp.kernels.skinny import MAX_TILE
from mlx_mtp.weights import DenseWeight, Weight
from msl.stand_in import Runner
from qmm_cases import BODIES, assert_near, gemma_shapes, multiply, quantised, random_rows, same_bits

pytestmark = pytest.mark.slow
ROWS = (*range(1, 10), 16, 17, 20, 40, 72)
DEPTHS = sorted({depth for depth, _ in gemma_shapes()} | {32, 64, 96, 128})
FORMATS = {
    **{f"{bits}-bit, {group}": (bits, group, "affine") for bits in (4, 8) for group in (32, 64, 128)},
    "mxfp4": (4, 32, "mxfp4"),
    "mxfp8": (8, 32, "mxfp8"),
    "nvfp4": (4, 16, "nvfp4"),
    "dense": (0, 32, "dense"),
}
CASES = [(name, depth) for name, (_, group, _) in FORMATS.items() for depth in DEPTHS if depth % group == 0]


def made(name: str, columns: int, depth: int, dtype: mx.Dtype) -> Weight:
    bits, group, mode = FORMATS[name]
    if mode == "dense":
        return DenseWeight(random_rows(columns, depth, seed=depth, dtype=dtype))
    return quantised(columns, depth, seed=depth, bits=bits, group=group, mode=mode, dtype=dtype)


def test_every_k_of_gemma_is_swept() -> None:
    assert {
        256,
        704,
        1536,
        2112,
        2560,
        2816,
        3840,
        4096,
        5376,
        6144,
        8192,
        10240,
        12288,
        15360,
        16384,
        21504,
    } <= set(DEPTHS)


@pytest.mark.parametrize(
    "dtype", [mx.float32, mx.bfloat16, mx.float16], ids=["float32", "bfloat16", "float16"]
)
@pytest.mark.parametrize(("name", "depth"), CASES)
def test_near_float64_and_the_same_for_every_number_of_rows(
    metal: Runner, name: str, depth: int, dtype: mx.Dtype
) -> None:
    weight = made(name, 13, depth, dtype)
    x = random_rows(max(ROWS), depth, seed=1, dtype=dtype)
    whole = multiply(weight, x)
    assert_near(whole, weight, x)
    for rows in ROWS:
        for body in BODIES:
            last = x[max(ROWS) - rows :]
            assert same_bits(multiply(weight, last, body=body), whole[max(ROWS) - rows :]), (rows, body)


@pytest.mark.parametrize("name", FORMATS)
def test_every_tile_under_the_checker(metal: Runner, name: str) -> None:
    weight = made(name, 21, 384, mx.float32)
    x = random_rows(19, 384, seed=2)
    expected = mx.concatenate([multiply(weight, x[row : row + 1]) for row in range(19)])
    for tile in range(1, MAX_TILE + 1):
        for order, seed in (("forward", 0), ("reverse", 0), ("random", tile)):
            with metal.run(order=order, seed=seed, check=True):
                for body in BODIES:
                    out = multiply(weight, x, body=body, tile=tile)
                    assert same_bits(out, expected), (tile, order, body)


@pytest.mark.parametrize("body", BODIES)
def test_whole_vocabulary(metal: Runner, body: str) -> None:
    """N of the head, as tied embeddings have it; K of E2B's drafter."""
    weight = quantised(262_144, 256, seed=3)
    x = random_rows(2, 256, seed=4, dtype=mx.bfloat16)
    out = multiply(weight, x, body="scalar" if body == "scalar" else "matrix")
    assert_near(out, weight, x)
    assert metal.launches[-1].threadgroups == 262_144 // 8
