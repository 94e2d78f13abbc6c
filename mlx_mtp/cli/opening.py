"""Opening a pair for a command, with what a person should know about it."""

from typing import TYPE_CHECKING

import mlx_mtp
from mlx_mtp.cli.terminal import say

if TYPE_CHECKING:
    from mlx_mtp.pair import Pair

DEMO_NOTICE = """\
demo: a tiny model made for this program, trained on Python's standard library,
its documentation and questions about MTP. It is not Gemma. It shows how drafting
works: it writes Python-like code and answers questions about Gemma, MTP, MLX and
this program. It is no assistant: all else that it says is mostly wrong."""


def open_pair(model: str, drafter: str) -> "Pair":
    """Load MODEL and its drafter; notices and warnings go to stderr."""
    if model == "demo":
        say(DEMO_NOTICE)
    pair = mlx_mtp.load(model, drafter=None if drafter == "none" else drafter)
    for warning in pair.warnings:
        say(f"warning: {warning}")
    return pair
