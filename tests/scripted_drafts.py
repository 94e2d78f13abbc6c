"""A draft stage that knows the text: perfect, half right or always wrong, as asked for."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_mtp.drafter import Drafter
from mlx_mtp.sampling import SamplerClass
from mlx_mtp.state import State
from mlx_mtp.target import Target


class ScriptedDrafts:
    """Takes the place of `mlx_mtp.round.draft` and proposes what stands in `texts`, or its neighbour where it errs.

    texts: for each row of the batch all token ids by absolute position, prompt included; beyond them it errs.
    right: the share of positions at which it is right; which ones is fixed by the position.
    seeds: of the texts' rows, by which they are found where a batch has become narrower.
    """

    def __init__(self, texts: Sequence[Sequence[int]], right: float, seeds: Sequence[int] = ()):
        longest = max(map(len, texts)) + 64
        padded = np.array([[*text, *[0] * (longest - len(text))] for text in texts], np.uint32)
        errs = np.random.default_rng(4).random(longest) >= right
        self._script = mx.array(padded ^ errs.astype(np.uint32))
        self._seeds = mx.array(list(seeds), mx.uint32) if seeds else None

    def __call__(
        self, target: Target, drafter: Drafter, state: State, sampler: SamplerClass, *, k: int, bucket: int
    ) -> mx.array:
        positions = state.length[:, None] + 1 + mx.arange(k, dtype=mx.int32)
        script = self._script
        if self._seeds is not None:
            script = script[mx.argmax(state.seed[:, None] == self._seeds, axis=1)]
        return mx.take_along_axis(script, positions, axis=1)
