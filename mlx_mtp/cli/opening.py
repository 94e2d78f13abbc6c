"""Opening a pair for a command: what is missing is asked for first, progress is shown, memory limits are set."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import mlx_mtp
from mlx_mtp.cli import options
from mlx_mtp.cli.progress_line import ProgressLine
from mlx_mtp.cli.terminal import say
from mlx_mtp.errors import ParameterError

if TYPE_CHECKING:
    from mlx_mtp.pair import Pair

DEMO = "demo"
DEMO_NOTICE = """\
demo: a tiny model made for this program, trained on Python's standard library,
its documentation and questions about MTP. It is not Gemma. It shows how drafting
works: it writes Python-like code and answers questions about Gemma, MTP, MLX and
this program. It is no assistant: all else that it says is mostly wrong."""
RESUMES = "(stopped; what has arrived is kept, and the same command goes on from there)"


@dataclass(frozen=True, slots=True)
class Opening:
    """Which model a command asked for and how: the options as they were typed, checked."""

    model: str
    drafter: str = "auto"  # "auto", "none", a name or a folder
    quantize: int | None = None
    drafter_bits: Literal["auto"] | int | None = "auto"
    revision: str | None = None
    context: int | None = None
    yes: bool = False

    @property
    def drafter_or_none(self) -> str | None:
        """As `load` takes it."""
        return None if self.drafter == "none" else self.drafter

    def of(self, model: str) -> "Opening":
        """The same for another model."""
        return replace(self, model=model)

    @property
    def is_plain(self) -> bool:
        """Whether the name alone opens the same again."""
        return self == Opening(self.model, yes=self.yes)


def opening(
    *,
    drafter: options.Drafter = "auto",
    quantize: options.Quantize = None,
    drafter_bits: options.DrafterBits = "auto",
    revision: options.Revision = None,
    context: options.Context = None,
    yes: options.Yes = False,
) -> Opening:
    """Options as they were typed, without a model yet; refused before anything is looked up or downloaded."""
    if quantize not in (None, 4, 8):
        raise ParameterError(f"--quantize takes 4 or 8 bits, got {quantize}; leave it out to keep the file's")
    if drafter_bits not in ("auto", "4", "8", "16"):
        raise ParameterError(f"--drafter-bits takes auto, 4, 8 or 16, got {drafter_bits!r}; leave it out")
    if context is not None and context < 1:
        raise ParameterError(f"--context takes a number of tokens from 1 on, got {context}; leave it out")
    bits: Literal["auto"] | int | None = "auto"
    if drafter_bits != "auto":
        bits = None if drafter_bits == "16" else int(drafter_bits)
    return Opening("", drafter, quantize, bits, revision, context, yes)


@contextmanager
def opened(asked: Opening) -> Iterator["Pair"]:
    """The pair, inside this machine's memory limits; asks before a download, notices go to stderr."""
    from mlx_mtp.cli.downloads import settle_downloads
    from mlx_mtp.limits import memory_limits
    from mlx_mtp.machine import check_machine, this_machine
    from mlx_mtp.profiles import kept_times

    check_machine(this_machine())
    if asked.model == DEMO:
        say(DEMO_NOTICE)
    asked = settle_downloads(asked)
    with memory_limits(this_machine()):
        pair = _load(asked)
        for warning in pair.warnings:
            say(f"warning: {warning}")
        with kept_times(pair) as trouble:
            if trouble is not None:
                say(f"warning: {trouble}")
            yield pair


def _load(asked: Opening) -> "Pair":
    with progress_shown() as on_progress:
        return mlx_mtp.load(
            asked.model,
            drafter=asked.drafter_or_none,
            quantize=asked.quantize,
            drafter_bits=asked.drafter_bits,
            revision=asked.revision,
            max_context=asked.context,
            on_progress=on_progress,
        )


@contextmanager
def progress_shown() -> Iterator[ProgressLine]:
    """A progress line; a download that Ctrl-C ends says that it can go on."""
    line = ProgressLine()
    try:
        with line:
            yield line
    except KeyboardInterrupt:
        if line.last_stage == "download":
            say(RESUMES)
        raise
