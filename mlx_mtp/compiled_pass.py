"""`verify` with each layer compiled by itself: layers that differ in their weights only share one trace.

MLX copies a traced graph node by node whenever it is called. A trace of one layer stays in the processor's caches while
all layers are built from it, which takes a third less time than a trace of all, and tracing takes as long as one layer
of each sort does. Sliding layers do not depend on the bucket, so a text that outgrows one traces full layers only.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_mtp.array_parts import arrays_of, likeness, with_arrays
from mlx_mtp.attention import Sight
from mlx_mtp.config import FULL
from mlx_mtp.layers import Layer, Rotation
from mlx_mtp.state import KeysValues
from mlx_mtp.target import Target, embed, per_layer_inputs
from mlx_mtp.verify import Seen, play_layer, reach_of_rows

Function = Callable[..., Any]


class Passed(NamedTuple):
    """What a pass gives before its last norm."""

    x: mx.array  # [B * M, H]
    kv: KeysValues
    chosen: list[mx.array]  # expert ids [B * M, top_k] of each layer that has some


class CompiledPass:
    """The layers of one target; a function is compiled when a sort of layer, and a bucket, is first needed."""

    def __init__(self, target: Target):
        self._target = target
        self._given = [
            (source, layer.kind, tuple(arrays_of(layer)))
            for source, layer in zip(target.text.kv_source, target.layers, strict=True)
        ]
        self._begins: dict[int, Function] = {}
        self._by_sort: dict[Hashable, Function] = {}
        self._by_bucket: dict[int, list[Function]] = {}  # of each layer

    def __call__(
        self, last: mx.array, drafts: mx.array, kv: KeysValues, length: mx.array, bucket: int
    ) -> Passed:
        """Last token [B] and its drafts [B, k] at positions length .. length+k; nothing is evaluated."""
        new_kv = list(kv)
        chosen: list[mx.array] = []
        x, inputs, seen = self._begin(bucket)(last, drafts, length)
        for i, (play, (source, kind, arrays)) in enumerate(
            zip(self._layers(bucket), self._given, strict=True)
        ):
            own = None if inputs is None else inputs[i]
            x, buffers, ids = play(x, own, new_kv[source], seen[kind], arrays)
            if buffers is not None:
                new_kv[i] = buffers
            if ids is not None:
                chosen.append(ids)
        return Passed(x, tuple(new_kv), chosen)

    def _begin(self, bucket: int) -> Function:
        """Embeddings and what all layers share: rows to write, masks, rotations."""
        if bucket not in self._begins:
            self._begins[bucket] = mx.compile(self._make_begin(bucket))
        return self._begins[bucket]

    def _make_begin(self, bucket: int) -> Function:
        target = self._target

        def begin(last: mx.array, drafts: mx.array, length: mx.array) -> Any:
            tokens = (
                last[:, None] if drafts.shape[1] == 0 else mx.concatenate([last[:, None], drafts], axis=1)
            )
            batch, rows = tokens.shape
            embedded = embed(target, tokens)
            inputs = per_layer_inputs(target, tokens, embedded, target.kernels)
            if inputs is not None:
                inputs = inputs.reshape(batch * rows, *inputs.shape[2:])
            reach = reach_of_rows(target.text, length, rows, bucket)
            rotations = {kind: rope.at(length, rows) for kind, rope in target.ropes.items()}
            seen = {
                kind: (reach.slots[kind], sight.first, sight.mask, *rotations[kind])
                for kind, sight in reach.sights.items()
            }
            by_layer = None if inputs is None else [inputs[:, i] for i in range(target.text.num_layers)]
            return embedded.reshape(batch * rows, -1), by_layer, seen

        return begin

    def _layers(self, bucket: int) -> list[Function]:
        if bucket not in self._by_bucket:
            self._by_bucket[bucket] = [self._layer(layer, bucket) for layer in self._target.layers]
        return self._by_bucket[bucket]

    def _layer(self, layer: Layer, bucket: int) -> Function:
        """The function of all layers like this one."""
        sort = (likeness(layer), bucket if layer.kind == FULL else None)
        if sort not in self._by_sort:
            self._by_sort[sort] = mx.compile(self._make_layer(layer, bucket))
        return self._by_sort[sort]

    def _make_layer(self, like: Layer, bucket: int) -> Function:
        kernels, writes = self._target.kernels, like.k_proj is not None
        window = None if like.kind == FULL else self._target.text.sliding_window

        def play(
            x: mx.array, own: mx.array | None, buffers: Any, shared: Any, arrays: tuple[mx.array, ...]
        ) -> Any:
            slots, first, mask, *rotation = shared
            seen = Seen(slots if writes else None, Sight(first, window, bucket, mask), Rotation(*rotation))
            chosen: list[mx.array] = []
            layer = with_arrays(like, iter(arrays))
            x, both = play_layer(kernels, layer, x, own, buffers, seen, chosen.append)
            return x, both if writes else None, chosen[0] if chosen else None

        return play
