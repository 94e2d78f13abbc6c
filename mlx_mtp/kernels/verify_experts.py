"""The MoE block of a verify pass in five launches, each expert in use read once (metal/verify_experts.metal).

A pair is (row, one of its chosen experts). Router and choice also sort the pairs by expert, on the device; nothing
waits for the host. A pair's bits depend on its row and its expert alone, not on who shares the expert.
"""

import functools
import math
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from mlx_mtp.errors import KernelError
from mlx_mtp.kernels.expert_bodies import (
    CHOOSE,
    COMBINE,
    COMBINE_NORM,
    FLOATS,
    SORT,
    arrays_of,
    form_of,
    format_of,
    kept_bytes,
    run_kernel,
    score_kernel,
    unsupported_format,
)
from mlx_mtp.kernels.launch import SIMD, SMALL
from mlx_mtp.kernels.table import Project
from mlx_mtp.weights import DenseWeight, Weight

if TYPE_CHECKING:
    from mlx_mtp.layers import Experts, OnChoice

SHORT, LONG = 6, 12  # as in the Metal source: rows of a tile of 4 and of 2 columns
MAX_EXPERTS = 512  # a thread each in the sort
MAX_TOP_K = 16
MAX_PAIRS = 2048  # their ids stand in threadgroup memory; more rows go in several parts
THREADGROUP_BYTES = 32768
SCORE_SIMDGROUPS, SCORE_COLUMNS, SCORE_ROWS = 2, 2, 8  # 16 sums, 8 rows' norms
# With COLUMNS, no fewer threadgroups than stock's products with one row.
SIMDGROUPS = {"gate_up": 4, "down": 2}
COLUMNS = {"gate_up": 2, "down": 4}  # of a simdgroup; of gate and of up, two each


class Routing(NamedTuple):
    """Which experts rows go to: ids and weights [rows, top_k], and their pairs sorted.

    order: pair numbers (row * top_k + slot) by expert, then by number. runs: how many experts are in use, then expert,
    begin in `order` and length of each.
    """

    chosen: mx.array
    weights: mx.array
    order: mx.array
    runs: mx.array


def reference(
    experts: "Experts", x: mx.array, eps: float, project: Project, on_choice: "OnChoice | None" = None
) -> mx.array:
    """x [rows, H] -> [rows, H] on plain MLX: products in float32, rounded where the kernels round.

    Where scores are equal the higher ids are chosen and slots ascend, as mx.argpartition has it.
    """
    rows = mx.fast.rms_norm(x, experts.router_norm, eps)
    scores = _product(experts.router, rows[:, None, None], None)[:, 0, 0].astype(x.dtype).astype(mx.float32)
    chosen = mx.argsort(scores, axis=-1)[:, -experts.top_k :]
    if on_choice is not None:
        on_choice(chosen)
    weights = mx.softmax(mx.take_along_axis(scores, chosen, axis=-1), axis=-1)
    weights = (weights * experts.per_expert_scale[chosen]).astype(x.dtype)
    combined = reference_sum(experts, mx.fast.rms_norm(x, experts.pre_norm, eps), chosen, weights)
    return mx.fast.rms_norm(combined, experts.post_norm, eps)


def reference_sum(experts: "Experts", rows: mx.array, chosen: mx.array, weights: mx.array) -> mx.array:
    """What `sum_experts` computes, on plain MLX."""
    each = rows[:, None, None]
    gate, up = _product(experts.gate, each, chosen), _product(experts.up, each, chosen)
    slope = -2 * (2 / math.pi) ** 0.5
    gated = gate / (1 + mx.exp(slope * (gate + 0.044715 * gate**3))) * up
    outputs = _product(experts.down, gated.astype(rows.dtype), chosen)[:, :, 0]
    return (outputs * weights[..., None].astype(mx.float32)).sum(-2).astype(rows.dtype)


def unsupported(experts: "Experts", dtype: mx.Dtype) -> str | None:
    """Why this layer takes stock operations for rows of `dtype`, or None where the kernels compute them."""
    number, _, hidden = experts.gate.shape
    matrices = {"router": experts.router, "gate": experts.gate, "up": experts.up, "down": experts.down}
    for name, weight in matrices.items():
        reason = unsupported_format(weight)
        if reason is not None:
            return f"{name}: {reason}"
    if format_of(experts.gate) != format_of(experts.up):
        return "gate and up are stored in different formats"
    gains = (experts.router_norm, experts.pre_norm, experts.post_norm)
    if dtype not in FLOATS or any(gain.dtype != dtype for gain in gains):
        return f"rows of {dtype} with norms of {', '.join(str(gain.dtype) for gain in gains)} have no kernel"
    if number % 4 or number > MAX_EXPERTS or not 0 < experts.top_k <= min(MAX_TOP_K, number):
        return f"the best {experts.top_k} of {number} experts have no kernel"
    if hidden * dtype.size > THREADGROUP_BYTES - 1024:
        return f"a row of {hidden} values of {dtype} does not fit into threadgroup memory"
    return None


def verify_experts(
    experts: "Experts", x: mx.array, eps: float, project: Project, on_choice: "OnChoice | None" = None
) -> mx.array:
    """x [rows, H] (the residual stream itself) -> [rows, H]: routed, weighted, summed and normed experts.

    The router's product is made here too, whatever `project` is. Raises KernelError where `unsupported` has a reason.
    """
    _refuse(unsupported(experts, x.dtype), experts, x)
    most = MAX_PAIRS // experts.top_k
    parts, chosen = [], []
    for first in range(0, x.shape[0], most):
        rows, routing = route_rows(experts, x[first : first + most], eps)
        chosen.append(routing.chosen)
        outputs = down_pairs(experts, gate_up_pairs(experts, rows, routing), routing)
        parts.append(combine_rows(outputs, routing.weights, x.dtype, (experts.post_norm, eps)))
    if on_choice is not None:
        on_choice(chosen[0] if len(chosen) == 1 else mx.concatenate(chosen))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def sum_experts(experts: "Experts", rows: mx.array, chosen: mx.array, weights: mx.array) -> mx.array:
    """Rows [rows, H] (normed) through experts chosen elsewhere -> [rows, H], their sum by weight, in four launches.

    chosen, weights [rows, top_k]; ids below the number of experts. The sum is in slot order.
    """
    _refuse(unsupported(experts, rows.dtype), experts, rows)
    most = MAX_PAIRS // experts.top_k
    parts = []
    for first in range(0, rows.shape[0], most):
        part = slice(first, first + most)
        routing = sort_chosen(chosen[part], weights[part], experts.gate.shape[0])
        outputs = down_pairs(experts, gate_up_pairs(experts, rows[part], routing), routing)
        parts.append(combine_rows(outputs, routing.weights, rows.dtype, None))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def route_rows(experts: "Experts", x: mx.array, eps: float) -> tuple[mx.array, Routing]:
    """x [rows, H] -> the rows that experts read (pre_norm) and where they go; at most MAX_PAIRS pairs; two launches."""
    scores, rows = score_rows(experts, x, eps)
    return rows, choose_experts(scores, experts.per_expert_scale, experts.top_k)


def score_rows(experts: "Experts", x: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """x [rows, H] -> the router's scores [rows, E] and the rows that experts read, both rounded to x's type."""
    rows, hidden = x.shape
    router = experts.router
    number, tile = router.shape[0], 1 if rows == 1 else SCORE_ROWS
    scores, normed = score_kernel(form_of(router))(
        [x, experts.router_norm, experts.pre_norm, *arrays_of(router), _count(rows)],
        template={
            "T": x.dtype,
            **format_of(router),
            "K": hidden,
            "ROWS": tile,
            "COLUMNS": SCORE_COLUMNS,
            "EXPERTS": number,
            "EPS": _float_bits(eps),
        },
        groups=(number // (SCORE_SIMDGROUPS * SCORE_COLUMNS), math.ceil(rows / tile), 1),
        threads=(SCORE_SIMDGROUPS * SIMD, 1, 1),
        shapes=[(rows, number), (rows, hidden)],
        dtypes=[x.dtype, x.dtype],
    )
    return scores, normed


def choose_experts(scores: mx.array, scales: mx.array, top_k: int) -> Routing:
    """scores [rows, E], the experts' own scales [E] -> the best top_k of each row, in ascending order, and sorted."""
    rows, number = scores.shape
    return Routing(
        *CHOOSE(
            [scores, scales, _count(rows)],
            template={"T": scores.dtype, "EXPERTS": number, "TOP_K": top_k, "CAPACITY": MAX_PAIRS},
            groups=(1, 1, 1),
            threads=(_sort_threads(number), 1, 1),
            shapes=[(rows, top_k), (rows, top_k), *_sorted_shapes(rows * top_k, number)],
            dtypes=[mx.uint32, scores.dtype, mx.int32, mx.int32],
        )
    )


def sort_chosen(chosen: mx.array, weights: mx.array, number: int) -> Routing:
    """chosen [rows, top_k] below `number`, at most MAX_PAIRS of them -> the same, sorted; one launch."""
    order, runs = SORT(
        [chosen, _count(chosen.size)],
        template={"CAPACITY": MAX_PAIRS},
        groups=(1, 1, 1),
        threads=(_sort_threads(number), 1, 1),
        shapes=_sorted_shapes(chosen.size, number),
        dtypes=[mx.int32, mx.int32],
    )
    return Routing(chosen, weights, order, runs)


def gate_up_pairs(experts: "Experts", rows: mx.array, routing: Routing) -> mx.array:
    """Rows [rows, H] -> each pair's gelu(gate) * up [pairs, I], rounded once."""
    return _run_launch("gate_up", (experts.gate, experts.up), rows, routing, rows.dtype)


def down_pairs(experts: "Experts", gated: mx.array, routing: Routing) -> mx.array:
    """gated [pairs, I] -> each pair's expert output [pairs, H] in float32."""
    return _run_launch("down", (experts.down,), gated, routing, mx.float32)


def _run_launch(
    name: str, matrices: tuple[Weight, ...], x: mx.array, routing: Routing, out: mx.Dtype
) -> mx.array:
    rows, top_k = routing.chosen.shape
    number, columns, depth = matrices[0].shape
    kept, simdgroups = kept_bytes(matrices[0]), SIMDGROUPS[name]
    keep = rows > LONG and kept <= THREADGROUP_BYTES
    while keep and simdgroups * kept > THREADGROUP_BYTES:
        simdgroups //= 2
    (y,) = run_kernel(name, form_of(matrices[0]))(
        [x, routing.order, routing.runs, *(array for matrix in matrices for array in arrays_of(matrix))],
        template={
            "T": x.dtype,
            **format_of(matrices[0]),
            "K": depth,
            "N": columns,
            "SLOTS": top_k,
            "TILE": 1 if rows == 1 else SHORT if rows <= SHORT else LONG,
            "KEEP": keep,
            "SIMDGROUPS": simdgroups,
        },
        groups=(columns // (simdgroups * COLUMNS[name]), min(rows * top_k, number), 1),
        threads=(simdgroups * SIMD, 1, 1),
        shapes=[(rows * top_k, columns)],
        dtypes=[out],
    )
    return y


def combine_rows(
    outputs: mx.array, weights: mx.array, dtype: mx.Dtype, norm: tuple[mx.array, float] | None
) -> mx.array:
    """Outputs [pairs, H], weights [rows, top_k] -> their sums in slot order [rows, H]; `norm`: gain, epsilon."""
    rows, top_k = weights.shape
    hidden = outputs.shape[1]
    threads = min(512, math.ceil(hidden / SIMD) * SIMD)
    template: dict[str, Any] = {"T": dtype, "N": hidden, "SLOTS": top_k, "THREADS": threads}
    inputs = [outputs, weights]
    if norm is not None:
        inputs.append(norm[0])
        template["EPS"] = _float_bits(norm[1])
    (y,) = (COMBINE if norm is None else COMBINE_NORM)(
        inputs,
        template=template,
        groups=(rows, 1, 1),
        threads=(threads, 1, 1),
        shapes=[(rows, hidden)],
        dtypes=[dtype],
    )
    return y


def _product(weight: Weight, x: mx.array, chosen: mx.array | None) -> mx.array:
    """x [rows, 1 or slots, 1, K] times the chosen experts' matrices, or one matrix -> [rows, slots, 1, N], float32."""
    x = x.astype(mx.float32)
    if isinstance(weight, DenseWeight):
        matrices = weight.weight.astype(mx.float32).swapaxes(-1, -2)
        return x @ matrices if chosen is None else mx.gather_mm(x, matrices, rhs_indices=chosen)
    assert weight.biases is not None, "affine"
    scales, biases = weight.scales.astype(mx.float32), weight.biases.astype(mx.float32)
    how: dict[str, Any] = {"transpose": True, "group_size": weight.group_size, "bits": weight.bits}
    if chosen is None:
        return mx.quantized_matmul(x, weight.weight, scales, biases, **how)
    return mx.gather_qmm(x, weight.weight, scales, biases, rhs_indices=chosen, **how)


def _refuse(reason: str | None, experts: "Experts", x: mx.array) -> None:
    if reason is None and (x.ndim != 2 or not x.shape[0] or x.shape[1] != experts.gate.shape[-1]):
        reason = f"rows must be at least one of {experts.gate.shape[-1]} values, got {tuple(x.shape)}"
    if reason is not None:
        raise KernelError(f"verify_experts: {reason}; take stock operations")


def _sorted_shapes(pairs: int, number: int) -> list[tuple[int, ...]]:
    """Of order and runs: at least 8 elements, so that tiny models' are in the same address space."""
    return [(max(pairs, SMALL),), (max(1 + 3 * min(pairs, number), SMALL),)]


def _sort_threads(number: int) -> int:
    return max(256, math.ceil(number / SIMD) * SIMD)


@functools.cache
def _count(number: int) -> mx.array:
    """Read at run time: as a template argument, every number of rows would be compiled anew."""
    return mx.array([number], mx.int32)


def _float_bits(value: float) -> int:
    """A float32 as the int that a template takes."""
    return int(struct.unpack("i", struct.pack("f", value))[0])
