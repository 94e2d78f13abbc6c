"""Rows put into a state or added to it are those of one join, whatever was in their place."""

from dataclasses import replace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_mtp.conversation import Request, start_row
from mlx_mtp.rows import add_rows, put_rows
from mlx_mtp.state import State, StateCell, join_rows
from mlx_mtp.turns import History
from ragged_requests import pair_of, twelve


def states_of(variant: str, requests: list[Request]) -> list[State]:
    states = []
    for request in requests:
        kv, hidden, _ = History(pair_of(variant).target).extend(request.ids, room=request.max_tokens)
        states.append(start_row(pair_of(variant), request, kv, hidden, with_bias=False, with_counts=True))
    return states


@pytest.mark.parametrize("variant", ["e2b", "31b"])
def test_rows_put_and_added_are_those_of_one_join(variant):
    """A row of larger capacity grows the others; a smaller one is put with zeros behind it."""
    text, requests = pair_of(variant).target.text, twelve(variant)[:4]
    large = replace(requests[1], max_tokens=400)
    wanted = join_rows(text, states_of(variant, [requests[0], large, requests[3], requests[2]]))
    cell = StateCell(join_rows(text, states_of(variant, [requests[0], requests[2]])))
    put_rows(text, cell, {1: states_of(variant, [large])[0]})
    add_rows(text, cell, states_of(variant, [requests[3], requests[2]]))
    got = cell.take()
    for (_, one), (_, other) in zip(tree_flatten(got), tree_flatten(wanted), strict=True):
        assert one.shape == other.shape and mx.array_equal(one, other)


def test_a_row_is_replaced_whole_by_one_of_smaller_capacity():
    """What a broken row left in its place may be NaN, which no mask takes away."""
    text, small = pair_of("e2b").target.text, twelve("e2b")[0]
    state = join_rows(text, states_of("e2b", [replace(twelve("e2b")[1], max_tokens=400), small]))
    kv = tuple((mx.full(keys.shape, mx.nan), mx.full(values.shape, mx.nan)) for keys, values in state.kv)
    cell = StateCell(state._replace(kv=kv))
    put_rows(text, cell, {0: states_of("e2b", [small])[0]})
    for buffer in (buffer for both in cell.take().kv for buffer in both):
        assert not mx.isnan(buffer[0]).any() and mx.isnan(buffer[1]).all()
