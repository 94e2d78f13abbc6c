"""The self-test of kernels: right ones pass as Metal source on the CPU, broken ones do not, whatever is broken."""

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kernel_pairs import quantised_pair
from mlx_mtp.kernels.multiply_accumulate import (
    OURS,
    candidates,
    classify,
    fma,
    order_of_sums,
    random_tiles,
)
from mlx_mtp.kernels.operations import operation_of, operations_of
from mlx_mtp.kernels.self_test import Checked, check_operation
from mlx_mtp.kernels.specimens import describe, specimen
from mlx_mtp.kernels.trials import why_far
from mlx_mtp.pair import Pair
from self_test_cases import FORMS, SIZES, by_name, clustered, family

pair_of: Callable[[str], Pair] = functools.cache(lambda kind: quantised_pair(kind, dtype=mx.bfloat16))
EVERY_KIND = ("project", "experts", "attend", "attend_tiled", "head_choose")
Break = Callable[..., Any]


def subject_of(name: str) -> Any:
    """A specimen; of a4b, which has experts."""
    if name == "centroid_choose":
        return specimen(clustered(), seed=5)
    if name in FORMS:
        return specimen({"weight": FORMS[name], "dtype": FORMS[name]["dtype"]}, seed=5)
    return specimen(describe(by_name(pair_of("a4b"))[name][1]), seed=5, columns=128)


def tried(name: str, broken: Break | None = None, sizes: tuple[int, ...] = SIZES) -> Checked:
    """`broken(kernel, *arguments, **how)` in the kernel's place."""
    subject = subject_of(name)
    operation = "project" if name in FORMS else name
    own = family(operation, subject)
    kernel = own.kernel if broken is None else functools.partial(broken, own.kernel)
    return check_operation(operation, subject, kernel, own.reference, sizes=sizes)


@pytest.mark.parametrize("name", [*EVERY_KIND, "centroid_choose", *FORMS])
def test_right_kernels_pass(metal, name):
    found = tried(name)
    assert found.passed, found.reason
    if name in ("project", *FORMS):
        assert found.bodies == ("scalar", "matrix") and found.are_equal
    assert metal.launches


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["e2b", "31b", "a4b"])
def test_every_operation_of_a_pair_passes_at_every_size(metal, kind):
    pair = pair_of(kind)
    for operation, subject in operations_of(pair.target, pair.drafter).items():
        made = specimen(describe(subject), seed=6)
        assert operation_of(operation.name, made) == operation
        own = family(operation.name, made)
        found = check_operation(operation.name, made, own.kernel, own.reference)
        assert found.passed and len(found.bodies) == (2 if operation.name == "project" else 1), (
            operation,
            found,
        )


def first(result: Any, change: Callable[[mx.array], mx.array]) -> Any:
    """The result with its values changed; of a head, its tokens."""
    return (change(result[0]), *result[1:]) if isinstance(result, tuple) else change(result)


def negated_column(kernel: Break, *arguments: Any, **how: Any) -> Any:
    """One value of each row is wrong; of a head, every token."""

    def change(y: mx.array) -> mx.array:
        if y.dtype == mx.uint32:
            return y ^ 1
        return mx.concatenate([y[..., :-1], -y[..., -1:]], axis=-1)

    return first(kernel(*arguments, **how), change)


def not_a_number(kernel: Break, *arguments: Any, **how: Any) -> Any:
    return first(
        kernel(*arguments, **how), lambda y: mx.where(mx.arange(y.shape[-1]) == 0, mx.nan, y).astype(y.dtype)
    )


def least_bit(y: mx.array) -> mx.array:
    """The least bit of one value of the first row."""
    if y.dtype == mx.uint32:
        return y ^ (mx.arange(y.size).reshape(y.shape) == 0)
    bits = y.view(mx.uint16)
    return (bits ^ (mx.arange(y.size).reshape(y.shape) == 0).astype(mx.uint16)).view(y.dtype)


def other_bit_from_4_rows(kernel: Break, *arguments: Any, **how: Any) -> Any:
    def change(y: mx.array) -> mx.array:
        rows = y.size if y.dtype == mx.uint32 else y.size // y.shape[-1]
        return least_bit(y) if rows >= 4 else y

    return first(kernel(*arguments, **how), change)


@pytest.mark.parametrize("name", EVERY_KIND)
@pytest.mark.parametrize("broken", [negated_column, other_bit_from_4_rows])
def test_broken_kernels_of_every_kind_fail(metal, name, broken):
    found = tried(name, broken)
    assert not found.passed
    if broken is other_bit_from_4_rows:
        assert "5 rows at once: 1 rows have other bits than alone" in found.reason


def test_nan_and_another_type_fail(metal):
    assert "values are wrong" in tried("4-bit", not_a_number).reason
    found = tried("4-bit", lambda kernel, *a, **h: kernel(*a, **h).astype(mx.float32))
    assert not found.passed and "float32" in found.reason


def test_a_place_in_the_batch_that_changes_bits_fails(metal):
    """Right for every number of rows; only the second half of a batch of 2 is off by a bit."""

    def broken(kernel: Break, weight: Any, x: mx.array, **how: Any) -> mx.array:
        y = kernel(weight, x, **how)
        return mx.concatenate([y[:1], least_bit(y[1:])]) if x.ndim == 3 else y

    assert tried("4-bit", broken).reason.startswith("as a batch of 2: 1 rows")


def test_a_longer_buffer_that_changes_bits_fails(metal):
    """Attention whose split is by what the buffer holds."""
    lengths = []

    def broken(kernel: Break, queries: mx.array, keys: mx.array, *rest: Any) -> mx.array:
        y = kernel(queries, keys, *rest)
        lengths.append(keys.shape[2])
        return least_bit(y) if keys.shape[2] > min(lengths) else y

    assert tried("attend", broken).reason.startswith("in longer buffers")


def test_matrix_units_that_are_wrong_leave_the_scalar_body(metal):
    def wrong(kernel: Break, weight: Any, x: mx.array, *, body: str) -> mx.array:
        y = kernel(weight, x, body=body)
        return -y if body == "matrix" else y

    found = tried("4-bit", wrong)
    assert found.bodies == ("scalar",) and not found.are_equal and "matrix units, 1 row" in found.reason


def test_matrix_units_with_an_order_of_their_own_are_right_but_not_equal(metal):
    def other_order(kernel: Break, weight: Any, x: mx.array, *, body: str) -> mx.array:
        y = kernel(weight, x, body=body)
        return y if body == "scalar" else mx.concatenate([least_bit_of_all(y[..., :1]), y[..., 1:]], axis=-1)

    def least_bit_of_all(y: mx.array) -> mx.array:
        return (y.view(mx.uint16) ^ 1).view(y.dtype)

    found = tried("4-bit", other_order)
    assert found.bodies == ("scalar", "matrix") and not found.are_equal


def test_a_right_reference_is_what_is_compared_with(metal):
    """A kernel that agrees with itself in every company but not with the reference."""
    found = tried("experts", lambda kernel, *a, **h: kernel(*a, **h) * 1.05)
    assert not found.passed and found.reason.startswith("1 row: ")


def test_near_is_a_unit_in_the_last_place():
    want = mx.array([[1.0, 64.0, -2.0]], mx.bfloat16)
    assert why_far(want, want) is None
    assert why_far(want * (1 + 2**-7), want, slack=0.0) is None
    assert why_far(want * (1 + 2**-5), want, slack=0.0) is not None
    assert why_far(want[:, :2], want) is not None
    assert why_far(mx.array([[1.0, 64.0, mx.nan]], mx.bfloat16), want) is not None


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_order_of_sums_of_the_runner_is_found(metal, dtype):
    metal.settings(check=True)
    found = order_of_sums(dtype)
    assert found["is_ours"] and found["elements"] == 1024
    # Products of 16-bit numbers are exact in float32, where an fma rounds no otherwise than a sum.
    assert len(found["equals"]) == (1 if dtype == "float32" else 2)


def numbers() -> list[Any]:
    return [np.array(x) for x in random_tiles("float32")]


def test_every_order_is_told_from_every_other():
    a, b, c = numbers()
    named = dict(candidates(a, b, c))
    assert OURS in named and len(named) == 15
    for name, made in named.items():
        found = classify(a, b, c, made)
        assert found["equals"] == [name] and found["is_ours"] == (name == OURS)


def test_an_order_without_a_name_is_searched_for():
    a, b, c = numbers()
    total = c
    for k in (3, 0, 1, 7, 2, 6, 5, 4):
        left, right = np.broadcast_to(a[:, :, k, None], a.shape), np.broadcast_to(b[:, None, k, :], b.shape)
        total = fma(left, right, total)
    found = classify(a, b, c, total)
    assert found["equals"] == [] and found["orders"] == [[3, 0, 1, 7, 2, 6, 5, 4]]
    assert classify(a, b, c, c)["orders"] == [] and not classify(a, b, c, c)["is_ours"]


def test_fma_rounds_once():
    """Below the middle of two float32 by less than float64 can hold: a second rounding would go to the even one."""
    odd = np.array([1 + 2**-23], np.float32)
    left, right = np.array([2.0**-24 * (1 + 2**-16)], np.float32), np.array([1 - 2**-16], np.float32)
    assert fma(left, right, odd)[0] == odd[0]  # 1 + 2^-23 + 2^-24 - 2^-56
    assert fma(-left, right, -odd)[0] == -odd[0]
    one = np.ones(1, np.float32)
    assert fma(np.array([2.0**-24], np.float32), one, odd)[0] == np.float32(
        1 + 2**-22
    )  # the middle itself: to even
