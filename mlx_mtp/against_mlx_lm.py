"""Our greedy text through mlx-lm's own model: a port that is wrong in the same way everywhere cannot pass this."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_mtp.errors import CheckpointError
from mlx_mtp.flips import forced_logits

if TYPE_CHECKING:
    from mlx_mtp.pair import Pair

ROWS = 16  # rows of our own passes


@dataclass(frozen=True, slots=True)
class Agreement:
    """Our plain greedy texts under both models; log-probabilities in nats."""

    tokens: int
    agreed: int  # mlx-lm's best token is ours
    largest_gap: float  # mlx-lm's log-prob of its best token less that of ours, at worst
    largest_difference: float  # between the two log-probs of a token of ours, at worst
    mean_difference: float
    tolerance: float

    @property
    def passes(self) -> bool:
        within = max(self.largest_gap, self.largest_difference) <= self.tolerance
        return within and self.mean_difference <= self.tolerance / 10


def agreement(pair: "Pair", folder: Path, prompts: list[list[int]], texts: list[list[int]]) -> Agreement:
    """Teacher-force `texts` through mlx-lm's model of `folder` and through ours, in the dtype of `pair`."""
    return agreement_of(load_mlx_lm(pair, folder), pair, prompts, texts)


def agreement_of(model: Any, pair: "Pair", prompts: list[list[int]], texts: list[list[int]]) -> Agreement:
    """`agreement`, with what `load_mlx_lm` gave."""
    agreed, gaps, differences = 0, [], []
    for ids, text in zip(prompts, texts, strict=True):
        theirs = _log_probs(pair, model(mx.array([ids + text[:-1]], mx.uint32))[0, len(ids) - 1 :])
        ours = _log_probs(pair, forced_logits(pair, ids, text[:-1], rows=ROWS))
        tokens = mx.array(text, mx.uint32)[:, None]
        their_own, our_own = (mx.take_along_axis(rows, tokens, axis=-1)[:, 0] for rows in (theirs, ours))
        gaps.append(np.array(theirs.max(axis=-1) - their_own))
        differences.append(np.array(mx.abs(their_own - our_own)))
        agreed += int(np.sum(np.array(mx.argmax(theirs, axis=-1)) == np.array(text)))
    together = np.concatenate(differences)
    return Agreement(
        tokens=together.size,
        agreed=agreed,
        largest_gap=float(np.concatenate(gaps).max()),
        largest_difference=float(together.max()),
        mean_difference=float(together.mean()),
        tolerance=0.02 if pair.target.dtype == mx.float32 else 1.0,
    )


def _log_probs(pair: "Pair", logits: mx.array) -> mx.array:
    """Logits [N, V] -> log-probabilities float32, the end-of-turn tokens left out as they were while playing."""
    logits = logits.astype(mx.float32)
    logits[:, mx.array(sorted(pair.prompt_format.eos_ids), mx.uint32)] = -mx.inf
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def load_mlx_lm(pair: "Pair", folder: Path) -> Any:
    """mlx-lm's own model of `folder` in the dtype of `pair`. Raises CheckpointError where it has none."""
    with file_limits_kept():
        from mlx_lm.utils import load_model
    try:
        model = load_model(folder)[0]
    except (ValueError, ImportError) as error:
        raise CheckpointError(f"mlx-lm cannot load {folder}: {error}; leave out mlx-lm") from error
    model.set_dtype(pair.target.dtype)
    return model


@contextmanager
def file_limits_kept() -> Iterator[None]:
    """Importing mlx-lm lowers the process's open-file limit, the hard one too, for good; here it cannot."""
    set_limit = resource.setrlimit

    def keep(which: int, limits: tuple[int, int]) -> None:
        if which != resource.RLIMIT_NOFILE:
            set_limit(which, limits)

    resource.setrlimit = keep
    try:
        yield
    finally:
        resource.setrlimit = set_limit
