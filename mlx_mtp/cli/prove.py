"""`mlx-mtp prove`: is the text the same with MTP on and off, on this machine, with this model?"""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mlx_mtp.cli import options
from mlx_mtp.cli.opening import Opening, opened, opening
from mlx_mtp.cli.option_groups import takes
from mlx_mtp.cli.terminal import is_smart, say, write_answer, write_aside
from mlx_mtp.errors import PairError, ParameterError

if TYPE_CHECKING:
    from mlx_mtp.cli.proof import Compared
    from mlx_mtp.cli.proof_report import Report
    from mlx_mtp.pair import Pair

DRAFTS: tuple[int | Literal["auto"], ...] = (1, 4, "auto")


@takes(wanted=opening)
def prove(
    *,
    model: options.Model,
    wanted: Opening,
    prompts: Annotated[int, typer.Option("--prompts", help="How many of the built-in prompts.")] = 20,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens of each reply.")] = 512,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="mlx-lm", help="Check our text with another model code."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """Compare MTP on with MTP off. Exits with 1 where they differ by more than rounding can explain."""
    if against not in (None, "mlx-lm"):
        raise ParameterError(f"--against knows mlx-lm, got {against!r}; write --against mlx-lm")
    with opened(wanted.of(model)) as pair:
        if pair.drafter is None:
            raise PairError("there is no drafter, so nothing to prove; give one with --drafter PATH")
        report = _run(pair, prompts, tokens, against)
    write_answer((json.dumps(report.as_json()) if as_json else report.as_text()) + "\n")
    raise typer.Exit(0 if report.holds else 1)


def _run(pair: "Pair", count: int, tokens: int, against: str | None) -> "Report":
    from mlx_mtp.cli.proof import compare
    from mlx_mtp.cli.proof_prompts import proof_prompts
    from mlx_mtp.cli.proof_report import Report
    from mlx_mtp.sampling import Sampling

    prompts = proof_prompts(pair, count, tokens)
    exactness, tax = pair.exactness(), pair.exactness_tax()
    samplings = {"greedy": Sampling(temperature=0.0), "model defaults": pair.sampling}
    progress = Progress(len(samplings) * count * (1 + len(DRAFTS)))
    compared: list[Compared] = []
    greedy_texts: list[list[int]] = []
    for name, sampling in samplings.items():
        found, texts = compare(
            pair,
            prompts,
            name=name,
            sampling=sampling,
            drafts=DRAFTS,
            tokens=tokens,
            on_text=progress.advance,
        )
        compared += found
        greedy_texts = greedy_texts or texts
    progress.finish()
    agreed = None
    if against is not None:
        from mlx_mtp.against_mlx_lm import agreement

        assert pair.folder is not None, "load gives every pair its folder"
        say("teacher-forcing the greedy texts through mlx-lm ...")
        agreed = agreement(pair, pair.folder, prompts, greedy_texts)
    return Report(pair, exactness, tax, [len(ids) for ids in prompts], tokens, compared, agreed)


class Progress:
    """`12/160 texts` on stderr, rewritten in place on a terminal, at each tenth elsewhere."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0

    def advance(self) -> None:
        self._done += 1
        text = f"prove: {self._done}/{self._total} texts"
        if is_smart(sys.stderr):
            write_aside(f"\r{text}")
        elif self._done * 10 // self._total > (self._done - 1) * 10 // self._total:
            say(text)

    def finish(self) -> None:
        if is_smart(sys.stderr):
            write_aside("\n")
