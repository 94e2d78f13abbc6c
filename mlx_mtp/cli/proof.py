"""MTP on against MTP off: the runs, what was equal, and whether differences can be rounding."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import mlx_mtp
from mlx_mtp.errors import GenerationError
from mlx_mtp.flips import Flip, first_flip
from mlx_mtp.pair import Pair
from mlx_mtp.reply import Generation
from mlx_mtp.sampling import Sampling

NumDraftTokens = int | Literal["auto"]


@dataclass(frozen=True, slots=True)
class Part:
    """One prompt at which MTP on and off gave other texts."""

    prompt: int
    flip: Flip


@dataclass(frozen=True, slots=True)
class Compared:
    """All prompts under one sampling and one number of drafts; `tokens` counts those that were equal and compared."""

    sampling: str
    num_draft_tokens: NumDraftTokens
    texts: int
    tokens: int
    tokens_per_round: float
    parts: tuple[Part, ...]

    @property
    def illegitimate(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if not part.flip.legitimate)


def without_end(pair: Pair, sampling: Sampling) -> Sampling:
    """The same sampling with end-of-turn tokens kept out, so that every text has its full length."""
    bias = {token: float("-inf") for token in pair.prompt_format.eos_ids}
    return replace(sampling, logit_bias={**(sampling.logit_bias or {}), **bias})


def compare(
    pair: Pair,
    prompts: list[list[int]],
    *,
    name: str,
    sampling: Sampling,
    drafts: tuple[NumDraftTokens, ...],
    tokens: int,
    on_text: Callable[[], None],
) -> tuple[list[Compared], list[list[int]]]:
    """Play every prompt plain and with each number of drafts -> what was found, and the plain texts.

    Prompt i has seed i. `on_text` is called after each text.
    """
    found: dict[NumDraftTokens, list[tuple[Generation, Flip | None, int]]] = {k: [] for k in drafts}
    plain = []
    for i, ids in enumerate(prompts):
        row = replace(without_end(pair, sampling), seed=i)
        off = _play(pair, ids, row, 0, tokens)
        plain.append(off.tokens)
        on_text()
        for k in drafts:
            on = _play(pair, ids, row, k, tokens)
            flip = first_flip(pair, ids, off.tokens, on.tokens, row, _usual_rows(on))
            found[k].append((on, flip, len(on.tokens) if flip is None else flip.index))
            on_text()
    return [_summary(name, k, found[k]) for k in drafts], plain


def _play(pair: Pair, ids: list[int], sampling: Sampling, k: NumDraftTokens, tokens: int) -> Generation:
    out = mlx_mtp.generate(pair, ids, max_tokens=tokens, sampling=sampling, num_draft_tokens=k)
    if out.finish_reason == "error":
        raise GenerationError(
            f"{pair.name} gave no finite logits to choose from; check or download the model again"
        )
    return out


def _usual_rows(on: Generation) -> int:
    """The commonest number of rows of a pass that verified drafts."""
    played = Counter(k for k in on.stats.num_draft_tokens if k)
    return 1 + (played.most_common(1)[0][0] if played else 0)


def _summary(name: str, k: NumDraftTokens, texts: list[tuple[Generation, Flip | None, int]]) -> Compared:
    rounds = sum(on.stats.rounds for on, _, _ in texts)
    emitted = sum(on.stats.generation_tokens - 1 for on, _, _ in texts)
    return Compared(
        sampling=name,
        num_draft_tokens=k,
        texts=len(texts),
        tokens=sum(same for _, _, same in texts),
        tokens_per_round=emitted / rounds if rounds else 0.0,
        parts=tuple(Part(i, flip) for i, (_, flip, _) in enumerate(texts) if flip is not None),
    )
