"""Engines on golden pairs, and what the same requests give alone."""

import functools
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from mlx_mtp import Engine, generate
from mlx_mtp.pair import Pair
from mlx_mtp.sampling import Sampling
from pairs import golden_pair
from talks import golden_text

LONG = 400  # tokens: a reply that goes on until it is ended
WITHIN_S = 60.0  # what any wait may take on a busy machine


@functools.cache
def pair_of(variant: str = "e2b", max_context: int = 512) -> Pair:
    return replace(golden_pair(variant), max_context=max_context)


@contextmanager
def engine_on(variant: str = "e2b", *, max_context: int = 512, **options: Any) -> Iterator[Engine]:
    with Engine(pair_of(variant, max_context), **options) as engine:
        yield engine


def ids_of(variant: str = "e2b", start: int = 0, count: int = 20) -> list[int]:
    """Ids of a golden prompt, from any of its places on."""
    every = [*golden_text(variant, "long")[0], *golden_text(variant, "short")[0]] * 4
    return every[start : start + count]


def words(seed: int, count: int) -> list[int]:
    """Ordinary tokens that no other seed has in this order."""
    return random.Random(seed).choices(range(30, 250), k=count)


def sampled(seed: int) -> Sampling:
    return Sampling(temperature=1.0, seed=seed)


def alone(ids: list[int], variant: str = "e2b", max_context: int = 512, **options: Any) -> list[int]:
    """The tokens of a cold run without drafts."""
    return generate(pair_of(variant, max_context), ids, **(options | {"num_draft_tokens": 0})).tokens


def until(is_so: Callable[[], bool], within_s: float = WITHIN_S) -> float:
    """Wait until it is so -> how long that took."""
    began = time.monotonic()
    while not is_so():
        assert time.monotonic() - began < within_s, "it took too long"
        time.sleep(0.005)
    return time.monotonic() - began
