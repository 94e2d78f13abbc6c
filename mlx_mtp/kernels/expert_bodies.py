"""The kernel bodies behind verify_experts.py: threadgroup memory and calls, for affine and for dense weights."""

import functools
from typing import NamedTuple

import mlx.core as mx

from mlx_mtp.kernels.launch import Kernel
from mlx_mtp.weights import DenseWeight, QuantizedWeight, Weight

FLOATS = (mx.float16, mx.bfloat16, mx.float32)
BITS = (4, 8)
GROUPS = (32, 64, 128)
WORD = 8  # K is cut into words of eight, and N is a multiple of it

FILES = (
    "skinny.metal",
    "verify_qmm.metal",
    "expert_rows.metal",
    "verify_experts.metal",
    "verify_router.metal",
)
PLACE = """
    const uint lane = thread_index_in_simdgroup;
    const uint simd = simdgroup_index_in_threadgroup;
"""


class Form(NamedTuple):
    """How a matrix comes in: names of its arrays after its own, their Metal type, and what makes one of them."""

    arrays: tuple[str, ...]
    matrix: str
    made: str

    def inputs(self, *matrices: str) -> tuple[str, ...]:
        return tuple(f"{matrix}_{array}" for matrix in matrices for array in self.arrays)

    def indexed(self, *matrices: str) -> tuple[str, ...]:
        """Inputs that may be small."""
        return tuple(name for name in self.inputs(*matrices) if name.endswith(("_scales", "_biases")))

    def make(self, *matrices: str) -> str:
        """The type W and a constant for each matrix."""
        constants = "".join(f"    const W {name} = {self.made.format(name)};\n" for name in matrices)
        return f"    typedef {self.matrix.format(matrices[0])} W;\n{constants}"


AFFINE = Form(
    ("words", "scales", "biases"),
    "AffineRows<decltype({0}_scales), BITS, GROUP, K>",
    "{{{{{0}_words}}, {0}_scales, {0}_biases}}",
)
DENSE = Form(("values",), "DenseRows<S, K>", "{{{0}_values}}")

RUN = """
    threadgroup typename W::Kept words[KEEP ? SIMDGROUPS * (WIDE / 2) * W::WORDS * W::KEPT_A_WORD : 1];
    threadgroup float2 affine[KEEP ? SIMDGROUPS * (WIDE / 2) * W::WORDS / W::WORDS_A_GROUP : 1];
    const uint kept = KEEP ? simd * (WIDE / 2) * W::WORDS : 0;
    const Run run = find_run(runs, threadgroup_position_in_grid.y);
"""
PAIRS = {
    "gate_up": """
    const uint own = (threadgroup_position_in_grid.x * SIMDGROUPS + simd) * (WIDE / 2);
    GateAndUp<W> columns = {gate, up, run.expert * N + own};
    const GatedPairs<T, N, SLOTS> pairs = {x, order, y, run.expert * N};
""",
    "down": """
    const uint own = (threadgroup_position_in_grid.x * SIMDGROUPS + simd) * WIDE;
    OneMatrix<W> columns = {down, run.expert * N + own};
    const DownPairs<T, N> pairs = {x, order, y, run.expert * N};
""",
}
MATRICES = {"gate_up": ("gate", "up"), "down": ("down",)}
CHOOSE_ROWS = """
    for (uint row = simd; row < uint(count[0]); row += simdgroups_per_threadgroup) {
      const uint first = row * TOP_K;
      choose_row<T, EXPERTS, TOP_K>(
          scores + row * EXPERTS, expert_scales, lane, ids + first, chosen + first, weights + first);
    }
    const uint pairs = count[0] * TOP_K;
"""
COPY_CHOSEN = """
    const uint pairs = count[0];
    for (uint pair = thread_index_in_threadgroup; pair < pairs; pair += threads_per_threadgroup.x) {
      ids[pair] = ushort(chosen[pair]);
    }
"""
SORT_PAIRS = """
    threadgroup_barrier(mem_flags::mem_threadgroup);
    sort_pairs(
        ids, pairs, in_use, order, runs, thread_index_in_threadgroup, simdgroups_per_threadgroup, lane, simd);
"""
SORTED = """
    threadgroup ushort ids[CAPACITY];
    threadgroup uint in_use[16];
"""
COMBINE_ROWS = """
    threadgroup T combined[N];
    const uint row = threadgroup_position_in_grid.x;
    const uint thread_index = thread_index_in_threadgroup;
    combine_row<T, N, SLOTS, THREADS>(outputs, weights, row, thread_index, combined);
"""


@functools.cache
def score_kernel(form: Form) -> Kernel:
    """Router scores, and the rows that experts read."""
    return Kernel(
        name="verify_experts_score",
        files=FILES,
        inputs=("x", "router_gain", "experts_gain", *form.inputs("router"), "count"),
        outputs=("scores", "normed_rows"),
        body=PLACE
        + form.make("router")
        + """
    const uint first = threadgroup_position_in_grid.y * ROWS;
    score_rows<T, ROWS, COLUMNS, K, EXPERTS>(
        router, x, router_gain, experts_gain, as_type<float>(EPS), first, min(uint(ROWS), uint(count[0]) - first),
        scores, normed_rows, threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simd,
        threadgroups_per_grid.x * simdgroups_per_threadgroup, lane);
""",
        indexed=(*form.indexed("router"), "count"),
    )


@functools.cache
def run_kernel(name: str, form: Form) -> Kernel:
    """`gate_up` or `down` over the runs of sorted pairs."""
    return Kernel(
        name=f"verify_experts_{name}",
        files=FILES,
        inputs=("x", "order", "runs", *form.inputs(*MATRICES[name])),
        outputs=("y",),
        body=PLACE
        + form.make(*MATRICES[name])
        + RUN
        + PAIRS[name]
        + """
    run_pairs<T, TILE, KEEP>(
        columns, pairs, run.begin, run.end, words + kept * W::KEPT_A_WORD, affine + kept / W::WORDS_A_GROUP,
        lane);
""",
        indexed=form.indexed(*MATRICES[name]),
    )


# Of tiny models, scores and weights of a row are fewer than 8: the functions take them in any address space.
CHOOSE = Kernel(
    name="verify_experts_choose",
    files=FILES,
    inputs=("scores", "expert_scales", "count"),
    outputs=("chosen", "weights", "order", "runs"),
    body=PLACE + SORTED + CHOOSE_ROWS + SORT_PAIRS,
    indexed=("scores", "expert_scales", "count"),
)
SORT = Kernel(
    name="verify_experts_sort",
    files=FILES,
    inputs=("chosen", "count"),
    outputs=("order", "runs"),
    body=PLACE + SORTED + COPY_CHOSEN + SORT_PAIRS,
    indexed=("chosen", "count"),
)
COMBINE = Kernel(
    name="verify_experts_combine",
    files=FILES,
    inputs=("outputs", "weights"),
    outputs=("y",),
    body=COMBINE_ROWS
    + """
    for (uint n = thread_index; n < uint(N); n += THREADS) {
      y[row * N + n] = combined[n];
    }
""",
    indexed=("weights",),
)
COMBINE_NORM = Kernel(
    name="verify_experts_combine_norm",
    files=FILES,
    inputs=("outputs", "weights", "gain"),
    outputs=("y",),
    body=PLACE
    + """
    threadgroup float partial[THREADS / 32];
"""
    + COMBINE_ROWS
    + """
    norm_row<T, N, THREADS>(combined, gain, as_type<float>(EPS), partial, y + row * N, thread_index, lane, simd);
""",
    indexed=("weights",),
)


def unsupported_format(weight: Weight) -> str | None:
    """Why the kernels cannot read a router's matrix or a stack of experts', or None where they can."""
    columns, depth = weight.shape[-2:]
    if isinstance(weight, QuantizedWeight):
        if weight.mode != "affine" or weight.bits not in BITS or weight.group_size not in GROUPS:
            return f"{weight.bits}-bit {weight.mode} in groups of {weight.group_size} has no kernel"
        if weight.scales.dtype not in FLOATS or depth % weight.group_size:
            return f"scales of {weight.scales.dtype} for {depth} values in groups of {weight.group_size} have no kernel"
    elif weight.dtype not in FLOATS:
        return f"weights of {weight.dtype} have no kernel"
    if depth % WORD or (weight.weight.ndim == 3 and columns % WORD):
        return f"a matrix of {columns} x {depth} has sides that are no multiples of {WORD}"
    return None


def form_of(weight: Weight) -> Form:
    """Affine or dense."""
    return DENSE if isinstance(weight, DenseWeight) else AFFINE


def arrays_of(weight: Weight) -> list[mx.array]:
    """In the order of its form's names."""
    return [weight.weight] if isinstance(weight, DenseWeight) else weight.arrays


def format_of(weight: Weight) -> dict[str, int | mx.Dtype]:
    """The template arguments that say how a matrix is stored."""
    if isinstance(weight, DenseWeight):
        return {"S": weight.dtype}
    return {"BITS": weight.bits, "GROUP": weight.group_size}


def kept_bytes(weight: Weight) -> int:
    """Threadgroup memory in which a simdgroup keeps two columns, scales and biases in float32."""
    depth = weight.shape[-1]
    if isinstance(weight, DenseWeight):
        return 2 * (depth * weight.dtype.size + 8)
    return 2 * (depth * weight.bits // 8 + depth // weight.group_size * 8)
