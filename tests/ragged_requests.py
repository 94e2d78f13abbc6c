"""Twelve requests of all lengths and samplings, what each gives alone, and all of them decoded together."""

import functools

from mlx_mtp import generate
from mlx_mtp.batch import generate_rows
from mlx_mtp.batch_watch import Watch
from mlx_mtp.conversation import Request, make_request
from mlx_mtp.errors import MemoryRefusal
from mlx_mtp.policy import make_policy
from mlx_mtp.reply import Generation
from mlx_mtp.sampling import Sampling
from pairs import golden_pair
from scripted_guard import ScriptedGuard
from talks import golden_text

pair_of = functools.cache(golden_pair)

# Twelve requests: prompts of 4 to 60 ids, replies of 1 to 40 tokens, every second greedy, two with penalties.
LENGTHS = (9, 1, 23, 40, 2, 17, 5, 31, 12, 3, 26, 8)
STARTS = (4, 60, 17, 33, 8, 50, 21, 5, 44, 12, 29, 38)


def sampling_of(i: int) -> Sampling:
    if i % 2 == 0:
        return Sampling(temperature=0.0)
    if i in (3, 9):
        return Sampling(temperature=1.0, presence_penalty=0.8, repetition_penalty=1.3, seed=i)
    return Sampling(temperature=0.9, top_p=0.95, top_k=20 * (i % 3), seed=i)


@functools.cache
def twelve(variant: str) -> list[Request]:
    ids = [*golden_text(variant, "long")[0], *golden_text(variant, "short")[0]] * 3
    return [
        make_request(pair_of(variant), ids[i : i + STARTS[i]], max_tokens=LENGTHS[i], sampling=sampling_of(i))
        for i in range(12)
    ]


@functools.cache
def solo(variant: str) -> list[list[int]]:
    """Each alone, plain."""
    return [
        generate(
            pair_of(variant),
            request.ids,
            max_tokens=request.max_tokens,
            sampling=request.sampling,
            num_draft_tokens=0,
        ).tokens
        for request in twelve(variant)
    ]


def together(requests, k, *, width=4, guard=None, variant="e2b", watch=None) -> list[Generation]:
    policy = make_policy(k, has_drafter=True)
    return generate_rows(
        pair_of(variant), requests, policy, guard or ScriptedGuard(), watch or Watch(), max_batch=width
    )


def refusing(*refused: int):
    calls = iter(range(1000))

    def admits(needed: int) -> None:
        if next(calls) in refused:
            raise MemoryRefusal("it does not fit; shorten the prompt")

    return admits
