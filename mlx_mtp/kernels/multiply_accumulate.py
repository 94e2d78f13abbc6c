"""In which order does a chip's 8x8x8 matrix multiply-accumulate add? What it gave, against every order we can name.

If the answer is "eight fma in turn from c, k upwards", the matrix-unit body of our products has the scalar body's bits.
"""

import itertools
import json
import signal
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mtp.kernels.launch import Kernel

TILES = 16
SIDE = 8
TYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
OURS = "fma from c, k upwards"  # what the scalar body of our products does
SEARCHED = 24  # elements that all 8! orders are tried on

SECONDS = 60  # after which the process ends itself

Floats = npt.NDArray[np.float32]

KERNEL = Kernel(
    name="multiply_accumulate",
    files=("multiply_accumulate.metal",),
    inputs=("a", "b", "c"),
    outputs=("d",),
    body="""
    const uint offset = threadgroup_position_in_grid.x * 64;
    multiply_accumulate_tile(a + offset, b + offset, c + offset, d + offset, thread_index_in_simdgroup);
""",
)


def order_of_sums(dtype: str = "float32") -> dict[str, Any]:
    """Run the instruction on random tiles of `dtype` and name the orders that give its bits (see `classify`)."""
    a, b, c = random_tiles(dtype)
    return classify(*(_numbers(x) for x in (a, b, c, multiply_accumulate(a, b, c))))


def random_tiles(dtype: str, *, seed: int = 501) -> tuple[mx.array, mx.array, mx.array]:
    """a, b [TILES, 8, 8] in `dtype` and c in float32, of sizes far apart: every order of sums rounds otherwise."""
    parts = []
    for i in range(3):
        size = 2.0 ** mx.random.randint(-4, 5, (TILES, SIDE, SIDE), key=mx.random.key(seed + i))
        normal = mx.random.normal((TILES, SIDE, SIDE), key=mx.random.key(seed + 10 + i))
        parts.append((normal * size).astype(TYPES[dtype] if i < 2 else mx.float32))
    mx.eval(parts)
    return parts[0], parts[1], parts[2]


def multiply_accumulate(a: mx.array, b: mx.array, c: mx.array) -> mx.array:
    """a, b, c [tiles, 8, 8] -> c + a b by the matrix unit."""
    (d,) = KERNEL(
        [a, b, c],
        template={},
        groups=(a.shape[0], 1, 1),
        threads=(32, 1, 1),
        shapes=[a.shape],
        dtypes=[mx.float32],
    )
    return d


def classify(a: Floats, b: Floats, c: Floats, d: Floats) -> dict[str, Any]:
    """a, b, c, d [tiles, 8, 8] -> the named orders that give d's bits everywhere, and how many elements each explains.

    `orders`: where no name fits, the chains of fma from c in any of the 8! orders of k that do.
    """
    shares = {name: float(np.mean(_same(made, d))) for name, made in candidates(a, b, c)}
    equal = [name for name, share in shares.items() if share == 1.0]
    closest = max(shares, key=lambda name: shares[name])
    return {
        "elements": int(d.size),
        "equals": equal,
        "is_ours": OURS in equal,
        "closest": closest,
        "shares": {name: round(share, 4) for name, share in shares.items()},
        "orders": [] if equal else _searched(a, b, c, d),
    }


def candidates(a: Floats, b: Floats, c: Floats) -> Iterator[tuple[str, Floats]]:
    """Every order that has a name, and what it gives; arithmetic of float32, each step rounded to nearest."""
    left, right = _operands(a, b)
    upwards, zero = list(range(SIDE)), np.zeros_like(c)
    even_odd = [*upwards[::2], *upwards[1::2]]
    for words, order in (("upwards", upwards), ("downwards", upwards[::-1]), ("even, then odd", even_odd)):
        yield f"fma from c, k {words}", _chain(left, right, c, order)
        yield f"fma from 0, k {words}, then c", _chain(left, right, zero, order) + c
    products = [left[k] * right[k] for k in upwards]
    yield "rounded products added to c, k upwards", _sum(products, c)
    yield "rounded products in a tree of neighbours, then c", _tree(products) + c
    halves = [_chain(left, right, zero, part) for part in (upwards[:4], upwards[4:])]
    yield "two fma chains of 4 from 0, then c", (halves[0] + halves[1]) + c
    yield "two fma chains of 4, one after the other's sum onto c", (c + halves[0]) + halves[1]
    pairs = [_chain(left, right, zero, [k, k + 1]) for k in upwards[::2]]
    yield "fma pairs in a tree, then c", _tree(pairs) + c
    yield "fma pairs added to c in turn", _sum(pairs, c)
    exact = _exact(left, right, c)
    yield "exact, rounded once", exact.astype(np.float32)
    yield "exact, cut off once", _cut_off(exact)
    yield "exact products of 4 twice, rounded after each", _blocks(left, right, c)


def fma(a: Floats, b: Floats, c: Floats) -> Floats:
    """a * b + c rounded once; in float64 the product is exact, the sum is rounded to odd so that no half is lost."""
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    is_even = (total.view(np.int64) & 1) == 0
    towards = np.where(error > 0, np.inf, -np.inf)
    odd = np.where((error != 0) & is_even, np.nextafter(total, towards), total)
    return odd.astype(np.float32)


def _operands(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """[8, tiles, 8, 8]: for each k what is multiplied for every element of the result."""
    left = np.stack([np.broadcast_to(a[:, :, k, None], a.shape) for k in range(SIDE)])
    right = np.stack([np.broadcast_to(b[:, None, k, :], b.shape) for k in range(SIDE)])
    return left, right


def _chain(left: Floats, right: Floats, start: Floats, order: list[int]) -> Floats:
    total = start
    for k in order:
        total = fma(left[k], right[k], total)
    return total


def _sum(parts: list[Floats], start: Floats) -> Floats:
    total = start
    for part in parts:
        total = total + part
    return total


def _tree(parts: list[Floats]) -> Floats:
    while len(parts) > 1:
        parts = [parts[i] + parts[i + 1] for i in range(0, len(parts), 2)]
    return parts[0]


def _exact(left: Floats, right: Floats, c: Floats) -> npt.NDArray[np.float64]:
    """The sum in float64: rounded to float32 it is the exact one's rounding, but for one case in many millions."""
    total = c.astype(np.float64)
    for k in range(left.shape[0]):
        total = total + left[k].astype(np.float64) * right[k].astype(np.float64)
    return total


def _blocks(left: Floats, right: Floats, c: Floats) -> Floats:
    first = _exact(left[:4], right[:4], c).astype(np.float32)
    return _exact(left[4:], right[4:], first).astype(np.float32)


def _cut_off(exact: npt.NDArray[np.float64]) -> Floats:
    near = exact.astype(np.float32)
    return np.where(np.abs(near) > np.abs(exact), np.nextafter(near, np.float32(0)), near)


def _searched(a: Floats, b: Floats, c: Floats, d: Floats) -> list[list[int]]:
    left, right = (x.reshape(SIDE, -1)[:, :SEARCHED] for x in _operands(a, b))
    start, want = c.reshape(-1)[:SEARCHED], d.reshape(-1)[:SEARCHED]
    orders = np.array(list(itertools.permutations(range(SIDE))))
    total = np.broadcast_to(start, (len(orders), start.size))
    for step in range(SIDE):
        total = fma(left[orders[:, step]], right[orders[:, step]], total)
    return [[int(k) for k in order] for order in orders[_same(total, want).all(axis=-1)][:8]]


def _same(a: Floats, b: Floats) -> npt.NDArray[np.bool_]:
    return np.asarray(a.view(np.uint32) == b.view(np.uint32))


def _numbers(x: mx.array) -> Floats:
    return np.array(x.astype(mx.float32))


def main() -> None:
    """In a process of its own, as every kernel that nobody has run on this chip: one JSON line on stdout."""
    signal.alarm(SECONDS)
    print(json.dumps({dtype: order_of_sums(dtype) for dtype in TYPES}))


if __name__ == "__main__":
    main()
