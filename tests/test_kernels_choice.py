"""Which operations our kernels compute, and the reason why stock MLX computes the others."""

import functools
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

import test_structure
from kernel_pairs import KINDS, chosen, on_kernels, quantised_pair
from mlx_mtp import generate
from mlx_mtp.errors import KernelError
from mlx_mtp.kernels import centroid_head, chooser, dispatch, head_choose, source
from mlx_mtp.kernels.chooser import NO_METAL, UNTESTED, Choice, Verdict, choose_kernels
from mlx_mtp.kernels.launch import Kernel
from mlx_mtp.kernels.operations import Clustered, Operation, Projected, operation_of, operations_of
from mlx_mtp.kernels.table import STOCK
from mlx_mtp.pair import Pair
from mlx_mtp.state import State, new_kv
from mlx_mtp.target import logits_of
from mlx_mtp.verify import verify
from mlx_mtp.weights import DenseWeight, Weight
from pairs import golden_pair

PASSED = Verdict(True, "equal, and 1.9x as fast at 4 rows")

pair_of = functools.cache(quantised_pair)


def choose(pair: Pair, verdicts: dict[Operation, Verdict], *, has_metal: bool = True) -> Choice:
    return choose_kernels(pair.target, pair.drafter, has_metal=has_metal, verdicts=verdicts)


def reasons(choice: Choice) -> dict[str, set[str]]:
    """By what computes: the reasons."""
    found: dict[str, set[str]] = {}
    for row in choice.rows:
        found.setdefault(row.by, set()).add(row.reason)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_without_metal_everything_is_stock_whatever_was_measured_elsewhere(kind: str) -> None:
    pair = pair_of(kind)
    choice = choose(pair, dict.fromkeys(operations_of(pair.target, pair.drafter), PASSED), has_metal=False)
    assert (choice.kernels, choice.prefill_kernels) == (STOCK, STOCK)
    assert reasons(choice) == {"stock": {NO_METAL}}


def test_what_was_not_tested_on_this_chip_is_stock() -> None:
    choice = choose(pair_of("a4b"), {})
    assert choice.kernels == STOCK
    assert reasons(choice) == {"stock": {UNTESTED}}


def test_a_kernel_that_failed_or_lost_is_not_used_and_says_so() -> None:
    pair = pair_of("31b")
    operations = list(operations_of(pair.target, pair.drafter))
    verdicts = dict.fromkeys(operations, PASSED)
    verdicts[operations[0]] = Verdict(False, "slower at 1 row")
    rows = {row.operation: row for row in choose(pair, verdicts).rows}
    assert (rows[operations[0]].by, rows[operations[0]].reason) == ("stock", "slower at 1 row")
    assert {row.by for operation, row in rows.items() if operation != operations[0]} == {"ours"}


def test_what_no_kernel_supports_is_stock_and_says_why() -> None:
    """5 bits, as one of the formats MLX has and verify_qmm has not."""
    pair = pair_of("31b")
    weight = mx.random.normal((320, 192), key=mx.random.key(3))
    packed = mx.quantize(weight, group_size=64, bits=5)
    layer = pair.target.layers[0]
    odd = replace(layer.down_proj, weight=packed[0], scales=packed[1], biases=packed[2], bits=5)
    target = replace(pair.target, layers=(replace(layer, down_proj=odd), *pair.target.layers[1:]))
    choice = choose(replace(pair, target=target), {})
    [row] = [row for row in choice.rows if row.operation.format.startswith("5-bit")]
    assert row.by == "stock" and row.reason not in (NO_METAL, UNTESTED) and "5" in row.reason


def test_clusters_with_fewer_tokens_than_a_row_may_draw_from_are_chosen_from_by_stock() -> None:
    """Otherwise a greedy reply would run and a drawn one meet the kernel's refusal."""
    pair = pair_of("e2b")
    assert pair.drafter is not None and pair.drafter.centroid_head is not None
    head = replace(pair.drafter.centroid_head, top_k=4)  # of 8 tokens each
    choice = chosen(replace(pair, drafter=replace(pair.drafter, centroid_head=head)))
    [row] = [row for row in choice.rows if row.operation.name == "centroid_choose"]
    assert row.by == "stock" and "64" in row.reason
    assert choice.drafter_kernels.centroid_choose is None


def test_a_prefill_multiplies_by_stock_operations() -> None:
    """A chunk has hundreds of rows: products made for a few would read the weights over and over."""
    prefill, of_rounds = chosen(pair_of("a4b")).prefill_kernels, chosen(pair_of("a4b")).kernels
    assert (prefill.project, prefill.experts) == (STOCK.project, STOCK.experts)
    assert prefill.attend_tiled != STOCK.attend_tiled
    assert of_rounds.project != STOCK.project and of_rounds.experts != STOCK.experts


@pytest.mark.parametrize("kind", KINDS)
def test_every_operation_of_a_round_is_in_the_table(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call that a prefill and a round make through `kernels` finds its row: nothing is stock by oversight."""
    asked: set[Operation] = set()

    def noted(name: str, subject: Any) -> Operation:
        asked.add(operation_of(name, subject))
        return operation_of(name, subject)

    def head(weight: Weight, cap: float | None, hidden: mx.array, *rest: Any) -> Any:
        noted("head_choose", Projected(weight, hidden.dtype))
        return head_choose.reference(weight, cap, hidden, *rest)

    def clusters(centroids: Any, members: mx.array, top_k: int, table: Any, row: mx.array, *rest: Any) -> Any:
        noted("centroid_choose", Clustered(centroids, members, top_k, table, row.dtype))
        return centroid_head.reference(centroids, members, top_k, table, row, *rest)

    own = {"head_choose": head, "centroid_choose": clusters}
    references = {
        key: family._replace(kernel=own.get(key[0], family.reference))
        for key, family in chooser.FAMILIES.items()
    }
    monkeypatch.setattr(chooser, "FAMILIES", references)
    monkeypatch.setattr(dispatch, "operation_of", noted)
    pair = on_kernels(pair_of(kind))
    generate(pair, list(range(3, 24)), max_tokens=4, num_draft_tokens=2)
    table = {row.operation for row in pair.kernel_table if row.by == "ours"}
    assert asked <= table
    assert table - asked == multiplied_elsewhere(pair)


def multiplied_elsewhere(pair: Pair) -> set[Operation]:
    """Matrices that kernels for more than a product take over: routers and the drafter's head."""
    assert pair.drafter is not None
    head = pair.drafter.centroid_head
    weights = [pair.drafter.embedding if head is None else head.centroids]
    weights += [layer.experts.router for layer in pair.target.layers if layer.experts is not None]
    return {operation_of("project", Projected(weight, pair.target.dtype)) for weight in weights}


def test_arguments_that_the_race_chose_reach_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, seen = pair_of("31b"), []

    def kernel(weight: Any, x: mx.array, **how: Any) -> mx.array:
        seen.append(how)
        return weight.project(x)

    key = next(key for key in chooser.FAMILIES if key[0] == "project" and key[1] is not DenseWeight)
    families = {key: chooser.FAMILIES[key]._replace(kernel=kernel)}
    monkeypatch.setattr(chooser, "FAMILIES", families)
    verdicts = dict.fromkeys(
        operations_of(pair.target, pair.drafter), Verdict(True, "fast", {"body": "matrix"})
    )
    pair = pair.with_kernels(choose(pair, verdicts))
    tokens = mx.array([[1, 2, 3]], mx.uint32)
    kv = new_kv(pair.target, 256)
    hidden, _ = verify(pair.target, tokens, kv, mx.array([4], mx.int32), bucket=256)
    logits_of(pair.target, hidden)
    assert seen and all(how == {"body": "matrix"} for how in seen)


def test_other_kernels_leave_the_pair_as_it_was_and_trace_rounds_anew() -> None:
    pair = pair_of("e2b")
    other = pair.with_kernels(chosen(pair))
    assert pair.target.kernels == STOCK and pair.kernel_table == ()
    assert other.target.kernels != STOCK and other.drafter is not None
    assert other.drafter.kernels != STOCK and other.target.prefill_kernels != STOCK
    assert other.rounds is not pair.rounds and other.rounds.target is other.target
    assert other.rounds.compiled == pair.rounds.compiled


@pytest.mark.parametrize("pending, k", [(0, 3), (3, 3)])
def test_a_round_on_kernels_takes_each_buffer_only_to_write_it(
    pending: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the graph that MLX itself would run on Metal."""
    pair, sound = golden_pair("e2b"), test_structure.prefilled

    def on_stock(_: Pair, *rest: int) -> State:
        return sound(pair, *rest)

    monkeypatch.setattr(test_structure, "prefilled", on_stock)
    equipped = on_kernels(pair)
    assert {row.by for row in equipped.kernel_table if row.operation.name == "attend"} == {"ours"}
    consumers = test_structure.consumers_of_buffers(equipped, pending=pending, k=k)
    assert consumers == [test_structure.WRITTEN_ONLY] * len(consumers)


KERNEL = Kernel(
    "twice", (), ("x",), ("y",), "y[thread_position_in_grid.x] = 2 * x[thread_position_in_grid.x];"
)


def launched(x: mx.array, groups: int = 1, threads: int = 32) -> mx.array:
    [y] = KERNEL(
        [x],
        template={},
        groups=(groups, 1, 1),
        threads=(threads, 1, 1),
        shapes=[x.shape],
        dtypes=[x.dtype],
    )
    return y


def test_a_launch_has_whole_threadgroups(metal: Any) -> None:
    x = mx.arange(64, dtype=mx.float32)
    assert mx.array_equal(launched(x, groups=2), 2 * x)
    assert (metal.launches[-1].grid, metal.launches[-1].threadgroup) == ((64, 1, 1), (32, 1, 1))


@pytest.mark.parametrize(
    "x, sizes, word",
    [
        (mx.zeros(64), {"threads": 33}, "multiple of 32"),
        (mx.zeros(64), {"threads": 544}, "at most 512"),
        (mx.zeros(64), {"groups": 0}, "at least one"),
        (mx.zeros(7), {}, "at least 8 elements"),
    ],
)
def test_launches_that_metal_would_not_run_as_meant_are_refused(x: mx.array, sizes: Any, word: str) -> None:
    with pytest.raises(KernelError, match=word) as caught:
        launched(x, **sizes)
    assert caught.value.code == "kernel" and "twice" in str(caught.value) and "; " in str(caught.value)


def test_a_body_that_makes_mlx_add_parameters_is_refused() -> None:
    with pytest.raises(KernelError, match="x_shape"):
        Kernel("trap", (), ("x",), ("y",), "int n = max_shape[0];")


def test_a_small_input_may_be_indexed_where_the_kernel_says_so(metal: Any) -> None:
    kernel = replace(KERNEL, name="twice_small", indexed=("x",))
    [y] = kernel(
        [mx.ones(3)], template={}, groups=(1, 1, 1), threads=(32, 1, 1), shapes=[(32,)], dtypes=[mx.float32]
    )
    assert y.shape == (32,)


def test_a_missing_source_names_the_file_and_the_remedy() -> None:
    with pytest.raises(KernelError, match=r"absent\.metal.*install mlx-mtp again"):
        source.metal_source("absent.metal")


def test_a_launch_goes_to_metal_or_fails() -> None:
    """No silent fallback: a direct call on a machine without Metal fails in MLX."""
    if mx.metal.is_available():
        assert mx.array_equal(launched(mx.ones(32)), 2 * mx.ones(32))
        return
    with pytest.raises(RuntimeError, match="No Metal"):
        launched(mx.zeros(64))
