"""The MoE block run as Metal source: near float64, a row's bits independent of its company, each expert read once.

The full sweeps are in test_kernel_experts_sweep.py, what breaks which check here in test_kernel_experts_mutants.py.
"""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from expert_cases import (
    EPS,
    Ids,
    check_choice,
    check_combined,
    check_pairs,
    check_scores,
    check_sorted,
    float64,
    make_experts,
    mix,
    routing_of,
    routings,
    rows_alone,
    rows_for,
    stock_product,
)
from mlx_mtp.errors import KernelError
from mlx_mtp.kernels import verify_experts as module
from mlx_mtp.kernels.verify_experts import (
    choose_experts,
    down_pairs,
    gate_up_pairs,
    reference,
    reference_sum,
    route_rows,
    sum_experts,
    unsupported,
)
from mlx_mtp.layers import Experts, mixture
from mlx_mtp.weights import DenseWeight, QuantizedWeight
from msl.stand_in import Runner
from qmm_cases import ROUNDING, random_rows, same_bits

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 40, 72)
REAL = {"hidden": 2816, "width": 704, "top_k": 8, "group": 64, "dtype": mx.bfloat16}  # 26B-A4B
# Widths with idle lanes in the last round, and one of the demo's size: its scales are fewer than eight.
LAYERS: dict[str, Experts] = {
    "4-bit, 32": make_experts(seed=1),
    "8-bit, 64": make_experts(8, 2, 128, 192, bits=8, group=64, dtype=mx.bfloat16, seed=2),
    "4-bit, 128": make_experts(12, 3, 384, 128, group=128, dtype=mx.float16, seed=3),
    "dense": make_experts(8, 2, 72, 40, bits=None, dtype=mx.bfloat16, seed=4),
    "tiny": make_experts(4, 2, 64, 64, group=64, seed=5),
}
KERNELS = {"score", "choose", "gate_up", "down", "combine_norm"}


@pytest.mark.parametrize("name", LAYERS)
def test_stages_near_float64(metal: Runner, name: str) -> None:
    layer = LAYERS[name]
    metal.settings(check=True)
    rows = rows_for(layer, 9)
    check_scores(layer, rows)
    check_combined(layer, 3, rows.dtype)
    some = routings(9, layer.gate.shape[0], layer.top_k)
    for kind in ("any", "the same experts"):
        check_pairs(layer, rows, some[kind])


def test_real_widths_near_float64(metal: Runner) -> None:
    layer = make_experts(8, **REAL | {"top_k": 3}, seed=6)
    rows = rows_for(layer, 2)
    check_pairs(layer, rows, np.array([[6, 1, 3], [1, 3, 0]]))
    check_combined(layer, 2, mx.bfloat16)
    router = make_experts(128, **REAL | {"width": 64}, seed=7)
    check_scores(router, rows_for(router, 5))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_choice_is_that_of_argpartition(metal: Runner, dtype: mx.Dtype) -> None:
    """Ties at every place: the higher id is chosen, as by the stock operations that decode elsewhere."""
    metal.settings(check=True)
    scores = mx.random.randint(-6, 6, (72, 128), key=mx.random.key(8)).astype(dtype) / 2
    scales = (1 + random_rows(1, 128, seed=9)[0] / 8).astype(dtype)
    check_choice(scores, scales, 8)
    stock = mx.argpartition(scores.astype(mx.float32), kth=-8, axis=-1)[:, -8:]
    ours = choose_experts(scores, scales, 8).chosen
    assert np.array_equal(np.sort(np.array(stock)), np.array(mx.sort(ours)))


def test_choice_of_scores_that_are_no_numbers(metal: Runner) -> None:
    """Whatever a broken model gives, ids are of experts that exist; zeros of both signs are equal."""
    metal.settings(check=True)
    scores = np.array(random_rows(6, 16, seed=10))
    scores[0, [3, 5]] = np.nan
    scores[1] = np.nan
    scores[2] = -np.inf
    scores[3, 4] = np.inf
    scores[4] = np.where(np.arange(16) % 2, 0.0, -0.0)
    scores[5, 2:] = -np.inf
    check_choice(mx.array(scores), mx.ones(16), 4)
    check_choice(-mx.array(scores), mx.ones(16), 4)


@pytest.mark.parametrize(("number", "top_k"), [(16, 4), (128, 8), (4, 2), (40, 1)])
def test_pairs_are_sorted_stably(metal: Runner, number: int, top_k: int) -> None:
    metal.settings(check=True)
    for rows in (1, 5, 40):
        for ids in routings(rows, number, top_k).values():
            check_sorted(routing_of(ids, number, mx.float32), ids)


@pytest.mark.parametrize(("name", "most"), [("4-bit, 32", 72), ("8-bit, 64", 17), ("dense", 17)])
def test_bits_do_not_depend_on_rows_or_place(metal: Runner, name: str, most: int) -> None:
    layer = LAYERS[name]
    x = rows_for(layer, most)
    expected = rows_alone(lambda row: mix(layer, row), x)
    for rows in ROWS[: ROWS.index(most) + 1]:
        assert same_bits(mix(layer, x[:rows]), expected[:rows]), rows
    places = mx.random.permutation(most, key=mx.random.key(11))
    assert same_bits(mix(layer, x[places]), expected[places])


def test_bits_of_a_pair_do_not_depend_on_who_shares_its_expert(metal: Runner) -> None:
    layer = LAYERS["4-bit, 32"]
    x, every = rows_for(layer, 40), np.arange(16)[None]
    alone = mx.stack([pairs_of(layer, x[row : row + 1], every) for row in range(40)])
    for rows in (1, 2, 6, 7, 12, 13, 40):
        for name, ids in routings(rows, 16, 4).items():
            expected = alone[mx.arange(rows)[:, None], mx.array(ids)].reshape(rows * 4, -1)
            assert same_bits(pairs_of(layer, x[:rows], ids), expected), (rows, name)


def pairs_of(layer: Experts, x: mx.array, ids: Ids) -> mx.array:
    routing = routing_of(ids, layer.gate.shape[0], x.dtype)
    return down_pairs(layer, gate_up_pairs(layer, x, routing), routing)


def test_bits_do_not_depend_on_the_order_threads_run_in(metal: Runner) -> None:
    layer = LAYERS["4-bit, 32"]
    x = rows_for(layer, 17)
    x = mx.concatenate([x, mx.broadcast_to(x[:1], (14, x.shape[1]))])  # runs of more than a tile
    expected = mix(layer, x)
    for order, seed in [("forward", 0), ("reverse", 0), *(("random", seed) for seed in range(3))]:
        with metal.run(order=order, seed=seed, check=True):
            assert same_bits(mix(layer, x), expected), (order, seed)


def test_many_rows_go_in_parts(metal: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LAYERS["tiny"]
    x, weights = rows_for(layer, 9), mx.ones((9, 2))
    ids = mx.array(routings(9, 4, 2)["any"].astype(np.uint32))
    whole, summed = mix(layer, x), sum_experts(layer, x, ids, weights)
    monkeypatch.setattr(module, "MAX_PAIRS", 8)
    metal.reset()
    assert same_bits(mix(layer, x), whole) and same_bits(sum_experts(layer, x, ids, weights), summed)
    assert metal.counts["verify_experts_choose"].launches == metal.counts["verify_experts_sort"].launches == 3


@pytest.mark.parametrize("name", ["4-bit, 32", "8-bit, 64", "dense"])
def test_each_expert_in_use_is_read_once(metal: Runner, name: str) -> None:
    layer = LAYERS[name]
    number = layer.gate.shape[0]
    metal.settings(count=True)
    for rows in (1, 5, 12, 40):
        for ids in [routings(rows, number, layer.top_k)[kind] for kind in ("any", "the same experts")]:
            metal.reset()
            pairs_of(layer, rows_for(layer, rows), ids)
            for kernel, matrix in (("gate_up", "gate"), ("gate_up", "up"), ("down", "down")):
                assert_read_once(metal, kernel, matrix, getattr(layer, matrix), len(np.unique(ids)))


def assert_read_once(metal: Runner, kernel: str, matrix: str, weight: Any, used: int) -> None:
    """Lanes that share a group's scale ask for it one by one; no two threadgroups do."""
    read = metal.counts[f"verify_experts_{kernel}"].read
    number = weight.shape[0]
    if isinstance(weight, DenseWeight):
        values = read[f"{matrix}_values"]
        assert values.requested == values.distinct == used * weight.weight.nbytes // number
        return
    words = read[f"{matrix}_words"]
    assert words.requested == words.distinct == used * weight.weight.nbytes // number
    for part in ("scales", "biases"):
        traffic = read[f"{matrix}_{part}"]
        assert traffic.by_threadgroup == traffic.distinct == used * getattr(weight, part).nbytes // number
        assert traffic.requested == traffic.distinct * weight.group_size // 8


def test_unused_experts_may_hold_anything(metal: Runner) -> None:
    layer = LAYERS["4-bit, 32"]
    x = rows_for(layer, 5)
    expected = mix(layer, x)
    used = np.unique(np.array(route_rows(layer, x, EPS)[1].chosen))
    assert 0 < len(used) < 16
    unused = mx.array(~np.isin(np.arange(16), used))[:, None, None]

    def poisoned(weight: Any) -> QuantizedWeight:
        parts = (mx.where(unused, mx.nan, part) for part in (weight.scales, weight.biases))
        return QuantizedWeight(weight.weight, *parts, weight.group_size, weight.bits, "affine", weight.dtype)

    names = ("gate", "up", "down")
    broken = replace(layer, **{name: poisoned(getattr(layer, name)) for name in names})
    assert same_bits(mix(broken, x), expected)


def test_nan_stays_with_its_row(metal: Runner) -> None:
    layer = LAYERS["4-bit, 32"]
    x = rows_for(layer, 5)
    broken = mx.where((mx.arange(5) == 2)[:, None], mx.nan, x)
    y = mix(layer, broken)
    others = mx.array([0, 1, 3, 4])
    assert mx.isnan(y[2]).all() and same_bits(y[others], mix(layer, x)[others])


@pytest.mark.parametrize("name", LAYERS)
def test_near_the_reference_and_stock_operations(metal: Runner, name: str) -> None:
    layer = LAYERS[name]
    x = rows_for(layer, 6)
    y, expected = mix(layer, x), reference(layer, x, EPS, stock_product)
    assert_close(y, expected, 4)
    if x.dtype == mx.float32:  # in low precision MLX's products on a CPU lose too much
        assert_close(y, mixture(layer, x, EPS, stock_product), 32)
    ids = mx.array(routings(6, layer.gate.shape[0], layer.top_k)["any"].astype(np.uint32))
    weights = (1 + random_rows(*ids.shape, seed=12)).astype(x.dtype)
    rows = mx.fast.rms_norm(x, layer.pre_norm, EPS)
    assert_close(sum_experts(layer, rows, ids, weights), reference_sum(layer, rows, ids, weights), 4)


def assert_close(y: mx.array, expected: mx.array, roundings: int) -> None:
    off = np.abs(float64(y) - float64(expected)).max()
    assert off <= roundings * (ROUNDING[y.dtype] + 1e-7) * np.abs(float64(expected)).max(), off


def test_source_and_limits(metal: Runner) -> None:
    for name in ("tiny", "dense"):
        mix(LAYERS[name], rows_for(LAYERS[name], 17))
    assert {launch.kernel.removeprefix("verify_experts_") for launch in metal.launches} == KERNELS
    for kernel in KERNELS:
        assert metal.lint(f"verify_experts_{kernel}") == []
        assert metal.accumulators(f"verify_experts_{kernel}") <= 24


Launched = dict[str, tuple[int, int]]


def planned(experts: Experts, rows: int, monkeypatch: pytest.MonkeyPatch) -> Launched:
    """Threadgroups and threads of each launch of the block, none of them run."""
    launched: Launched = {}

    def recorder(*, name: str, **_: Any) -> Any:
        def launch(
            *, grid: Any, threadgroup: Any, output_shapes: Any, output_dtypes: Any, **_: Any
        ) -> list[mx.array]:
            groups = [size // threads for size, threads in zip(grid, threadgroup, strict=True)]
            launched[name.removeprefix("verify_experts_")] = (int(np.prod(groups)), int(np.prod(threadgroup)))
            return [mx.zeros(*out) for out in zip(output_shapes, output_dtypes, strict=True)]

        return launch

    monkeypatch.setattr(mx.fast, "metal_kernel", recorder)
    mix(experts, mx.zeros((rows, experts.gate.shape[-1]), experts.pre_norm.dtype))
    return launched


def real_layer(bits: int) -> Experts:
    """26B-A4B's 128 experts; nothing of it is ever in memory."""

    def matrix(*shape: int, bits: int) -> QuantizedWeight:
        words = mx.zeros((*shape[:-1], shape[-1] * bits // 32), mx.uint32)
        scales = mx.zeros((*shape[:-1], shape[-1] // 64), mx.bfloat16)
        return QuantizedWeight(words, scales, scales, 64, bits, "affine", mx.bfloat16)

    gain = mx.ones(2816, mx.bfloat16)
    gate, down = matrix(128, 704, 2816, bits=bits), matrix(128, 2816, 704, bits=bits)
    scale = mx.ones(128, mx.bfloat16)
    return Experts(matrix(128, 2816, bits=8), gain, scale, gate, gate, down, 8, gain, gain, gain)


@pytest.mark.parametrize("bits", [4, 8])
def test_no_fewer_threadgroups_than_stock_with_one_row(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    """Stock's products make 8 columns a threadgroup; the router's norm and the choice have one a row."""
    stock = {
        "score": 128 // 8,
        "gate_up": 704 // 8 * 8,
        "down": 2816 // 8 * 8,
        "choose": 1,
        "combine_norm": 1,
    }
    layer = real_layer(bits)
    for rows in (1, 5, 72):
        launched = planned(layer, rows, monkeypatch)
        assert len(launched) == 5
        for name, (groups, threads) in launched.items():
            assert groups >= stock[name] and threads <= 512, (rows, name)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another mode": ({"mode": "mxfp4"}, "4-bit mxfp4 in groups of 32 has no kernel"),
    "6 bits": ({"bits": 6}, "6-bit affine in groups of 32 has no kernel"),
    "scales of another type": (
        {"scales": mx.zeros((16, 96, 10), mx.int32)},
        "scales of mlx.core.int32 for 320 values",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_formats_without_a_kernel_are_refused(metal: Runner, name: str) -> None:
    change, reason = REFUSED[name]
    layer = LAYERS["4-bit, 32"]
    assert isinstance(layer.gate, QuantizedWeight)
    assert_refused(replace(layer, gate=replace(layer.gate, **change)), rows_for(layer, 2), f"gate: {reason}")


def test_layers_and_rows_without_a_kernel_are_refused(metal: Runner) -> None:
    layer = LAYERS["4-bit, 32"]
    x = rows_for(layer, 2)
    mixed = replace(layer, up=make_experts(bits=8).up)
    assert_refused(mixed, x, "gate and up are stored in different formats")
    assert_refused(replace(layer, top_k=17), x, "the best 17 of 16 experts have no kernel")
    assert_refused(make_experts(6, 2), x, "the best 2 of 6 experts have no kernel")
    assert_refused(layer, x.astype(mx.bfloat16), "rows of mlx.core.bfloat16 with norms of mlx.core.float32")
    assert_refused(layer, x.astype(mx.int32), "rows of mlx.core.int32")
    assert_refused(make_experts(4, 2, 36, 40, bits=None), x, "router: a matrix of 4 x 36 has sides")
    assert unsupported(layer, x.dtype) is None
    for rows in (x[:0], x[:, :64], x[None]):
        with pytest.raises(KernelError, match="rows must be at least one of 320 values, got"):
            mix(layer, rows)
    assert metal.launches == []


def assert_refused(layer: Experts, x: mx.array, reason: str) -> None:
    said = unsupported(layer, x.dtype)
    assert said is not None and reason in said
    with pytest.raises(KernelError) as refused:
        mix(layer, x)
    assert str(refused.value) == f"verify_experts: {said}; take stock operations"
