"""Layers of random experts, routings that try a sort, and what float64 makes of each stage of the MoE block."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mtp.kernels.verify_experts import (
    Routing,
    choose_experts,
    combine_rows,
    down_pairs,
    gate_up_pairs,
    score_rows,
    sort_chosen,
    verify_experts,
)
from mlx_mtp.layers import Experts
from mlx_mtp.weights import DenseWeight, QuantizedWeight, Weight
from qmm_cases import ROUNDING, random_rows, table_of

Floats = np.ndarray[Any, np.dtype[np.float64]]
Ids = np.ndarray[Any, np.dtype[np.int64]]
EPS = 1e-6
SMALLEST = {mx.float32: 0.0, mx.bfloat16: 0.0, mx.float16: 2.0**-24}  # what lies between two tiny numbers


def make_experts(
    number: int = 16,
    top_k: int = 4,
    hidden: int = 320,
    width: int = 96,
    *,
    bits: int | None = 4,
    group: int = 32,
    dtype: mx.Dtype = mx.float32,
    seed: int = 0,
) -> Experts:
    """A layer of `number` experts of `width`, the router 8-bit; all of it dense without `bits`."""

    def matrix(shape: tuple[int, ...], place: int, bits: int | None) -> Weight:
        values = mx.random.normal(shape, key=mx.random.key(100 * seed + place)) * shape[-1] ** -0.5
        if bits is None:
            return DenseWeight(values.astype(dtype))
        parts = mx.quantize(values.astype(dtype), group_size=group, bits=bits)
        return QuantizedWeight(*parts, group, bits, "affine", dtype)

    def gain(length: int, place: int) -> mx.array:
        return (1 + random_rows(1, length, seed=100 * seed + place)[0] / 8).astype(dtype)

    return Experts(
        router=matrix((number, hidden), 1, bits and 8),
        router_norm=gain(hidden, 2) * 2,
        per_expert_scale=gain(number, 3),
        gate=matrix((number, width, hidden), 4, bits),
        up=matrix((number, width, hidden), 5, bits),
        down=matrix((number, hidden, width), 6, bits),
        top_k=top_k,
        pre_norm=gain(hidden, 7),
        post_norm=gain(hidden, 8),
        post_norm_of_mlp=gain(hidden, 9),
    )


def rows_for(experts: Experts, rows: int, *, seed: int = 50) -> mx.array:
    """A residual stream of small and large rows."""
    hidden = experts.gate.shape[-1]
    sizes = mx.array([0.1, 1.0, 30.0])[mx.arange(rows) % 3][:, None]
    return (random_rows(rows, hidden, seed=seed) * sizes).astype(experts.pre_norm.dtype)


def stock_product(weight: Weight, x: mx.array) -> mx.array:
    return weight.project(x)


def mix(experts: Experts, x: mx.array) -> mx.array:
    return verify_experts(experts, x, EPS, stock_product)


def routings(rows: int, number: int, top_k: int) -> dict[str, Ids]:
    """Experts of each row, [rows, top_k]: what the router may give, and ids repeated in a row, which it does not."""
    random = np.random.default_rng(rows)
    some = np.stack([random.permutation(number)[:top_k] for _ in range(rows)])
    shared = np.stack([1 + random.permutation(number - 1)[:top_k] for _ in range(rows)])
    shared[np.arange(rows), np.arange(rows) % top_k] = 0
    one_row = random.permutation(number)[:top_k]
    return {
        "any": some,
        "the same experts": np.tile(one_row, (rows, 1)),
        "the same in other slots": np.stack([np.roll(one_row, row) for row in range(rows)]),
        "one shared": shared,
        "few": some % (top_k + 1) if top_k + 1 < number else some,
        "the last alone": np.full((rows, top_k), number - 1),
        "repeated": random.integers(0, 2, (rows, top_k)),
    }


def routing_of(ids: Ids, number: int, dtype: mx.Dtype, *, seed: int = 60) -> Routing:
    """Sorted, with random weights; past the last run stands what might be left there: a run of the last expert."""
    weights = (1 + random_rows(*ids.shape, seed=seed)).astype(dtype)
    routing = sort_chosen(mx.array(ids.astype(np.uint32)), weights, number)
    runs = np.array(routing.runs)
    unwritten = runs[1 + 3 * runs[0] :]
    unwritten[:] = np.resize([number - 1, 0, 1], unwritten.shape)
    return routing._replace(runs=mx.array(runs))


def float64(x: mx.array) -> Floats:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def expert_table(weight: Weight, expert: int) -> Floats:
    """[N, K] of one expert."""
    if isinstance(weight, DenseWeight):
        return table_of(DenseWeight(weight.weight[expert]))
    assert weight.biases is not None
    parts = (weight.weight[expert], weight.scales[expert], weight.biases[expert])
    return table_of(QuantizedWeight(*parts, weight.group_size, weight.bits, "affine", weight.dtype))


def assert_within(y: mx.array, expected: Floats, allowed: Floats) -> None:
    off = np.abs(float64(y) - expected)
    assert off.shape == allowed.shape
    assert (off <= allowed).all(), (
        f"off by up to {(off / np.maximum(allowed, 1e-30)).max()} times what is allowed"
    )


def lost(depth: int) -> float:
    """Relative to the sum of absolute products: what float32 sums of `depth` products lose."""
    return 1.01 * (depth / 32 + 8) * ROUNDING[mx.float32]


def normed(x: mx.array, gain: mx.array) -> Floats:
    rows = float64(x)
    return rows / np.sqrt((rows**2).mean(-1, keepdims=True) + EPS) * float64(gain)


def check_scores(experts: Experts, x: mx.array) -> None:
    """Scores and the experts' rows against float64; a norm has two roundings to x's type."""
    scores, rows = score_rows(experts, x, EPS)
    rounding = ROUNDING[x.dtype]
    expected = normed(x, experts.pre_norm)
    assert_within(rows, expected, (2.1 * rounding + 1e-6) * np.abs(expected) + 3 * SMALLEST[x.dtype])
    expected_rows = normed(x, experts.router_norm)
    table = table_of(experts.router)
    exact, size = expected_rows @ table.T, np.abs(expected_rows) @ np.abs(table).T
    of_norms = 2.1 * rounding * np.sqrt(expected_rows**2 @ table.T**2) * 4
    assert_within(scores, exact, rounding * np.abs(exact) + of_norms + lost(x.shape[1]) * size)


def best_of(scores: mx.array, top_k: int) -> Ids:
    """Ids of the best scores in ascending order; of equal ones the higher ids are better, and NaN is best of all."""
    values = float64(scores)
    broken = np.isnan(values)
    ids = np.broadcast_to(np.arange(values.shape[1]), values.shape)
    return np.lexsort((ids, np.where(broken, 0, values), broken))[:, -top_k:]


def check_choice(scores: mx.array, scales: mx.array, top_k: int) -> None:
    """Ids exactly, weights against float64, the sort exactly."""
    routing = choose_experts(scores, scales, top_k)
    ids = best_of(scores, top_k)
    assert np.array_equal(np.array(routing.chosen), ids)
    best = np.take_along_axis(float64(scores), ids, 1)
    with np.errstate(invalid="ignore"):
        parts = np.exp(best - best.max(1, keepdims=True))
        expected = parts / parts.sum(1, keepdims=True) * float64(scales)[ids]
    finite = np.isfinite(expected).all(1)
    assert np.isnan(float64(routing.weights)[~finite]).any(1).all()
    allowed = (1.01 * ROUNDING[scores.dtype] + 4e-6) * np.abs(expected) + 1e-7
    assert_within(routing.weights[mx.array(np.flatnonzero(finite))], expected[finite], allowed[finite])
    check_sorted(routing, ids)


def check_sorted(routing: Routing, ids: Ids) -> None:
    flat = ids.reshape(-1)
    assert np.array_equal(np.array(routing.order)[: flat.size], np.argsort(flat, kind="stable"))
    used, lengths = np.unique(flat, return_counts=True)
    runs = np.array(routing.runs)
    assert runs[0] == len(used)
    expected = np.stack([used, np.cumsum(lengths) - lengths, lengths], 1)
    assert np.array_equal(runs[1 : 1 + 3 * len(used)].reshape(-1, 3), expected)


def check_pairs(experts: Experts, rows: mx.array, ids: Ids) -> None:
    """Both products against float64, pair by pair, each from the kernels' own input."""
    number, width, hidden = experts.gate.shape
    top_k = ids.shape[1]
    routing = routing_of(ids, number, rows.dtype)
    gated = gate_up_pairs(experts, rows, routing)
    outputs = down_pairs(experts, gated, routing)
    x, h = float64(rows), float64(gated)
    for expert in np.unique(ids):
        pairs = np.flatnonzero(ids.reshape(-1) == expert)
        gate, up, down = (expert_table(weight, expert) for weight in (experts.gate, experts.up, experts.down))
        own = x[pairs // top_k]
        g, u = own @ gate.T, own @ up.T
        gelu = 0.5 * g * (1 + np.tanh((2 / np.pi) ** 0.5 * (g + 0.044715 * g**3)))
        off_g, off_u = (lost(hidden) * (np.abs(own) @ np.abs(table).T) for table in (gate, up))
        allowed = (
            (ROUNDING[rows.dtype] + 2e-6) * np.abs(gelu * u)
            + np.abs(u) * 1.13 * off_g
            + np.abs(gelu) * off_u
            + 1e-7
        )
        assert_within(gated[mx.array(pairs)], gelu * u, allowed)
        exact, size = h[pairs] @ down.T, np.abs(h[pairs]) @ np.abs(down).T
        assert_within(outputs[mx.array(pairs)], exact, lost(width) * size)


def check_combined(experts: Experts, rows: int, dtype: mx.Dtype) -> None:
    """The sum in slot order, bit by bit; the norm after it against float64."""
    hidden, slots = experts.gate.shape[-1], experts.top_k
    outputs = random_rows(rows * slots, hidden, seed=70)
    weights = (1 + random_rows(rows, slots, seed=71)).astype(dtype)
    total = np.zeros((rows, hidden), np.float32)
    for slot in range(
        slots
    ):  # a product of two float32 is exact in float64, and so is nearly every sum with a third
        product = float64(outputs).reshape(rows, slots, hidden)[:, slot] * float64(weights)[:, slot, None]
        total = (product + total).astype(np.float32)
    combined = combine_rows(outputs, weights, dtype, None)
    assert mx.array_equal(combined, mx.array(total).astype(dtype))
    expected = normed(combined, experts.post_norm)
    y = combine_rows(outputs, weights, dtype, (experts.post_norm, EPS))
    assert_within(y, expected, (2.1 * ROUNDING[dtype] + 2e-6) * np.abs(expected) + 3 * SMALLEST[dtype])


def rows_alone(function: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
    """Each row computed without the others."""
    return mx.concatenate([function(x[row : row + 1]) for row in range(x.shape[0])])
