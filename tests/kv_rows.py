"""K/V rows by absolute position, to compare what decoding left in the buffers with a fresh prefill."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_mtp.config import SLIDING
from mlx_mtp.prefill import prefill
from mlx_mtp.state import KeysValues, bucket_for, new_kv, ring_rows
from mlx_mtp.target import Target

# float32: a row computed in a prefill chunk and one computed in a verify pass differ by rounding only. The largest
# difference seen is 5e-5, between rows of magnitude up to 5; a row of another token differs by about 1.
TOLERANCE = 5e-4
CHUNK = 16

Rows = list[tuple[np.ndarray, np.ndarray]]  # per K/V-owning layer: K and V [kv_heads, positions, D]


def prefilled_rows(target: Target, tokens: Sequence[int]) -> Rows:
    """Every position's rows, collected chunk by chunk before a ring overwrites them."""
    text = target.text
    kv = list(new_kv(target, bucket_for(len(tokens))))
    parts: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in kv]
    done = 0

    def collect(high: int) -> None:
        nonlocal done
        for i, buffers in enumerate(kv):
            parts[i].append(_at(text, i, buffers, np.arange(done, high), row=0))
        done = high

    prefill(target, kv, tokens, chunk=CHUNK, on_chunk=collect)
    return [
        (np.concatenate([k for k, _ in layer], axis=1), np.concatenate([v for _, v in layer], axis=1))
        for layer in parts
    ]


def largest_gap(
    target: Target, kv: KeysValues, expected: Rows, rows: int, *, written: int | None = None, row: int = 0
) -> float:
    """Largest |difference| over all layers between batch row `row` of `kv`, rows 0 .. rows-1, and `expected`.

    Rings are compared as far back as they reach after positions up to `written` (default: `rows`) were written, and
    at least over the window that the next row sees. NaN counts as infinite.
    """
    text = target.text
    ring = ring_rows(text)
    oldest = max(0, min(max(rows, written or rows) - ring, rows - text.sliding_window + 1))
    worst = 0.0
    for i, (kind, buffers) in enumerate(zip(text.layer_types, kv, strict=False)):
        positions = np.arange(oldest if kind == SLIDING else 0, rows)
        for got, want in zip(_at(text, i, buffers, positions, row=row), expected[i], strict=True):
            gap = np.abs(got - want[:, positions])
            worst = max(worst, float(np.nan_to_num(gap, nan=np.inf, posinf=np.inf).max(initial=0.0)))
    return worst


def _at(text, layer: int, buffers: tuple[mx.array, mx.array], positions: np.ndarray, *, row: int):
    slots = positions % ring_rows(text) if text.layer_types[layer] == SLIDING else positions
    return tuple(np.array(buffer[row])[:, slots] for buffer in buffers)
