"""Matrices, rows and settings for the two heads, and logits chosen on purpose."""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_mtp.sampling import SamplerClass, Sampling, sampler_class, sampling_arrays
from mlx_mtp.weights import DenseWeight

GREEDY = Sampling(temperature=0.0)
GEMMA = Sampling(1.0, top_k=64, top_p=0.95)
NARROW = Sampling(0.7, top_k=20, top_p=0.9, min_p=0.05)


class Choice(NamedTuple):
    """What a head takes beside its matrix, the cap and the rows."""

    positions: mx.array
    seed: mx.array
    sampling: dict[str, mx.array]
    sampler: SamplerClass

    def part(self, member: int, row: int) -> "Choice":
        """Of one row alone; the class stays the batch's, as it does in a round."""
        own = {name: value[member : member + 1] for name, value in self.sampling.items()}
        return Choice(
            self.positions[member : member + 1, row : row + 1],
            self.seed[member : member + 1],
            own,
            self.sampler,
        )


def choice_of(samplings: list[Sampling], rows: int, *, seed: int, vocab_size: int) -> Choice:
    """A batch with those settings, at positions of its own; `rows` a member."""
    rng = np.random.default_rng(seed)
    each = [sampling_arrays(sampling, vocab_size) for sampling in samplings]
    return Choice(
        positions=mx.array(rng.integers(1, 100_000, (len(each), 1)) + np.arange(rows), mx.int32),
        seed=mx.array(rng.integers(0, 2**32, len(each), dtype=np.uint32)),
        sampling={name: mx.concatenate([arrays[name] for arrays in each]) for name in each[0]},
        sampler=sampler_class(samplings),
    )


def rows_of(batch: int, rows: int, depth: int, *, seed: int, dtype: mx.Dtype) -> mx.array:
    return (0.3 * mx.random.normal((batch, rows, depth), key=mx.random.key(seed))).astype(dtype)


def head_with(logits: np.ndarray, *, depth: int = 32) -> tuple[DenseWeight, mx.array]:
    """A matrix and a row [1, 1, depth] whose product is exactly these logits [V], in float32."""
    table = np.zeros((len(logits), depth), np.float32)
    table[:, 0] = logits
    row = np.zeros((1, 1, depth), np.float32)
    row[..., 0] = 1
    return DenseWeight(mx.array(table)), mx.array(row)
