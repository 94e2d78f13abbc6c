"""The promise is derived: every operation of a traced round is classified, on this CPU and on Macs as plain values.

Faults planted here, each seen: an operation without a rule, a sum over rows, other operations at one row, a constant
and noise that change with the pass, a kernel without a self-test, a kernel that is not ours, a rule taken away.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from kernel_pairs import KINDS, on_kernels, quantised_pair
from metal_graphs import traces_on_metal
from mlx_mtp import Sampling, exactness_rules
from mlx_mtp.attention import attend
from mlx_mtp.exactness import backend_of, derive
from mlx_mtp.exactness_compare import GRAPH, Compared, OpVerdict, compare, verdicts_of
from mlx_mtp.exactness_graph import Node, Value, trace_passes
from mlx_mtp.exactness_metal import Backend, qmv_batch_limit
from mlx_mtp.exactness_rules import KERNELS, RULES, Here, Measured, Setting, judge
from mlx_mtp.kernels.table import Kernels
from mlx_mtp.sampling import sampler_class
from mlx_mtp.target import Target
from pairs import VARIANTS, golden_pair

CPU = Backend("cpu")
GENERATIONS = (13, 14, 15, 16, 17)
SIZES = ("g", "s", "d")
MACS = [Backend("metal", generation, size) for generation in GENERATIONS for size in SIZES]
SETTINGS = (
    Sampling(temperature=0.0),
    Sampling(temperature=1.0, top_k=64, top_p=0.95),
    Sampling(temperature=1.0, top_p=0.9, min_p=0.1, repetition_penalty=1.2, logit_bias={3: 1.0}),
)
GEMMA = sampler_class([SETTINGS[1]])
PASSED = frozenset(KERNELS.values())


def all_equal(target: Target) -> Measured:
    """What comparisons find where nothing depends on the pass, without making them."""
    shapes = [weight.shape for layer in target.layers for weight in matrices(layer)]
    per_layer = [] if target.per_layer is None else [target.per_layer.projection.shape]
    products = {(k, n): True for n, k in (*shapes, *per_layer, target.embedding.shape)}
    dims = {target.text.head_dim: True, target.text.global_head_dim: True}
    return Measured(products, dims, masked=True, mixture=True)


def matrices(layer: Any) -> list[Any]:
    found = [
        layer.q_proj,
        layer.k_proj,
        layer.v_proj,
        layer.o_proj,
        layer.gate_proj,
        layer.up_proj,
        layer.down_proj,
    ]
    if layer.experts is not None:
        found.append(layer.experts.router)
    if layer.per_layer_input is not None:
        found += [layer.per_layer_input.gate, layer.per_layer_input.projection]
    return [weight for weight in found if weight is not None]


@functools.cache
def traced(variant: str) -> Compared:
    return compare(trace_passes(golden_pair(variant).target, GEMMA))


def not_invariant(rows: tuple[OpVerdict, ...]) -> set[str]:
    return {row.op for row in rows if row.invariant is False}


def unknown(rows: tuple[OpVerdict, ...]) -> set[str]:
    return {row.op for row in rows if row.invariant is None}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_operation_of_a_golden_round_is_classified_on_this_cpu(variant: str) -> None:
    rows = verdicts_of(traced(variant), Here(CPU, all_equal(golden_pair(variant).target)))
    assert [row for row in rows if row.invariant is not True] == []
    assert sum(row.count for row in rows) > 1000 and all(row.reason for row in rows)


def test_every_way_to_choose_tokens_is_classified_on_this_cpu() -> None:
    target = golden_pair("a4b").target
    found = derive(target, Here(CPU, all_equal(target)), SETTINGS)
    assert found.why_not() == []
    assert (found.promise, found.holds) == ("a", True)
    assert {"Scan", "ArgSort", "FloorDivide", "Log1p"} <= {row.op for row in found.rows}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_operation_is_classified_on_every_mac_and_stock_products_break_the_promise(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = golden_pair(variant).target
    for traces in (traced(variant), traces_on_metal(target, GEMMA, monkeypatch)):
        for mac in MACS:
            rows = verdicts_of(traces, Here(mac))
            assert unknown(rows) == set(), mac
            assert {"Matmul", "Softmax"} <= not_invariant(rows)
            assert not {"GatherMM", "RMSNorm", "ArgPartition", "Gather", "Exp"} & not_invariant(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_with_every_kernel_of_ours_the_promise_holds_on_every_mac(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces = traces_on_metal(on_kernels(quantised_pair(kind)).target, GEMMA, monkeypatch)
    for mac in MACS:
        rows = verdicts_of(traces, Here(mac, passed=PASSED))
        assert [row for row in rows if row.invariant is not True] == []
        assert any(row.op == "CustomKernel" for row in rows)
    for operation in sorted(PASSED - {"experts"} if kind != "a4b" else PASSED):
        rows = verdicts_of(traces, Here(MACS[0], passed=PASSED - {operation}))
        assert unknown(rows) == {"CustomKernel"}, operation
    failed = verdicts_of(traces, Here(MACS[0], Measured(attention={256: True, 512: False}), PASSED))
    assert not_invariant(failed) == {"CustomKernel"}


@pytest.mark.parametrize("kind", KINDS)
def test_stock_operations_on_packed_weights(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sliding attention is fused for few rows and spelt out for more: that alone breaks the promise."""
    traces = traces_on_metal(quantised_pair(kind).target, GEMMA, monkeypatch)
    rows = verdicts_of(traces, Here(Backend("metal", 17, "g")))
    assert unknown(rows) == set()
    assert not_invariant(rows) == {"QuantizedMatmul", "Matmul", "Softmax", GRAPH}
    assert all("ScaledDotProductAttention more" in row.reason for row in rows if row.op == GRAPH)
    assert "ScaledDotProductAttention" in not_invariant(verdicts_of(traces, Here(Backend("metal", 15, "d"))))


def test_another_mlx_is_not_known() -> None:
    rows = verdicts_of(traced("a4b"), Here(Backend("metal", 16, "s", (0, 33))))
    assert {"Matmul", "GatherMM", "Softmax"} <= unknown(rows)
    assert "this is 0.33" in next(row.reason for row in rows if row.op == "GatherMM")


def test_without_comparisons_a_cpu_is_not_known() -> None:
    assert unknown(verdicts_of(traced("e2b"), Here(CPU))) == {"Matmul", "Softmax"}


LIMITS = {  # kernels.md 1.1: first number of rows of a GEMM for K, N up to 2048, up to 4096, larger
    (13, "g"): (14, 10, 6),
    (14, "s"): (14, 10, 6),
    (13, "d"): (32, 18, 12),
    (15, "d"): (32, 18, 12),
    (15, "s"): (13, 15, 13),
    (16, "g"): (13, 15, 13),
    (17, "s"): (33, 25, 13),
}


@pytest.mark.parametrize(("chip", "limits"), LIMITS.items())
def test_quantised_products_by_generation(chip: tuple[int, str], limits: tuple[int, ...]) -> None:
    backend = Backend("metal", *chip)
    sizes = ((1536, 2048), (2816, 4096), (5376, 21504))
    assert tuple(qmv_batch_limit(*size, backend) for size in sizes) == limits
    affine, other = (reason_of(product(mode), backend) for mode in (0, 1))
    assert other.startswith("qmv for one row, qmv_wide")
    assert (
        affine == other
        if chip[0] >= 15
        else affine == f"alike up to {limits[1] - 1} rows, a GEMM from {limits[1]} rows on"
    )


def product(mode: int) -> Node:
    x, y = Value("x", (5, 2816), mx.bfloat16), Value("y", (5, 4096), mx.bfloat16)
    return Node("QuantizedMatmul", (64, 4, mode, True), (x,), (y,))


def reason_of(node: Node, backend: Backend) -> str:
    invariant, reason = judge(node, Setting(Here(backend)))
    assert invariant is False
    return reason


def test_chips_by_the_names_of_their_architectures() -> None:
    assert backend_of("applegpu_g13s") == Backend("metal", 13, "s")
    assert backend_of("applegpu_g17p", (0, 32, 4)) == Backend("metal", 17, "p", (0, 32, 4))
    assert backend_of("paravirtual") == Backend("metal")
    assert str(backend_of("applegpu_g14d")) == "Metal generation 14d, MLX 0.32"
    assert judge(product(0), Setting(Here(Backend("metal"))))[0] is False


Project = Callable[[Any, mx.array], mx.array]
FAULTS: dict[str, tuple[Project, str, str]] = {
    "an operation without a rule": (lambda w, x: mx.hadamard_transform(w.project(x)), "Hadamard", "no rule"),
    "a sum over rows": (
        lambda w, x: w.project(x) - w.project(x).sum(axis=-2, keepdims=True),
        "Reduce",
        "adds up values of several rows",
    ),
    "a product of rows": (
        lambda w, x: (x @ x.swapaxes(-1, -2)) @ w.project(x),
        "Matmul",
        "none of attention's",
    ),
    "other operations at one row": (
        lambda w, x: w.project(x) if x.shape[-2] == 1 else mx.exp(mx.log(w.project(x))),
        GRAPH,
        "at 1 row than at 5 rows",
    ),
    "a constant of the pass": (
        lambda w, x: w.project(x) * mx.array(1 + x.shape[-2] / 1e3),
        "Broadcast",
        "changes with rows",
    ),
    "noise of the pass": (
        lambda w, x: w.project(x) + mx.random.normal(w.shape[:1], key=mx.random.key(x.shape[-2])),
        "RandomBits",
        "changes with rows",
    ),
    "noise for every row": (
        lambda w, x: w.project(x) + mx.random.normal((*x.shape[:-1], w.shape[0]), key=mx.random.key(1)),
        "RandomBits",
        "shape changes with batch, rows",
    ),
    "a kernel that is not ours": (
        lambda w, x: foreign(
            inputs=[w.project(x)], **ONE_THREAD, output_shapes=[(*x.shape[:-1], w.shape[0])]
        )[0],
        "CustomKernel",
        "not ours",
    ),
}
ONE_THREAD = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1), "output_dtypes": [mx.float32]}
foreign = mx.fast.metal_kernel(
    name="verify_other", input_names=["x"], output_names=["y"], source="y[0] = x[0];"
)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_operations_are_named(fault: str) -> None:
    project, op, said = FAULTS[fault]
    target = golden_pair("31b").target
    here = Here(CPU, all_equal(target))
    found = derive(replace(target, kernels=Kernels(project=project)), here)
    assert (found.promise, found.holds) == ("b", False)
    against = [row for row in (*found.breaking, *found.unknown) if row.op == op and said in row.reason]
    assert against, found.why_not()
    assert any(said in line for line in found.why_not())


def test_noise_of_the_bucket_is_named() -> None:
    def noisy(queries: mx.array, keys: mx.array, values: mx.array, sight: Any) -> mx.array:
        return attend(queries, keys, values, sight) * mx.array(1 + sight.bucket / 1e6)

    target = golden_pair("31b").target
    found = derive(replace(target, kernels=Kernels(attend=noisy)), Here(CPU, all_equal(target)))
    assert {row.reason for row in found.breaking} == {"a constant that changes with bucket"}


def test_a_rule_that_is_missing_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in ("Exp", "ScatterAxis", "Softmax", "Gather"):
        with monkeypatch.context() as inside:
            inside.setattr(exactness_rules, "RULES", {**RULES})
            del exactness_rules.RULES[op]
            assert op in unknown(verdicts_of(traced("e2b"), Here(CPU)))


@pytest.mark.parametrize(
    ("op", "kinds"), [("ScatterAxis", (0, 1)), ("Scatter", (2, 4)), ("SliceUpdate", (2, 4))]
)
def test_adding_into_place_is_not_putting_there(op: str, kinds: tuple[int, int]) -> None:
    value = Value("x", (1, 2, 48, 16), mx.float32)
    answers = [judge(Node(op, (kind, 2), (value,), (value,)), Setting(Here(CPU)))[0] for kind in kinds]
    assert answers == [False, True]
