"""One target pass over the last committed token and its drafts, writing their K/V as it goes."""

from collections.abc import Callable
from functools import partial
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

    slots: dict[str, mx.array]  # [B, M] buffer row of each query row
    sights: dict[str, Sight]


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
    return Reach(
        slots={SLIDING: positions % ring_rows(text), FULL: positions},
        sights=sights_of(text, text, length, rows, bucket),
    )


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
    new_kv, sources, kernels = list(kv), target.text.kv_source, target.kernels
    rotations = {kind: rope.at(length, rows) for kind, rope in target.ropes.items()}
    x = x.reshape(batch * rows, -1)
    inputs = None if inputs is None else inputs.reshape(batch * rows, *inputs.shape[2:])
    for i in range(first_layer, target.text.num_layers):
        layer = target.layers[i]
        store = i if write and layer.k_proj is not None else None
        rotation = rotations[layer.kind]
        attention = partial(_attention, kernels, layer, rotation, new_kv, store, sources[i], batch, reach)
        x = run_layer(kernels, layer, x, attention, None if inputs is None else inputs[:, i], on_choice)
        if on_layer is not None:
            on_layer(i, x)
    return final_norm(target, x).reshape(batch, rows, -1), tuple(new_kv)


def _attention(
    kernels: Kernels,
    layer: Layer,
    rotation: Rotation,
    kv: list[tuple[mx.array, mx.array]],
    store: int | None,
    source: int,
    batch: int,
    reach: Reach,
    normed: mx.array,
) -> mx.array:
    """normed [B * M, H] -> merged heads [B * M, heads * D]; first puts the rows' K and V into kv[store], if any."""
    if store is not None:
        slots = reach.slots[layer.kind]
        keys, values = keys_values_of(kernels, layer, normed, rotation, batch)
        kv[store] = (write_rows(kv[store][0], keys, slots), write_rows(kv[store][1], values, slots))
    queries = queries_of(kernels, layer, normed, rotation, batch)
    return kernels.attend(queries, *kv[source], reach.sights[layer.kind])


def write_rows(buffer: mx.array, rows: mx.array, slots: mx.array) -> mx.array:
    """buffer [B, H, R, D] with rows [B, H, M, D] put at slots [B, M]; in place when nobody else holds the buffer."""
    return mx.put_along_axis(buffer, slots[:, None, :, None], rows, axis=2)
