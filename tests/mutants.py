"""Wrong ways to play a round, one stage replaced in each; what they break is listed in test_sampling_mutants.py."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

import mlx_mtp.draft
import mlx_mtp.round as stages
from mlx_mtp.state import State

Patch = tuple[object, str, Callable[..., Any]]
sound_accept, sound_choose, sound_commit = stages.accept, stages.choose, stages.commit
sound_counts, sound_draft, sound_verify = stages._counts_by_row, stages.draft, stages.verify


def noise_keyed_by_row() -> list[Patch]:
    """The first row of a pass always has the same noise, the second another, and so on."""

    def choose(logits: mx.array, positions: mx.array, *rest: Any, **more: Any) -> Any:
        rows = mx.arange(positions.shape[1], dtype=positions.dtype)
        return sound_choose(logits, mx.broadcast_to(rows, positions.shape), *rest, **more)

    return [(stages, "choose", choose)]


def noise_keyed_by_batch_row() -> list[Patch]:
    """The place in the batch takes the seed's part."""

    def choose(logits: mx.array, positions: mx.array, seed: mx.array, *rest: Any, **more: Any) -> Any:
        return sound_choose(logits, positions, mx.arange(seed.shape[0], dtype=mx.uint32), *rest, **more)

    return [(stages, "choose", choose), (mlx_mtp.draft, "choose", choose)]


def noise_keyed_by_rows_in_pass() -> list[Patch]:
    """The number of verified rows enters the seed."""

    def choose(logits: mx.array, positions: mx.array, seed: mx.array, *rest: Any, **more: Any) -> Any:
        return sound_choose(logits, positions, seed + 10**9 * (positions.shape[1] - 1), *rest, **more)

    return [(stages, "choose", choose)]


def bonus_noise_one_back() -> list[Patch]:
    """The target's token after all drafts has the noise of the position before."""
    return _bonus_noise_moved(-1)


def bonus_noise_one_ahead() -> list[Patch]:
    """The target's token after all drafts has the noise of the position after."""
    return _bonus_noise_moved(1)


def _bonus_noise_moved(by: int) -> list[Patch]:
    def choose(logits: mx.array, positions: mx.array, *rest: Any, **more: Any) -> Any:
        rows = positions.shape[1]
        is_bonus = (mx.arange(rows) == rows - 1) & (rows > 1)
        return sound_choose(logits, positions + by * is_bonus, *rest, **more)

    return [(stages, "choose", choose)]


class Watcher:
    """Remembers the tokens that verify got, so that a later stage can misuse them."""

    def __init__(self) -> None:
        self.drafts = mx.zeros((0, 0), mx.uint32)

    def verify(self, target: Any, tokens: mx.array, *rest: Any, **more: Any) -> Any:
        self.drafts = tokens[:, 1:]
        return sound_verify(target, tokens, *rest, **more)


def drafts_emitted() -> list[Patch]:
    """What is emitted is the draft, where there is one, and not the target's choice."""
    watcher = Watcher()

    def choose(*arguments: Any, **more: Any) -> Any:
        chosen, valid = sound_choose(*arguments, **more)
        return mx.concatenate([watcher.drafts, chosen[:, watcher.drafts.shape[1] :]], axis=1), valid

    return [(stages, "verify", watcher.verify), (stages, "choose", choose)]


def drafts_favoured() -> list[Patch]:
    """The drafter's proposal leaks into the target's logits."""
    watcher = Watcher()

    def choose(logits: mx.array, *rest: Any, **more: Any) -> Any:
        drafted = stages._one_hot(watcher.drafts, logits.shape[-1])
        leak = mx.concatenate([drafted, mx.zeros_like(logits[:, :1]).astype(drafted.dtype)], axis=1)
        return sound_choose(logits + 0.5 * leak, *rest, **more)

    return [(stages, "verify", watcher.verify), (stages, "choose", choose)]


def rejected_drafts_penalised() -> list[Patch]:
    """A commit counts every verified row's choice, those after the first mismatch too."""

    def commit(state: State, kv: Any, hidden: mx.array, chosen: mx.array, n: mx.array, sampler: Any) -> State:
        after = sound_commit(state, kv, hidden, chosen, n, sampler)
        if after.counts is None:
            return after
        added = stages._one_hot(chosen, after.counts.shape[-1]).sum(axis=1) * (n >= 0)[:, None]
        return after._replace(counts=state.counts + mx.stack([mx.zeros_like(added), added], axis=1))

    return [(stages, "commit", commit)]


def drafts_not_penalised() -> list[Patch]:
    """Every verified row sees the counts of the round's start, without the drafts before it."""

    def counts_by_row(state: State, sampler: Any) -> mx.array | None:
        counts = sound_counts(state, sampler)
        return None if counts is None else mx.broadcast_to(counts[:, :1], counts.shape)

    return [(stages, "_counts_by_row", counts_by_row)]


def temperature_forgotten() -> list[Patch]:
    """Verify chooses at temperature 1."""

    def choose(
        logits: mx.array, positions: mx.array, seed: mx.array, sampling: dict, *rest: Any, **more: Any
    ) -> Any:
        at_one = {**sampling, "temperature": mx.ones_like(sampling["temperature"])}
        return sound_choose(logits, positions, seed, at_one, *rest, **more)

    return [(stages, "choose", choose)]


def one_accepted_too_many() -> list[Patch]:
    def accept(drafts: mx.array, *rest: mx.array) -> mx.array:
        n = sound_accept(drafts, *rest)
        return mx.where(n >= 0, mx.minimum(n + 1, drafts.shape[1]), n)

    return [(stages, "accept", accept)]


def one_accepted_too_few() -> list[Patch]:
    def accept(*arguments: mx.array) -> mx.array:
        n = sound_accept(*arguments)
        return mx.where(n > 0, n - 1, n)

    return [(stages, "accept", accept)]


def drafter_noise_of_its_own() -> list[Patch]:
    """Drafts are drawn with another seed than the target's choices."""

    def draft(target: Any, drafter: Any, state: State, *rest: Any, **more: Any) -> mx.array:
        return sound_draft(target, drafter, state._replace(seed=state.seed + 10**9), *rest, **more)

    return [(stages, "draft", draft)]
