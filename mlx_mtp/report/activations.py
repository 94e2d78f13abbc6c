"""How large activations become, layer by layer, and what the target says in other number formats."""

from dataclasses import fields, is_dataclass, replace
from typing import Any, cast

import mlx.core as mx

from mlx_mtp.layers import Layer, Rope
from mlx_mtp.report.observe import as_floats, forward_text, largest, watched, with_layers
from mlx_mtp.report.protocol import Deadline, Found
from mlx_mtp.report.setting import GREEDY, Setting, play, rounded
from mlx_mtp.target import Target

FP16_LARGEST = 65504.0
SCALE_OF_TENSOR = "global_scale"  # of nvfp4 experts: always float32
PLACES = ("residual", "attention", "mlp_inner", "mlp_out")


def activations(setting: Setting, found: Found, deadline: Deadline) -> None:
    """max |activation| by layer and place on greedy replies, against the largest float16."""
    pair = setting.the_pair
    wide = in_dtype(pair.target, mx.float32) if pair.target.dtype == mx.float16 else pair.target
    found["measured_in"] = dtype_name(wide.dtype)
    layers: list[dict[str, float]] = [dict.fromkeys(PLACES, 0.0) for _ in wide.layers]
    for ids in setting.prompt_tokens().values():
        deadline.check()
        reply = play(pair, ids, k=0, tokens=setting.tokens, sampling=GREEDY)
        for layer, seen in zip(layers, scan(wide, ids, reply.tokens, deadline), strict=True):
            layer.update({place: max(layer[place], value) for place, value in seen.items()})
        worst = max(max(layer.values()) for layer in layers)
        found["largest"] = rounded(worst)
        found["share_of_largest_float16"] = rounded(worst / FP16_LARGEST)
        found["overflows_float16"] = not worst < FP16_LARGEST
        found["by_layer"] = [{place: rounded(value) for place, value in layer.items()} for layer in layers]


def scan(target: Target, prompt: list[int], reply: list[int], deadline: Deadline) -> list[dict[str, float]]:
    """By layer: the largest |x| after the layer, out of attention, inside the MLP and out of it."""
    seen: list[dict[str, mx.array]] = [{} for _ in target.layers]

    def note(i: int, place: str, x: mx.array) -> None:
        worst = largest(x)
        seen[i][place] = mx.maximum(seen[i][place], worst) if place in seen[i] else worst

    def watch(i: int, layer: Layer) -> Layer:
        def attention(x: mx.array, out: mx.array) -> None:
            note(i, "attention", out)

        def mlp(x: mx.array, out: mx.array) -> None:
            note(i, "mlp_inner", x)
            note(i, "mlp_out", out)

        return replace(
            layer, o_proj=watched(layer.o_proj, attention), down_proj=watched(layer.down_proj, mlp)
        )

    def after_layer(i: int, x: mx.array) -> None:
        note(i, "residual", x)

    passes = forward_text(with_layers(target, watch), [*prompt, *reply], start=1, on_layer=after_layer)
    for _ in passes:
        mx.eval(seen)
        deadline.check()
    return [as_floats(layer) for layer in seen]


def formats(setting: Setting, found: Found, deadline: Deadline) -> None:
    """The same rows in float32, bfloat16 and float16: finite, the same best token, how far apart, how long."""
    pair = setting.the_pair
    ids = next(iter(setting.prompt_tokens().values()))
    reply = play(pair, ids, k=0, tokens=setting.tokens, sampling=GREEDY)
    found["as_loaded"] = dtype_name(pair.target.dtype)
    reference: mx.array | None = None
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        deadline.check()
        try:
            target = in_dtype(pair.target, dtype)
            logits = mx.concatenate(list(forward_text(target, [*ids, *reply.tokens], start=len(ids))))
            logits = logits.astype(mx.float32)
            mx.eval(logits)
        except (
            RuntimeError
        ) as error:  # not every operation knows every type: MLX has no 16-bit experts on a CPU
            found[dtype_name(dtype)] = {"error": str(error)[:200]}
            continue
        reference = logits if reference is None else reference
        found[dtype_name(dtype)] = against(reference, logits)


def against(reference: mx.array, logits: mx.array) -> Found:
    """logits [rows, V] in float32 against the float32 ones."""
    finite = bool(mx.isfinite(logits).all().item())
    same = (mx.argmax(logits, axis=-1) == mx.argmax(reference, axis=-1)).sum()
    difference = mx.abs(logits - reference)
    return {
        "finite": finite,
        "rows": logits.shape[0],
        "same_best_token": cast(int, same.item()) if finite else None,
        "largest_logit_difference": rounded(cast(float, difference.max().item())) if finite else None,
        "mean_logit_difference": rounded(cast(float, difference.mean().item())) if finite else None,
    }


def in_dtype(target: Target, dtype: mx.Dtype) -> Target:
    """The target computing in `dtype`: floats are cast, packed weights shared, angles stay float32."""
    return cast(Target, _mapped(target, dtype)) if target.dtype != dtype else target


def _mapped(value: Any, dtype: mx.Dtype) -> Any:
    """Casts through the frozen dataclasses, tuples and dicts that a target is made of."""
    if isinstance(value, mx.array):
        return value.astype(dtype) if mx.issubdtype(value.dtype, mx.floating) else value
    if isinstance(value, mx.Dtype):
        return dtype
    if isinstance(value, Rope) or not is_dataclass(value):
        if isinstance(value, tuple):
            return tuple(_mapped(entry, dtype) for entry in value)
        if isinstance(value, dict):
            return {name: _mapped(entry, dtype) for name, entry in value.items()}
        return value
    parts = {part.name: getattr(value, part.name) for part in fields(value) if part.init}
    make: Any = type(value)
    return make(
        **{name: part if name == SCALE_OF_TENSOR else _mapped(part, dtype) for name, part in parts.items()}
    )


def dtype_name(dtype: mx.Dtype) -> str:
    """mlx.core.bfloat16 -> bfloat16."""
    return str(dtype).rpartition(".")[2]
