"""The golden arrays (see golden/README.md), and states of the real pair to compare with them."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_mtp.pair import Pair
from mlx_mtp.prefill import CHUNK, prefill
from mlx_mtp.sampling import SamplerClass, Sampling, sampler_class, sampling_arrays
from mlx_mtp.state import KeysValues, State, capacity_for, new_kv, no_drafts
from mlx_mtp.target import Target
from pairs import GOLDEN, golden_pair

PROMPTS = ("short", "long")
WINDOW = 16
GREEDY: SamplerClass = sampler_class([Sampling(temperature=0.0)])


@dataclass(frozen=True, slots=True)
class Golden:
    """What transformers gave for one prompt of one variant; the fields are described in golden/README.md."""

    ids: np.ndarray
    logits: np.ndarray
    greedy: np.ndarray
    greedy_logits: np.ndarray
    penalised: np.ndarray
    position: np.ndarray
    last_token: np.ndarray
    hidden_in: np.ndarray
    strict_tokens: np.ndarray
    strict_logits: np.ndarray
    accepted: np.ndarray

    @property
    def prompt(self) -> list[int]:
        return self.ids.tolist()

    @property
    def text(self) -> list[int]:
        """Prompt and greedy text."""
        return self.greedy.tolist()

    @property
    def new_tokens(self) -> list[int]:
        """The greedy text alone."""
        return self.text[len(self.ids) :]


def golden(variant: str, prompt: str) -> Golden:
    arrays = np.load(GOLDEN / variant / "golden.npz")
    return Golden(**{name: arrays[f"{prompt}.{name}"] for name in Golden.__dataclass_fields__})


@functools.cache
def loaded(variant: str) -> Pair:
    """The golden pair, eager; shared by the tests of one file."""
    return golden_pair(variant)


def prefilled(target: Target, ids: Sequence[int], *, chunk: int = CHUNK) -> tuple[KeysValues, mx.array]:
    """K/V rows of `ids`, with room for as many as any test decodes, and the last row's hidden [1, 1, H]."""
    kv = list(new_kv(target, capacity_for(len(ids))))
    hidden = prefill(target, kv, ids, chunk=chunk)
    return tuple(kv), hidden


def state_after(target: Target, ids: Sequence[int], *, chunk: int = CHUNK) -> State:
    """A greedy state of one row in which all `ids` are committed: the last one has no K/V row yet."""
    kv, hidden = prefilled(target, ids[:-1], chunk=chunk)
    return State(
        kv=kv,
        length=mx.array([len(ids) - 1], mx.int32),
        last=mx.array([ids[-1]], mx.uint32),
        hidden=hidden,
        drafts=no_drafts(1),
        seed=mx.array([0], mx.uint32),
        sampling=sampling_arrays(Sampling(temperature=0.0), target.text.vocab_size),
        counts=None,
        active=mx.array([True]),
    )


def largest_gap(got: mx.array, want: np.ndarray) -> float:
    """max |got - want|; inf where something is not a number."""
    gap = np.abs(np.array(got, np.float64) - want).max()
    return float(gap) if np.isfinite(gap) else float("inf")
