"""One target pass over the last committed token and its drafts, writing their K/V as it goes."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from mlx_mtp.config import FULL, SLIDING, TextConfig
from mlx_mtp.layers import Layer, Rotation, attend, fold_mask, keys_values_of, queries_of, run_layer
from mlx_mtp.state import KeysValues, ring_rows
from mlx_mtp.target import Target, embed, final_norm, per_layer_inputs


class Reach(NamedTuple):
    """Where the rows of one pass write and what they may see, by attention type."""

    slots: dict[str, mx.array]  # [B, M] buffer row of each query row
    masks: dict[str, mx.array]  # folded, True where visible


def verify(
    target: Target, tokens: mx.array, kv: KeysValues, length: mx.array, *, bucket: int
) -> tuple[mx.array, KeysValues]:
    """tokens [B, k+1] at positions length .. length+k -> hidden [B, k+1, H] and K/V that hold those rows too.

    Nothing is committed: rows from `length` on are overwritten by the next pass unless `length` moves past them.
    """
    embedded = embed(target, tokens)
    inputs = per_layer_inputs(target, tokens, embedded)
    reach = reach_of_rows(target.text, length, tokens.shape[1], bucket)
    return run_rows(target, embedded, inputs, kv, length, reach, bucket=bucket)


def reach_of_rows(text: TextConfig, length: mx.array, rows: int, bucket: int) -> Reach:
    """length [B] -> slots and masks for `rows` consecutive positions from it; built once a round."""
    positions = length[:, None] + mx.arange(rows, dtype=mx.int32)
    ring = ring_rows(text)
    held = positions_in_ring(positions[:, -1:], ring)[:, None]
    query = positions[..., None]
    in_window = (held <= query) & (held > query - text.sliding_window) & (held >= 0)
    before = mx.arange(bucket, dtype=mx.int32) <= query
    return Reach(
        slots={SLIDING: positions % ring, FULL: positions},
        masks={
            SLIDING: fold_mask(in_window, text.num_heads, text.kv_heads_of(SLIDING)),
            FULL: fold_mask(before, text.num_heads, text.kv_heads_of(FULL)),
        },
    )


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
    bucket: int,
    first_layer: int = 0,
    write: bool = True,
    on_layer: Callable[[int, mx.array], None] | None = None,
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
        store = i if write and layer.k_proj is not None else None
        rotation = rotations[layer.kind]
        attention = partial(_attention, layer, rotation, new_kv, store, sources[i], batch, reach, bucket)
        x = run_layer(layer, x, attention, None if inputs is None else inputs[:, i])
        if on_layer is not None:
            on_layer(i, x)
    return final_norm(target, x).reshape(batch, rows, -1), tuple(new_kv)


def _attention(
    layer: Layer,
    rotation: Rotation,
    kv: list[tuple[mx.array, mx.array]],
    store: int | None,
    source: int,
    batch: int,
    reach: Reach,
    bucket: int,
    normed: mx.array,
) -> mx.array:
    """normed [B * M, H] -> merged heads [B * M, heads * D]; first puts the rows' K and V into kv[store], if any."""
    slots, mask = reach.slots[layer.kind], reach.masks[layer.kind]
    if store is not None:
        keys, values = keys_values_of(layer, normed, rotation, batch)
        kv[store] = (write_rows(kv[store][0], keys, slots), write_rows(kv[store][1], values, slots))
    keys, values = readable(kv[source], layer.kind, bucket)
    return attend(queries_of(layer, normed, rotation, batch), keys, values, mask)


def readable(buffers: tuple[mx.array, mx.array], kind: str, bucket: int) -> tuple[mx.array, mx.array]:
    """The part of a layer's K and V that attention walks: a whole ring, or a full layer's first `bucket` rows."""
    if kind == SLIDING:
        return buffers
    return buffers[0][:, :, :bucket], buffers[1][:, :, :bucket]


def write_rows(buffer: mx.array, rows: mx.array, slots: mx.array) -> mx.array:
    """buffer [B, H, R, D] with rows [B, H, M, D] put at slots [B, M]; in place when nobody else holds the buffer."""
    return mx.put_along_axis(buffer, slots[:, None, :, None], rows, axis=2)
