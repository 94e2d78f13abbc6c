"""Drafting at position P against P - 1: both at every token of the same text, so that the difference is paired."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import mlx.core as mx

from mlx_mtp.draft import draft
from mlx_mtp.drafter import Drafter
from mlx_mtp.layers import Rope, Rotation
from mlx_mtp.pair import Pair
from mlx_mtp.report.donation import SAMPLER, fresh_state
from mlx_mtp.report.observe import forward_rows
from mlx_mtp.report.protocol import Deadline, Found, NotHere
from mlx_mtp.report.setting import GREEDY, Setting, play, rounded
from mlx_mtp.state import State, bucket_for

K = 4
CONTROL = "P-16"  # plainly wrong: where even this costs nothing, P against P - 1 cannot matter
CLEAR = 2.0  # standard errors from which a difference is called one

Drafts = Callable[[State], mx.array]


@dataclass(frozen=True, slots=True)
class ShiftedRope(Rope):
    """A rope whose positions are all `shift` further on."""

    shift: int = 0

    def at(self, position: mx.array | int, rows: int) -> Rotation:
        return Rope.at(self, position + self.shift, rows)


def shifted(drafter: Drafter, shift: int) -> Drafter:
    """The drafter working at position P + shift, where P is what `drafter.view_for_drafter` gives it."""
    ropes: dict[str, Rope] = {
        kind: ShiftedRope(rope.frequencies, shift) for kind, rope in drafter.ropes.items()
    }
    return replace(drafter, ropes=ropes)


def drafter_position(setting: Setting, found: Found, deadline: Deadline) -> None:
    """Drafts at P, as transformers makes them, and at P - 1, as mlx-vlm does, against the model's own replies."""
    pair = setting.the_pair
    if pair.drafter is None:
        raise NotHere("the model was opened without a drafter")
    arms = {"P": pair.drafter, "P-1": shifted(pair.drafter, -1), CONTROL: shifted(pair.drafter, -16)}
    kept: dict[str, list[int]] = {name: [] for name in arms}
    found["k"] = K
    try:
        for ids in setting.prompt_tokens().values():
            deadline.check()
            reply = play(pair, ids, k=0, tokens=setting.tokens, sampling=GREEDY).tokens
            count_kept(pair, arms, ids, reply, kept, deadline)
    finally:
        found.update(paired(kept))


def count_kept(
    pair: Pair,
    arms: dict[str, Drafter],
    prompt: list[int],
    reply: list[int],
    kept: dict[str, list[int]],
    deadline: Deadline,
) -> None:
    """Append to `kept`, for each arm and each token of the reply that K more follow, how many of K drafts made there
    are the text's."""
    ids = [*prompt, *reply]
    bucket = bucket_for(len(ids) + 32)
    template = fresh_state(pair, prompt, len(prompt) + 64)._replace(kv=())
    makers = {name: _maker(pair, drafter, template, bucket) for name, drafter in arms.items()}
    before: mx.array | None = None  # the hidden row of the token before the pass
    for low, hidden, kv in forward_rows(pair.target, ids, start=max(1, len(prompt) - 1)):
        rows = hidden if before is None else mx.concatenate([before, hidden], axis=1)
        first = low + hidden.shape[1] - rows.shape[1]  # position of rows[:, 0]
        for row in range(rows.shape[1] - 1):
            at = first + row + 1  # the last committed token, whose successors are drafted
            if at + K >= len(ids):
                break
            deadline.check()
            state = template._replace(
                kv=kv,
                length=mx.array([at], mx.int32),
                last=mx.array([ids[at]], mx.uint32),
                hidden=rows[:, row : row + 1],
            )
            drafts = {name: make(state) for name, make in makers.items()}
            mx.eval(drafts)
            for name, tokens in drafts.items():
                kept[name].append(_agreeing(tokens.reshape(-1).tolist(), ids[at + 1 : at + 1 + K]))
        before = hidden[:, -1:]


def _maker(pair: Pair, drafter: Drafter, template: State, bucket: int) -> Drafts:
    def make(kv: object, length: mx.array, last: mx.array, hidden: mx.array) -> mx.array:
        state = template._replace(kv=kv, length=length, last=last, hidden=hidden)  # type: ignore[arg-type]
        return draft(pair.target, drafter, state, SAMPLER, k=K, bucket=bucket)

    function = mx.compile(make) if pair.rounds.compiled else make
    return lambda state: function(state.kv, state.length, state.last, state.hidden)


def _agreeing(drafts: object, text: Sequence[int]) -> int:
    assert isinstance(drafts, list)
    return next((i for i, (a, b) in enumerate(zip(drafts, text, strict=True)) if a != b), len(text))


def paired(kept: dict[str, list[int]]) -> Found:
    """Means by arm, P less each other arm with its standard error, and which of P and P - 1 is better, if clear."""
    found: Found = {name: summary(counts) for name, counts in kept.items()}
    places = min(len(counts) for counts in kept.values())
    if places < 2:
        return found
    for name, counts in kept.items():
        if name == "P":
            continue
        differences = [a - b for a, b in zip(kept["P"], counts, strict=False)]
        mean = statistics.fmean(differences)
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        clear = abs(mean) > CLEAR * error
        better = ("P" if mean > 0 else name) if clear else "undecided"
        found[f"P against {name}"] = {
            "difference": rounded(mean),
            "standard_error": rounded(error),
            "better": better,
        }
    return found


def summary(counts: list[int]) -> Found:
    """counts: drafts kept at each token -> their mean, and how often draft j was kept when those before it were."""
    reached = [sum(count >= j for count in counts) for j in range(K + 1)]
    return {
        "places": len(counts),
        "kept_of_k": rounded(statistics.fmean(counts)) if counts else None,
        "by_position": [rounded(b / a) if a else None for a, b in pairwise(reached)],
    }
