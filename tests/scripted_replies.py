"""A target that writes what it is told to: the stages, the engine and the batch are real, only the choice is not."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import mlx.core as mx
import numpy as np

LONGEST = 4096


class ScriptedChoice:
    """Takes the place of `choose` in prefill, round and draft: at each position what stands in the row's script.

    A row is known by its seed; `say` puts a text behind a prompt. Positions without a text get token `after`.
    """

    def __init__(self, after: int):
        self._after = after
        self._scripts: dict[int, np.ndarray] = {}

    def say(self, seed: int, prompt_tokens: int, ids: Sequence[int]) -> None:
        script = np.full(LONGEST, self._after, np.uint32)
        script[prompt_tokens : prompt_tokens + len(ids)] = ids
        self._scripts[seed] = script

    def __call__(
        self, logits: mx.array, positions: mx.array, seed: mx.array, *rest: object, **options: object
    ) -> tuple[mx.array, mx.array]:
        rows = [
            self._scripts.get(one, np.full(LONGEST, self._after, np.uint32))
            for one in np.array(seed).tolist()
        ]
        tokens = mx.take_along_axis(mx.array(np.stack(rows)), positions.astype(mx.int32), axis=1)
        return tokens, mx.ones(tokens.shape, mx.bool_)


@contextmanager
def scripted(after: int) -> Iterator[ScriptedChoice]:
    """For pairs that are not compiled: the script is looked up while a round is built."""
    choice = ScriptedChoice(after)
    with (
        mock.patch("mlx_mtp.prefill.choose", choice),
        mock.patch("mlx_mtp.round.choose", choice),
        mock.patch("mlx_mtp.draft.choose", choice),
    ):
        yield choice
