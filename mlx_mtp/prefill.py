"""Token ids -> K/V rows, chunk by chunk, for one row; then the row's first token.

Chunk boundaries lie at absolute multiples of the chunk size and tiles have fixed sizes, so that text does not depend on
what memory is free. Only work that produces K/V runs for all rows; the rest runs for the last one.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import mlx.core as mx

from mlx_mtp.config import SLIDING, TextConfig
from mlx_mtp.layers import Rotation, keys_values_of, queries_of, rms_norm, run_layer
from mlx_mtp.sampling import SamplerClass, choose
from mlx_mtp.state import KeysValues, State, ring_rows
from mlx_mtp.target import Target, embed, logits_of, per_layer_inputs
from mlx_mtp.verify import reach_of_rows, run_rows, write_rows

CHUNK = 512


def prefill(
    target: Target,
    kv: list[tuple[mx.array, mx.array]],
    ids: Sequence[int],
    *,
    start: int = 0,
    chunk: int = CHUNK,
    cuts: Sequence[int] = (),
    on_chunk: Callable[[int], None] | None = None,
) -> mx.array:
    """Forward ids[start:] at their own positions, writing `kv` -> post-norm hidden [1, 1, H] of the last one.

    `kv` must hold rows 0 .. start-1 already, be the buffers' only owner, and have room for all of ids. `on_chunk` is
    told the number of rows done after each chunk and at each of `cuts`; what it raises leaves `kv` consistent up to
    there.
    """
    hidden: mx.array | None = None
    for low, high in chunk_bounds(start, len(ids), chunk, cuts):
        tokens = mx.array([list(ids[low:high])], mx.uint32)
        hidden = _chunk(target, kv, tokens, low, last=high == len(ids))
        mx.eval(kv, hidden)
        if on_chunk is not None:
            on_chunk(high)
    assert hidden is not None, "the caller leaves at least one id to forward"
    return hidden


def chunk_bounds(start: int, end: int, chunk: int, cuts: Sequence[int] = ()) -> list[tuple[int, int]]:
    """[start, end) cut at absolute multiples of `chunk` and at `cuts`, which lie inside."""
    marks = sorted({start, *range((start // chunk + 1) * chunk, end, chunk), *cuts, end})
    return list(pairwise(marks))


def first_token(target: Target, state: State, sampler: SamplerClass) -> tuple[mx.array, mx.array]:
    """A state whose rows end before the first generated token -> that token [B] and whether it is valid [B]."""
    counts = state.counts[:, None] if sampler.penalties and state.counts is not None else None
    token, valid = choose(
        logits_of(target, state.hidden),
        state.length[:, None],
        state.seed,
        state.sampling,
        sampler,
        counts=counts,
    )
    return token[:, 0], valid[:, 0]


def _chunk(
    target: Target, kv: list[tuple[mx.array, mx.array]], tokens: mx.array, low: int, *, last: bool
) -> mx.array | None:
    """One chunk at positions low ..; returns the hidden row if it is the prompt's last chunk."""
    text, kernels = target.text, target.prefill_kernels
    embedded = embed(target, tokens)
    inputs = per_layer_inputs(target, tokens, embedded, kernels)
    x, last_own = embedded[0], text.first_shared_layer - 1
    rotations = {kind: rope.at(low, x.shape[0]) for kind, rope in target.ropes.items()}
    for i in range(last_own):
        attention = partial(_attention, target, rotations, kv, i, low)
        x = run_layer(kernels, target.layers[i], x, attention, None if inputs is None else inputs[0, :, i])
    normed = rms_norm(x, target.layers[last_own].input_norm, text.rms_norm_eps)
    _write(target, rotations, kv, last_own, normed, low)
    if not last:
        return None
    return _finish_last_row(
        target, kv, x[None, -1:], None if inputs is None else inputs[:, -1:], low + tokens.shape[1]
    )


def _finish_last_row(
    target: Target, kv: KeysValues | list, x: mx.array, inputs: mx.array | None, end: int
) -> mx.array:
    """The last row [1, 1, H] through the last K/V-owning layer and all that share K/V -> hidden [1, 1, H]."""
    length = mx.array([end - 1], mx.int32)
    reach = reach_of_rows(target.text, length, 1, end)
    first = target.text.first_shared_layer - 1
    hidden, _ = run_rows(target, x, inputs, tuple(kv), length, reach, first_layer=first, write=False)
    return hidden


def _write(
    target: Target,
    rotations: dict[str, Rotation],
    kv: list[tuple[mx.array, mx.array]],
    i: int,
    normed: mx.array,
    low: int,
) -> tuple[mx.array, mx.array]:
    """K and V [1, H, M, D] of the chunk's rows, also put into layer i's buffers."""
    layer = target.layers[i]
    keys, values = keys_values_of(target.prefill_kernels, layer, normed, rotations[layer.kind], 1)
    rows = keys.shape[2]
    if layer.kind == SLIDING:
        ring = ring_rows(target.text)
        kept = min(rows, ring)
        slots = (mx.arange(low + rows - kept, low + rows, dtype=mx.int32) % ring)[None, None, :, None]
        kv[i] = (
            write_rows(kv[i][0], keys[:, :, -kept:], slots),
            write_rows(kv[i][1], values[:, :, -kept:], slots),
        )
    else:
        at = mx.array([low], mx.int32)
        kv[i] = (
            mx.slice_update(kv[i][0], keys, at, axes=(2,)),
            mx.slice_update(kv[i][1], values, at, axes=(2,)),
        )
    return keys, values


def _attention(
    target: Target,
    rotations: dict[str, Rotation],
    kv: list[tuple[mx.array, mx.array]],
    i: int,
    low: int,
    normed: mx.array,
) -> mx.array:
    """One K/V-owning layer's attention over a chunk: normed [M, H] -> [M, heads * D]."""
    layer, text, kernels = target.layers[i], target.text, target.prefill_kernels
    queries = queries_of(kernels, layer, normed, rotations[layer.kind], 1)
    if layer.kind == SLIDING:
        end = low + normed.shape[0]
        before = _window_before(text, kv[i], low)
        keys, values = _write(target, rotations, kv, i, normed, low)
        keys, values = (
            mx.concatenate([old, new], axis=2) for old, new in zip(before, (keys, values), strict=True)
        )
        return kernels.attend_tiled(queries, keys, values, low, end - keys.shape[2], text.sliding_window)
    _write(target, rotations, kv, i, normed, low)
    return kernels.attend_tiled(queries, *kv[i], low, 0, None)


def _window_before(
    text: TextConfig, buffers: tuple[mx.array, mx.array], low: int
) -> tuple[mx.array, mx.array]:
    """The up to window - 1 rows before position `low`, in the order of their positions."""
    ring = ring_rows(text)
    slots = mx.arange(max(0, low - text.sliding_window + 1), low, dtype=mx.int32) % ring
    return mx.take(buffers[0], slots, axis=2), mx.take(buffers[1], slots, axis=2)
