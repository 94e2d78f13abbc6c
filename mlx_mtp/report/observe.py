"""Looking into a pass: weights that write down what goes through them, and rows of text forwarded in passes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import mlx.core as mx

from mlx_mtp.layers import Layer
from mlx_mtp.prefill import prefill
from mlx_mtp.state import KeysValues, capacity_for, new_kv
from mlx_mtp.target import Target, embed, logits_of, per_layer_inputs
from mlx_mtp.verify import reach_of_rows, run_rows
from mlx_mtp.weights import Weight

ROWS = 16  # of one pass over given text

OnLayer = Callable[[int, mx.array], None]


@dataclass(frozen=True, slots=True)
class Watched:
    """A weight that shows `project`'s input and output to `look`; for passes that are not compiled."""

    weight: Weight
    look: Callable[[mx.array, mx.array], None] = field(repr=False)

    def project(self, x: mx.array) -> mx.array:
        """x [..., K] -> [..., N]."""
        out = self.weight.project(x)
        self.look(x, out)
        return out


def watched(weight: Weight, look: Callable[[mx.array, mx.array], None]) -> Weight:
    """Stands in for `weight` wherever only `project` is called."""
    return cast(Weight, Watched(weight, look))


def with_layers(target: Target, change: Callable[[int, Layer], Layer]) -> Target:
    """The target with every layer changed."""
    return replace(target, layers=tuple(change(i, layer) for i, layer in enumerate(target.layers)))


def forward_text(
    target: Target, ids: Sequence[int], *, start: int, on_layer: OnLayer | None = None
) -> Iterator[mx.array]:
    """Forward ids[:start] at once and the rest in passes of `ROWS` -> the logits [rows, V] of each such pass."""
    for _, hidden, _ in forward_rows(target, ids, start=start, on_layer=on_layer):
        logits = logits_of(target, hidden)[0]
        mx.eval(logits)
        yield logits


def forward_rows(
    target: Target, ids: Sequence[int], *, start: int, on_layer: OnLayer | None = None
) -> Iterator[tuple[int, mx.array, KeysValues]]:
    """Forward ids[:start] at once and the rest in passes of `ROWS`, few enough that rings still hold the window
    before a pass's first row -> each pass's first position, hidden rows [1, rows, H] and the K/V after it."""
    bucket = capacity_for(len(ids))
    kv_list = list(new_kv(target, bucket))
    prefill(target, kv_list, ids[:start])
    kv: KeysValues = tuple(kv_list)
    del kv_list
    for low in range(start, len(ids), ROWS):
        tokens = mx.array([list(ids[low : low + ROWS])], mx.uint32)
        length = mx.array([low], mx.int32)
        embedded = embed(target, tokens)
        reach = reach_of_rows(target.text, length, tokens.shape[1], bucket)
        inputs = per_layer_inputs(target, tokens, embedded, target.kernels)
        hidden, kv = run_rows(target, embedded, inputs, kv, length, reach, on_layer=on_layer)
        mx.eval(hidden, kv)
        yield low, hidden, kv


def largest(x: mx.array) -> mx.array:
    """max |x| as float32; NaN where x holds one."""
    return mx.abs(x.astype(mx.float32)).max()


def as_floats(values: Any) -> Any:
    """A dict or list of scalar arrays, evaluated at once, as Python floats."""
    mx.eval(values)
    if isinstance(values, dict):
        return {name: float(value.item()) for name, value in values.items()}
    return [float(value.item()) for value in values]
