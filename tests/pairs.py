"""Ready-made pairs for tests: the golden targets with a drafter of a chosen quality, in the real Pair."""

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from mlx_mtp.checkpoint import read_drafter, read_target
from mlx_mtp.drafter import Drafter, make_drafter
from mlx_mtp.pair import Pair
from mlx_mtp.prompt import PromptFormat, load_prompt_format
from mlx_mtp.round import Rounds
from mlx_mtp.sampling import Sampling
from mlx_mtp.target import make_target
from tiny_tokenizer import write_tokenizer

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = ("e2b", "e4b", "12b", "31b", "a4b")


@functools.cache
def prompt_format() -> PromptFormat:
    """A format of 512 tokens that ends nowhere; golden targets use its first 256."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        return replace(load_prompt_format(Path(folder), eos_ids=()), eos_ids=frozenset())


def golden_pair(
    variant: str,
    *,
    drafter: Drafter | str | None = "golden",
    compiled: bool = False,
    eos: tuple[int, ...] = (),
) -> Pair:
    """The golden target with its fitted drafter (about three quarters of the drafts right), another one, or none."""
    checkpoint = read_target(GOLDEN / variant / "target")
    target = make_target(checkpoint.config, checkpoint.tensors)
    if drafter == "golden":
        small = read_drafter(GOLDEN / variant / "drafter")
        drafter = make_drafter(small.config, small.tensors)
    return Pair(
        name=variant,
        target=target,
        drafter=drafter,
        prompt_format=replace(prompt_format(), eos_ids=frozenset(eos)),
        sampling=Sampling(temperature=0.0),
        max_context=512,
        rounds=Rounds(target, drafter, compiled=compiled),
    )


def random_drafter(variant: str, seed: int = 5) -> Drafter:
    """The golden drafter with noise for weights: almost every draft is wrong."""
    small = read_drafter(GOLDEN / variant / "drafter")
    drafter = make_drafter(small.config, small.tensors)
    noise = mx.random.normal(drafter.post_projection.shape, key=mx.random.key(seed))
    return replace(
        drafter,
        pre_projection=replace(drafter.pre_projection, weight=mx.zeros(drafter.pre_projection.shape)),
        post_projection=replace(drafter.post_projection, weight=noise),
    )
