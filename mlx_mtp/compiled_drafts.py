"""`draft` with one step compiled, whatever the number of drafts: what all steps share, then the same step again."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_mtp.attention import Sight
from mlx_mtp.config import FULL, SLIDING
from mlx_mtp.draft import Choice, draft_one
from mlx_mtp.drafter import Drafter, DrafterView, look_of_drafter
from mlx_mtp.layers import Rotation
from mlx_mtp.sampling import SamplerClass
from mlx_mtp.state import State
from mlx_mtp.target import Target

Function = Callable[..., Any]


class CompiledDrafts:
    """Chains of drafts of one pair; functions are compiled once a bucket and sampler class."""

    def __init__(self, target: Target, drafter: Drafter):
        self._target, self._drafter = target, drafter
        self._looks: dict[int, Function] = {}
        self._steps: dict[tuple[int, SamplerClass], Function] = {}

    def __call__(self, state: State, sampler: SamplerClass, *, k: int, bucket: int) -> mx.array:
        """A state without pending drafts, k >= 1 -> proposals [B, k]; nothing is evaluated."""
        look, step = self._look(bucket), self._step(bucket, sampler)
        buffers = {kind: state.kv[i] for kind, i in self._target.text.feeding_layers.items()}
        token, positions, seen = look(state.last, state.length)
        hidden, drafts = state.hidden, []
        for _ in range(k):
            token, hidden, positions = step(
                token, hidden, positions, seen, buffers, state.seed, state.sampling, state.counts
            )
            drafts.append(token)
        return token if k == 1 else mx.concatenate(drafts, axis=1)

    def _look(self, bucket: int) -> Function:
        """What all steps share: masks and rotations; and the first one's token and position."""
        if bucket not in self._looks:
            self._looks[bucket] = mx.compile(self._make_look(bucket))
        return self._looks[bucket]

    def _make_look(self, bucket: int) -> Function:
        text, drafter = self._target.text, self._drafter

        def look(last: mx.array, length: mx.array) -> Any:
            sights, rotations = look_of_drafter(text, drafter, length, bucket=bucket)
            seen = {kind: (sight.first, sight.mask, *rotations[kind]) for kind, sight in sights.items()}
            return last[:, None], length[:, None] + 1, seen

        return look

    def _step(self, bucket: int, sampler: SamplerClass) -> Function:
        if (bucket, sampler) not in self._steps:
            self._steps[bucket, sampler] = mx.compile(self._make_step(bucket, sampler))
        return self._steps[bucket, sampler]

    def _make_step(self, bucket: int, sampler: SamplerClass) -> Function:
        target, drafter = self._target, self._drafter
        windows = {SLIDING: target.text.sliding_window, FULL: None}

        def step(
            token: mx.array,
            hidden: mx.array,
            positions: mx.array,
            seen: Any,
            buffers: Any,
            seed: mx.array,
            sampling: dict[str, mx.array],
            counts: mx.array | None,
        ) -> Any:
            view = DrafterView(
                kv=buffers,
                sights={
                    kind: Sight(first, windows[kind], bucket, mask)
                    for kind, (first, mask, *_) in seen.items()
                },
                rotations={kind: Rotation(*rotation) for kind, (_, _, *rotation) in seen.items()},
            )
            choice = Choice(seed, sampling, counts, sampler)
            token, hidden = draft_one(target, drafter, token, hidden, positions, view, choice)
            return token, hidden, positions + 1

        return step
