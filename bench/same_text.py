"""Same seed, same text, where rounding differs: how many texts change with drafts, and how close those choices were.

    PYTHONPATH=tests python bench/same_text.py                                  # the BLAS in MLX's wheel
    PYTHONPATH=tests python bench/same_text.py --openblas /usr/lib/x86_64-linux-gnu/openblas-pthread/libopenblas.so.0

The wheel's reference BLAS computes each row by itself, so every text must be equal there. OpenBLAS does not: a text may
change where the two best choices are as close as the logits of one row differ between passes of 1 and of 16 rows.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from preload import MARK, check_preloaded, rerun_with

from mlx_mtp import Sampling
from mlx_mtp.exactness_probe import SPLITS, rows_are_invariant, rows_in_passes
from mlx_mtp.pair import Pair
from mlx_mtp.prefill import prefill
from mlx_mtp.state import new_kv
from mlx_mtp.target import logits_of
from pairs import VARIANTS, golden_pair, random_drafter
from sampling_reference import reference_adjusted, reference_gumbel, reference_law
from test_same_text import DRAFTERS, PENALTIES, PROMPTS, decoded, plain_texts, settings_of_rows

SETTINGS = (
    Sampling(temperature=0.0),
    Sampling(temperature=0.0, **PENALTIES),
    Sampling(temperature=0.7, top_k=20),
    Sampling(temperature=1.0, top_k=64, top_p=0.95),
    Sampling(temperature=1.0, **PENALTIES),
    Sampling(temperature=1.5, top_p=0.9),
)


@dataclass(frozen=True, slots=True)
class Flip:
    """Where a text first leaves plain decoding's, and by how much the two best choices differed there, in logits."""

    name: str
    token: int
    gap: float


def logit_difference(pair: Pair) -> float:
    """The largest difference of a logit between passes of 1 row and of 2 to 16."""
    vocab = pair.target.text.vocab_size
    ids = [(i * 7919 + 3) % vocab for i in range(40)]
    one = rows_in_passes(pair.target, ids, SPLITS[0], bucket=256, batch=1)
    others = (rows_in_passes(pair.target, ids, split, bucket=256, batch=1) for split in SPLITS[1:])
    return max(float(mx.abs(one - other).max()) for other in others)


def gap_at(pair: Pair, ids: list[int], prompt: int, setting: Sampling) -> float:
    """How far the best choice after `ids`, of which `prompt` were given, lies above the second, in logits."""
    hidden = prefill(pair.target, list(new_kv(pair.target, 512)), ids)
    logits = np.array(logits_of(pair.target, hidden), np.float64).reshape(1, -1)
    counts = [np.bincount(part, minlength=logits.shape[1]) for part in (ids[:prompt], ids[prompt:])]
    adjusted = reference_adjusted(logits, setting, counts[0], counts[1])
    if setting.temperature == 0:
        score, scale = adjusted[0], 1.0
    else:
        with np.errstate(divide="ignore"):
            score = np.log(reference_law(adjusted, setting)[0])
        scale = setting.temperature
        score = score + reference_gumbel(np.array(setting.seed), np.array(len(ids)), np.arange(len(score)))
    second, best = np.sort(score)[-2:]
    return float(scale * (best - second))


def flips(pair: Pair, setting: Sampling, patch: pytest.MonkeyPatch) -> Iterator[Flip | None]:
    """Every comparison of one setting: None where the text is the same."""
    texts = plain_texts(pair, settings_of_rows(setting, 3))
    for k, batch, drafter in itertools.product((1, 3, 6), (1, 3), DRAFTERS[1:]):
        rows = settings_of_rows(setting, batch)
        replies = decoded(pair, rows, k, drafter, texts, patch)
        for prompt, row, text, reply in zip(PROMPTS, rows, texts, replies, strict=False):
            at = next((i for i, (a, b) in enumerate(zip(text, reply.tokens, strict=True)) if a != b), None)
            if at is None:
                yield None
                continue
            name = f"{pair.name} T{setting.temperature} k{k} batch{batch} {drafter}"
            yield Flip(name, at, gap_at(pair, [*prompt, *text[:at]], len(prompt), row))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--openblas", type=Path, help="library to preload")
    parser.add_argument(MARK, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.openblas and not options.preloaded:
        rerun_with(options.openblas)
    if options.preloaded:
        print(f"OpenBLAS: four rows cost {check_preloaded():.1f} times one row")
    patch = pytest.MonkeyPatch()
    unexplained = 0
    for variant in VARIANTS:
        pair = golden_pair(variant, drafter=random_drafter(variant))
        exact, tolerance = rows_are_invariant(pair.target), logit_difference(pair)
        outcomes = [outcome for setting in SETTINGS for outcome in flips(pair, setting, patch)]
        changed = [outcome for outcome in outcomes if outcome is not None]
        legitimate = [flip for flip in changed if not exact and flip.gap <= 2 * tolerance]
        unexplained += len(changed) - len(legitimate)
        print(f"{variant}: rows invariant {exact}; a logit differs by up to {tolerance:.1e} between passes")
        print(f"  {len(outcomes) - len(changed)} of {len(outcomes)} texts equal plain decoding's")
        for flip in changed:
            print(f"  {flip.name}: token {flip.token}, best and second {flip.gap:.1e} apart")
    sys.exit(1 if unexplained else 0)


if __name__ == "__main__":
    main()
