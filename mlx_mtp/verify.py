"""One target pass over the last committed token and its drafts, writing their K/V as it goes."""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from mlx_mtp.attention import Sight, fold_mask
from mlx_mtp.config import FULL, SLIDING, TextConfig
from mlx_mtp.kernels.table import Kernels
from mlx_mtp.layers import Layer, OnChoice, Rotation, keys_values_of, queries_of, run_layer
from mlx_mtp.state import KeysValues, ring_rows
from mlx_mtp.target import Target, embed, final_norm, per_layer_inputs


class Reach(NamedTuple):
    """Where the rows of one pass write and what they may see, by attention type."""

    slots: dict[str, mx.array]  # [B, kv_heads, M, D] buffer row of each query row, the same for all of it
    sights: dict[str, Sight]


class Seen(NamedTuple):
    """What the rows of a pass share in all layers of one attention type."""

    slots: (
        mx.array | None
    )  # [B, kv_heads, M, D] where they write; None: nowhere, their K/V stand in the buffers already
    sight: Sight
    rotation: Rotation


def verify(
    target: Target,
    tokens: mx.array,
    kv: KeysValues,
    length: mx.array,
    *,
    bucket: int,
    on_choice: OnChoice | None = None,
) -> tuple[mx.array, KeysValues]:
    """tokens [B, k+1] at positions length .. length+k -> hidden [B, k+1, H] and K/V that hold those rows too.

    Nothing is committed: rows from `length` on are overwritten by the next pass unless `length` moves past them.
    `on_choice` is shown the experts [B * (k+1), top_k] of each layer that has some.
    """
    embedded = embed(target, tokens)
    inputs = per_layer_inputs(target, tokens, embedded, target.kernels)
    reach = reach_of_rows(target.text, length, tokens.shape[1], bucket)
    return run_rows(target, embedded, inputs, kv, length, reach, on_choice=on_choice)


def reach_of_rows(text: TextConfig, length: mx.array, rows: int, bucket: int) -> Reach:
    """length [B] -> slots and sights for `rows` consecutive positions from it; built once a round."""
    positions = length[:, None] + mx.arange(rows, dtype=mx.int32)
    slots = {SLIDING: positions % ring_rows(text), FULL: positions}
    return Reach(
        slots={kind: _of_rows(text, kind, own) for kind, own in slots.items()},
        sights=sights_of(text, text, length, rows, bucket),
    )


def _of_rows(text: TextConfig, kind: str, slots: mx.array) -> mx.array:
    """slots [B, M] -> [B, kv_heads, M, D], as every layer would have them for itself."""
    shape = (slots.shape[0], text.kv_heads_of(kind), slots.shape[1], text.head_dim_of(kind))
    return mx.broadcast_to(slots[:, None, :, None], shape)


def sights_of(
    target: TextConfig, reader: TextConfig, first: mx.array, rows: int, bucket: int
) -> dict[str, Sight]:
    """What `rows` rows from position first [B] on see of the target's K/V; `reader` has the heads that look."""
    query = (first[:, None] + mx.arange(rows, dtype=mx.int32))[..., None]
    held = positions_in_ring(query[:, -1], ring_rows(target))[:, None]
    in_window = (held <= query) & (held > query - target.sliding_window) & (held >= 0)
    before = mx.arange(bucket, dtype=mx.int32) <= query

    def sight(kind: str, window: int | None, visible: mx.array) -> Sight:
        return Sight(first, window, bucket, fold_mask(visible, reader.num_heads, reader.kv_heads_of(kind)))

    return {SLIDING: sight(SLIDING, target.sliding_window, in_window), FULL: sight(FULL, None, before)}


def positions_in_ring(newest: mx.array, ring: int) -> mx.array:
    """newest [B, 1] position written -> [B, ring] absolute position that each slot holds (negative: none yet)."""
    return newest - (newest - mx.arange(ring, dtype=mx.int32)) % ring


def run_rows(
    target: Target,
    x: mx.array,
    inputs: mx.array | None,
    kv: KeysValues,
    length: mx.array,
    reach: Reach,
    *,
    first_layer: int = 0,
    write: bool = True,
    on_layer: Callable[[int, mx.array], None] | None = None,
    on_choice: OnChoice | None = None,
) -> tuple[mx.array, KeysValues]:
    """Layers `first_layer`.. on x [B, M, H] -> post-norm hidden [B, M, H] and the K/V after its writes.

    `write=False` is for rows whose K/V stand in the buffers already (the end of a prefill). `on_layer(i, x)` is shown
    the residual stream [B * M, H] after each layer, for measurements.
    """
    batch, rows, _ = x.shape
    new_kv, sources = list(kv), target.text.kv_source
    rotations = {kind: rope.at(length, rows) for kind, rope in target.ropes.items()}
    x = x.reshape(batch * rows, -1)
    inputs = None if inputs is None else inputs.reshape(batch * rows, *inputs.shape[2:])
    for i in range(first_layer, target.text.num_layers):
        layer = target.layers[i]
        slots = reach.slots[layer.kind] if write and layer.k_proj is not None else None
        seen = Seen(slots, reach.sights[layer.kind], rotations[layer.kind])
        own = None if inputs is None else inputs[:, i]
        x, buffers = play_layer(target.kernels, layer, x, own, new_kv[sources[i]], seen, on_choice)
        if slots is not None:
            new_kv[i] = buffers
        if on_layer is not None:
            on_layer(i, x)
    return final_norm(target, x).reshape(batch, rows, -1), tuple(new_kv)


def play_layer(
    kernels: Kernels,
    layer: Layer,
    x: mx.array,
    per_layer_input: mx.array | None,
    buffers: tuple[mx.array, mx.array],
    seen: Seen,
    on_choice: OnChoice | None = None,
) -> tuple[mx.array, tuple[mx.array, mx.array]]:
    """One layer on rows x [B * M, H] that read K/V buffers [B, kv_heads, R, D] -> both after it.

    Where there are slots the rows' own K and V are put there first.
    """
    batch, held = seen.sight.first.shape[0], [buffers]

    def attention(normed: mx.array) -> mx.array:
        """normed [B * M, H] -> merged heads [B * M, heads * D]."""
        if seen.slots is not None:
            keys, values = keys_values_of(kernels, layer, normed, seen.rotation, batch)
            before = held.pop()
            held.append((write_rows(before[0], keys, seen.slots), write_rows(before[1], values, seen.slots)))
        queries = queries_of(kernels, layer, normed, seen.rotation, batch)
        return kernels.attend(queries, *held[0], seen.sight)

    x = run_layer(kernels, layer, x, attention, per_layer_input, on_choice)
    return x, held[0]


def write_rows(buffer: mx.array, rows: mx.array, slots: mx.array) -> mx.array:
    """buffer [B, H, R, D] with rows [B, H, M, D] at slots that broadcast to them; in place if nobody else holds it."""
    return mx.put_along_axis(buffer, slots, rows, axis=2)
