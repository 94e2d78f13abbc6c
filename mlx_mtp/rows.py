"""Rows that join a batch between two rounds: put where others have ended, or added behind."""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from mlx_mtp.config import TextConfig
from mlx_mtp.state import KeysValues, State, StateCell, capacity_of, grow, no_drafts


def put_rows(text: TextConfig, cell: StateCell, rows: Mapping[int, State]) -> None:
    """Replace rows of the cell's state by solo states, in place and one layer at a time; pending drafts are dropped.

    A row is replaced whole, zeros up to the capacity included: what a broken row left there must not be multiplied.
    """
    state = cell.take()
    kv = list(state.kv)
    state = state._replace(kv=())
    capacity = max(capacity_of(text, buffers) for buffers in (tuple(kv), *(own.kv for own in rows.values())))
    grow(text, kv, capacity)
    for b, own in rows.items():
        levelled = list(own.kv)
        grow(text, levelled, capacity)
        for i, (keys, values) in enumerate(levelled):
            both = kv[i]
            kv[i] = (_with_row(both[0], keys, b), _with_row(both[1], values, b))
            del both
            mx.eval(kv[i])
    for b, own in rows.items():
        fields: dict[str, Any] = {
            name: _with_row(value, own._asdict()[name], b)
            for name, value in state._asdict().items()
            if isinstance(value, mx.array) and name != "drafts"
        }
        sampling = {name: _with_row(value, own.sampling[name], b) for name, value in state.sampling.items()}
        state = state._replace(**fields, sampling=sampling)
    state = state._replace(kv=tuple(kv), drafts=no_drafts(state.length.shape[0]))
    mx.eval(state)
    cell.put(state)


def add_rows(text: TextConfig, cell: StateCell, rows: Sequence[State]) -> None:
    """Put solo states behind the cell's rows, one layer at a time, so that only one exists twice."""
    state = cell.take()
    kv, owned = list(state.kv), [list(own.kv) for own in rows]
    state = state._replace(kv=())
    capacity = max(capacity_of(text, tuple(buffers)) for buffers in (kv, *owned))
    for buffers in (kv, *owned):
        grow(text, buffers, capacity)
    for i in range(len(kv)):
        keys = mx.concatenate([kv[i][0], *(own[i][0] for own in owned)])
        values = mx.concatenate([kv[i][1], *(own[i][1] for own in owned)])
        mx.eval(keys, values)
        kv[i] = (keys, values)
    every = (state, *rows)
    fields: dict[str, Any] = {
        name: mx.concatenate([own._asdict()[name] for own in every])
        for name, value in state._asdict().items()
        if isinstance(value, mx.array) and name != "drafts"
    }
    sampling = {name: mx.concatenate([own.sampling[name] for own in every]) for name in state.sampling}
    wider = state._replace(
        **fields, sampling=sampling, kv=tuple(kv), drafts=no_drafts(len(rows) + state.length.shape[0])
    )
    mx.eval(wider)
    cell.put(wider)


def level_fields(states: Sequence[State]) -> list[State]:
    """Give all states counts, and a bias, where any has them; rows that use none get zeros."""
    every = list(states)
    counts = next((own.counts for own in every if own.counts is not None), None)
    bias = next((own.sampling["bias"] for own in every if "bias" in own.sampling), None)
    for i, own in enumerate(every):
        batch = own.length.shape[0]
        if counts is not None and own.counts is None:
            every[i] = every[i]._replace(counts=mx.zeros((batch, *counts.shape[1:]), counts.dtype))
        if bias is not None and "bias" not in own.sampling:
            zeros = mx.zeros((batch, *bias.shape[1:]), bias.dtype)
            every[i] = every[i]._replace(sampling=own.sampling | {"bias": zeros})
    return every


def row_of(state: State, b: int) -> KeysValues:
    """A copy of row b's K/V, each buffer [1, H, rows, D]; a slice would hold the whole batch's."""
    at = mx.array([b], mx.int32)
    kv = tuple((mx.take(keys, at, axis=0), mx.take(values, at, axis=0)) for keys, values in state.kv)
    mx.eval(kv)
    return kv


def _with_row(batch: mx.array, row: mx.array, b: int) -> mx.array:
    """batch [B, ...] with row [1, ...] as its row b; in place where nobody else holds the batch."""
    return mx.slice_update(batch, row, mx.array([b], mx.int32), axes=(0,))
