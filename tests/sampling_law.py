"""Do streams of tokens follow the law that a logits table and the settings give? Chi-square and total variation."""

from dataclasses import dataclass
from math import pi, sqrt

import numpy as np
from scipy import stats

from markov_pair import PROMPT, VOCAB
from mlx_mtp.sampling import Sampling
from sampling_reference import reference_adjusted, reference_law

ALPHA = 1e-6  # per p-value
FEW = 5.0  # cells that expect fewer are counted together


@dataclass(frozen=True, slots=True)
class LawReport:
    """`by_step[j]` is the p-value of token j given the one before, `joint` that of tokens 1, 2 and 3 together."""

    by_step: tuple[float, ...]
    joint: float
    tv: float
    tv_bound: float

    @property
    def holds(self) -> bool:
        return min(*self.by_step, self.joint) > ALPHA and self.tv <= self.tv_bound


def law_report(tokens: np.ndarray, logits: np.ndarray, setting: Sampling) -> LawReport:
    """tokens [N, L >= 4] drawn after PROMPT from a Markov table logits [V, V]."""
    joint = joint_law(logits, setting)
    cells = (tokens[:, 1] * VOCAB + tokens[:, 2]) * VOCAB + tokens[:, 3]
    counts = np.bincount(cells, minlength=VOCAB**3)
    tv = 0.5 * np.abs(counts / len(tokens) - joint).sum()
    # The mean of the distance over C cells is at most the first term; McDiarmid bounds what is above it (4e-6).
    bound = sqrt((joint > 0).sum() / (2 * pi * len(tokens))) + 2.5 / sqrt(len(tokens))
    return LawReport(
        by_step=step_p_values(tokens, logits, setting),
        joint=pooled_p_value(counts[None], len(tokens) * joint[None]),
        tv=tv,
        tv_bound=bound,
    )


def step_p_values(tokens: np.ndarray, logits: np.ndarray, setting: Sampling) -> tuple[float, ...]:
    """For each token of the streams: is it drawn from what its own stream so far gives?

    Streams with the same token before are counted together. With penalties their laws differ, which only makes the
    statistic smaller than chi-square.
    """
    counts = Counts(len(tokens))
    last = np.full(len(tokens), PROMPT[-1])
    p_values = []
    for now in tokens.T:
        law = reference_law(counts.adjusted(logits[last], setting), setting)
        observed, expected = np.zeros((VOCAB, VOCAB)), np.zeros((VOCAB, VOCAB))
        np.add.at(observed, (last, now), 1)
        np.add.at(expected, last, law)
        impossible = (law[np.arange(len(now)), now] == 0).any()
        p_values.append(0.0 if impossible else pooled_p_value(observed, expected))
        counts.add(now)
        last = now
    return tuple(p_values)


def joint_law(logits: np.ndarray, setting: Sampling) -> np.ndarray:
    """The exact probability [V^3] of tokens 1, 2 and 3 together; token 0 is summed over."""
    paths = np.indices((VOCAB,) * 4).reshape(4, -1)
    counts = Counts(paths.shape[1])
    last = np.full(paths.shape[1], PROMPT[-1])
    probability = np.ones(paths.shape[1])
    for now in paths:
        law = reference_law(counts.adjusted(logits[last], setting), setting)
        probability *= law[np.arange(len(now)), now]
        counts.add(now)
        last = now
    return probability.reshape(VOCAB, -1).sum(0)


class Counts:
    """How often each token stands in the prompt and in each stream so far."""

    def __init__(self, streams: int):
        self._in_prompt = np.bincount(PROMPT, minlength=VOCAB)
        self._generated = np.zeros((streams, VOCAB), np.int64)

    def adjusted(self, logits: np.ndarray, setting: Sampling) -> np.ndarray:
        return reference_adjusted(logits, setting, self._in_prompt, self._generated)

    def add(self, tokens: np.ndarray) -> None:
        self._generated[np.arange(len(tokens)), tokens] += 1


def pooled_p_value(observed: np.ndarray, expected: np.ndarray) -> float:
    """Chi-square over groups (rows) of cells; in each, cells that expect few are counted together."""
    if (observed[expected == 0] > 0).any():
        return 0.0
    statistic, freedom = 0.0, 0
    for seen, hoped in zip(observed, expected, strict=True):
        often = hoped >= FEW
        cells = [*zip(seen[often], hoped[often], strict=True), (seen[~often].sum(), hoped[~often].sum())]
        cells = [cell for cell in cells if cell[1] >= FEW]
        statistic += sum((count - mean) ** 2 / mean for count, mean in cells)
        freedom += max(len(cells) - 1, 0)
    return float(stats.chi2.sf(statistic, freedom)) if freedom else 1.0
