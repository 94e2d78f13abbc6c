"""Queries, keys and values by position, the buffers they lie in, and attention over them in float64."""

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_mtp.attention import Sight
from mlx_mtp.kernels.verify_attention import verify_attention
from mlx_mtp.published_configs import SIZES, published_drafter, published_target


@dataclass(frozen=True, slots=True)
class Heads:
    """What a layer's kernel is made for; `window` None: all keys."""

    heads: int
    kv_heads: int
    dim: int
    window: int | None

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


@dataclass(frozen=True, slots=True)
class Past:
    """What B batch members hold at all positions, and their queries: the source that buffers are filled from."""

    shape: Heads
    queries: mx.array  # [B, positions, heads, D]
    keys: mx.array  # [B, kv_heads, positions, D]
    values: mx.array

    def at(self, *members: int) -> "Past":
        rows = mx.array(members)
        return replace(self, queries=self.queries[rows], keys=self.keys[rows], values=self.values[rows])


def past(shape: Heads, positions: int, *, seed: int, batch: int = 1, dtype: mx.Dtype = mx.bfloat16) -> Past:
    """Scores spread over several units, as of a trained model: some keys count, most hardly."""
    keys = mx.random.split(mx.random.key(seed), 3)
    kv = (batch, shape.kv_heads, positions, shape.dim)
    spread = 2 / shape.dim**0.25
    return Past(
        shape,
        (spread * mx.random.normal((batch, positions, shape.heads, shape.dim), key=keys[0])).astype(dtype),
        (spread * mx.random.normal(kv, key=keys[1])).astype(dtype),
        mx.random.normal(kv, key=keys[2]).astype(dtype),
    )


def buffers(known: Past, first: list[int], rows: int, held: int) -> tuple[mx.array, mx.array]:
    """Buffers of `held` rows after `rows` more were written at positions first[b] ..: NaN in every row not seen."""
    kept = []
    for source in (known.keys, known.values):
        batch, heads, _, dim = source.shape
        out = np.full((batch, heads, held, dim), np.nan, np.float32)
        numbers = np.array(source.astype(mx.float32))
        for b, position in enumerate(first):
            seen = np.arange(lowest(known.shape, position), position + rows)
            out[b, :, seen % held if known.shape.window is not None else seen] = numbers[b, :, seen]
        kept.append(mx.array(out).astype(source.dtype))
    return kept[0], kept[1]


def lowest(shape: Heads, position: int) -> int:
    return 0 if shape.window is None else max(0, position - shape.window + 1)


def usual_rows(shape: Heads, end: int, spare: int = 32) -> int:
    """A ring, or a capacity in buckets of 256."""
    return -(-end // 256) * 256 if shape.window is None else shape.window + spare


def attended(
    known: Past, first: list[int], rows: int, *, held: int | None = None, bucket: int | None = None
) -> mx.array:
    """The kernel on rows at positions first[b] .. -> [B * rows, heads * D]."""
    end = max(first) + rows
    held = held or max(usual_rows(known.shape, end), bucket or 0)
    keys, values = buffers(known, first, rows, held)
    queries = mx.stack([known.queries[b, at : at + rows] for b, at in enumerate(first)])
    return verify_attention(
        queries.transpose(0, 2, 1, 3), keys, values, sight(known.shape, first, bucket or end)
    )


def sight(shape: Heads, first: list[int], bucket: int) -> Sight:
    """As a pass makes it, but for the mask, which kernels do not look at."""
    positions = mx.array(first, mx.int32)
    return Sight(positions, shape.window, bucket, positions)


def oracle(known: Past, b: int, position: int, through: int | None = None) -> np.ndarray:
    """float64 attention of one row of one batch member -> [heads * D]; `through`: the last key seen."""
    shape = known.shape
    seen = slice(lowest(shape, position), (position if through is None else through) + 1)
    queries, keys, values = (
        np.array(x[b].astype(mx.float32)).astype(np.float64)
        for x in (known.queries, known.keys, known.values)
    )
    out = []
    for head in range(shape.heads):
        scores = keys[head // shape.group, seen] @ queries[position, head]
        weights = np.exp(scores - scores.max())
        out.append(weights @ values[head // shape.group, seen] / weights.sum())
    return np.concatenate(out)


def assert_near(out: mx.array, known: Past, first: list[int], rows: int) -> None:
    """Within float32's sums, plus one rounding to the type of the result."""
    expected = np.stack([oracle(known, b, at + row) for b, at in enumerate(first) for row in range(rows)])
    unit = {mx.float32: 0.0, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}[out.dtype]
    bound = 1e-5 * np.abs(np.array(known.values.astype(mx.float32))).max() + 1.01 * unit * np.abs(expected)
    error = np.abs(np.array(out.astype(mx.float32)).astype(np.float64) - expected)
    assert np.all(error <= bound), f"{np.max(error - bound)} too far"  # NaN is too far as well


def same_bits(a: mx.array, b: mx.array) -> bool:
    """Of finite numbers; -0 is not 0."""
    views = {2: mx.uint16, 4: mx.uint32}
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
    equal = mx.array_equal(a.view(views[a.dtype.size]), b.view(views[b.dtype.size]))
    return bool(equal) and bool(mx.isfinite(a).all())


def gemma_shapes() -> dict[str, Heads]:
    """Every layer type of the five targets and their drafters, shapes that are alike once."""
    found: dict[str, Heads] = {}
    for size in SIZES:
        target = published_target(size)["text_config"]
        for reader, config in (("", target), (" drafter", published_drafter(size)["text_config"])):
            heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
            of_full = config.get("num_global_key_value_heads", kv_heads)
            for name, shape in (
                ("sliding", Heads(heads, kv_heads, config["head_dim"], target["sliding_window"])),
                ("full", Heads(heads, of_full, config["global_head_dim"], None)),
            ):
                if shape not in found.values():
                    found[f"{size}{reader} {name}"] = shape
    return found


def cut(shape: Heads, *, window: int = 70) -> Heads:
    """At most two K/V heads and a short window: what is left is how rows and values are shared out."""
    kv_heads = min(2, shape.kv_heads)
    return Heads(kv_heads * shape.group, kv_heads, shape.dim, None if shape.window is None else window)
