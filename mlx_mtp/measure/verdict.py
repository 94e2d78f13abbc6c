"""Whether the text stayed the same: MTP's tokens against plain decoding's, and our model against mlx-lm's."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from mlx_mtp.against_mlx_lm import agreement_of
from mlx_mtp.flips import first_flip
from mlx_mtp.measure.clock import Prompt
from mlx_mtp.pair import Pair
from mlx_mtp.sampling import Sampling

DIAGNOSED = (
    3  # texts that part, of an arm and case, whose parting is looked into: each is forced through twice
)
LONGEST_FORCED = 1024  # tokens of a text forced through mlx-lm: it gives the logits of all of them at once
FORCED = 2  # texts of a case


def verdict_on(
    pair: Pair,
    prompts: Sequence[Prompt],
    plain: Sequence[list[int]],
    drafted: Sequence[list[int]],
    sampling: Sampling,
    rounds: Mapping[int, int],
) -> dict[str, Any]:
    """Texts with MTP against the same without; `rounds`: how many the arm played, by drafts verified.

    A text counts up to and with its first other token: what follows that follows from it.
    """
    compared, parted, flips = 0, 0, []
    rows = 1 + max((k for k in rounds if k), key=lambda k: rounds[k], default=0)
    for i, (prompt, off, on) in enumerate(zip(prompts, plain, drafted, strict=True)):
        at = first_difference(off, on)
        compared += len(off) if at is None else at + 1
        if at is None:
            continue
        parted += 1
        if at >= min(len(off), len(on)):
            flips.append({"text": i, "index": at, "is_rounding": False, "why": "one text is shorter"})
        elif len(flips) < DIAGNOSED:
            flips.append(_diagnosed(pair, i, prompt, off, on, sampling, rows))
    return {
        "texts": len(plain),
        "tokens": compared,
        "parted": parted,
        "per_1000": 1000 * parted / compared if compared else 0.0,
        "first": flips,
        "is_rounding": all(flip["is_rounding"] for flip in flips),
    }


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Where two texts part, None where they do not; a shorter one parts at its end."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return None if len(one) == len(other) else min(len(one), len(other))


def _diagnosed(
    pair: Pair, i: int, prompt: Prompt, off: list[int], on: list[int], sampling: Sampling, rows: int
) -> dict[str, Any]:
    flip = first_flip(pair, prompt.ids, off, on, replace(sampling, seed=prompt.seed), rows)
    assert flip is not None, "the texts differ"
    cause = "rounding" if flip.legitimate else "NOT explained by rounding"
    return {
        "text": i,
        **asdict(flip),
        "is_rounding": flip.legitimate,
        "why": f"{cause}: gap {flip.gap:.3g}, the paths differ by {flip.difference:.3g}",
    }


def mlx_lm_agrees(
    model: Any, pair: Pair, prompts: Sequence[Prompt], texts: Sequence[list[int]]
) -> dict[str, Any] | None:
    """Our plain greedy texts forced through mlx-lm's model; None where none is short enough."""
    chosen = [
        (prompt.ids, text)
        for prompt, text in zip(prompts, texts, strict=True)
        if len(prompt.ids) + len(text) <= LONGEST_FORCED
    ][:FORCED]
    if not chosen:
        return None
    found = agreement_of(model, pair, [ids for ids, _ in chosen], [text for _, text in chosen])
    return {**asdict(found), "passes": found.passes}
