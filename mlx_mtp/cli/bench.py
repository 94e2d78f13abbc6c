"""`mlx-mtp bench`: how fast is MTP here, is its text the same, and does it keep its word?"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_mtp.cli import options
from mlx_mtp.cli.layout import terminal_columns
from mlx_mtp.cli.opening import DEMO
from mlx_mtp.cli.terminal import say, write_answer
from mlx_mtp.errors import ParameterError, StorageError

if TYPE_CHECKING:
    from mlx_mtp.measure.plan import Settings
    from mlx_mtp.measure.results import Document

Many = list[str] | None


def bench(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help=f"{options.MODEL_HELP} The one used last if left out."),
    ] = None,
    drafter: options.Drafter = "auto",
    quantize: options.Quantize = None,
    drafter_bits: options.DrafterBits = "auto",
    revision: options.Revision = None,
    yes: options.Yes = False,
    short: Annotated[
        bool | None,
        typer.Option(
            "--short/--full", help="Minutes: few short prompts; or all. Short for demo, else in between."
        ),
    ] = None,
    workload: Annotated[
        Many, typer.Option("--workload", metavar="NAME,..", help="code, prose, chat, json, tool_call, ...")
    ] = None,
    context: Annotated[
        Many, typer.Option("--context", metavar="N,..", help="Tokens of each prompt; 0: prompts as written.")
    ] = None,
    batch: Annotated[Many, typer.Option("--batch", metavar="N,..", help="Replies written at a time.")] = None,
    sampling: Annotated[
        Many, typer.Option("--sampling", metavar="greedy,default", help="Default: the model's own settings.")
    ] = None,
    arms: Annotated[
        Many, typer.Option("--arms", metavar="NAME,..", help="plain, mlx-lm, auto, k=1 .. k=15.")
    ] = None,
    prompts: Annotated[
        int | None, typer.Option("--prompts", metavar="N", help="Of each workload, 1 to 8.")
    ] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", metavar="N", help="Of each reply.")] = None,
    repeats: Annotated[
        str | None,
        typer.Option("--repeats", metavar="N|MIN-MAX", help="More than MIN while a figure is noisy."),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option("--format", metavar="md|csv|json|jsonl", help="Data instead of a readable table."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write there instead of to stdout.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.svg|.png", help="Draw the run; needs matplotlib.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="FILE", help="Go on with a run that was interrupted.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", metavar="A.json B.json", help="Compare two runs instead of measuring."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="With --compare: also runs of other machines or models.")
    ] = False,
    guarantee: Annotated[
        bool,
        typer.Option("--guarantee", help="Exit with 1 unless MTP is never slower and its text the same."),
    ] = False,
) -> None:
    """Measure MTP against plain decoding, ours and mlx-lm's, and check that its text is the same."""
    chosen: dict[str, Any] = {
        "--workload": workload,
        "--context": context,
        "--batch": batch,
        "--sampling": sampling,
        "--arms": arms,
        "--prompts": prompts,
        "--tokens": tokens,
        "--repeats": repeats,
        "--short": short,
    }
    opening = {"drafter": drafter, "quantize": quantize, "drafter_bits": drafter_bits, "revision": revision}
    _check_words(form, output, resume, compare, force, guarantee, plot, chosen, opening, model)
    if compare is not None:
        _compare(compare, force=force)
        return
    if plot is not None:
        from mlx_mtp.measure.plots import check_plot

        check_plot(plot)
    if resume is not None:
        from mlx_mtp.cli.bench_run import go_on
        from mlx_mtp.measure.results import read_document

        document = go_on(read_document(resume), resume, model, yes=yes)
    else:
        document = _measure(model or _last_model(), chosen, {**opening, "yes": yes})
    _give(document, form, output, plot)
    if guarantee:
        raise typer.Exit(0 if _say_guarantee(document) else 1)


def _check_words(
    form: str | None,
    output: Path | None,
    resume: Path | None,
    compare: tuple[Path, Path] | None,
    force: bool,
    guarantee: bool,
    plot: Path | None,
    chosen: dict[str, Any],
    opening: dict[str, Any],
    model: str | None,
) -> None:
    """Refuse words that have no meaning together, and places that cannot be written, before anything is measured."""
    from mlx_mtp.measure.tables import FORMATS

    if form is not None and form not in FORMATS:
        raise ParameterError(
            f"--format is {', '.join(FORMATS)}, got {form!r}; leave it out for a readable table"
        )
    given = [name for name, value in chosen.items() if value is not None]
    given += [f"--{name.replace('_', '-')}" for name, value in opening.items() if value not in ("auto", None)]
    if resume is not None and given:
        raise ParameterError(f"--resume goes on with what its file asks for; leave out {', '.join(given)}")
    if compare is not None:
        others = {"MODEL": model, "--resume": resume, "--plot": plot, "--output": output, "--format": form}
        given += [name for name, value in others.items() if value is not None]
        given += ["--guarantee"] if guarantee else []
        if given:
            raise ParameterError(
                f"--compare reads two runs and measures nothing; leave out {', '.join(given)}"
            )
    elif force:
        raise ParameterError("--force belongs to --compare; leave it out")
    for path in (output, plot):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ParameterError(f"{path}: is no file in a folder that exists; choose another place")


def _measure(model: str, chosen: dict[str, Any], opening: dict[str, Any]) -> "Document":
    from mlx_mtp.cli.bench_run import default_arms, measure
    from mlx_mtp.cli.opening import opening as opening_of
    from mlx_mtp.measure.plan import CONTEXTS, SHORT, WIDTHS, Settings

    short = chosen["--short"]
    settings = SHORT if short or (short is None and model == DEMO) else Settings()
    if short is False:
        settings = replace(settings, contexts=CONTEXTS, batches=WIDTHS)
    settings = replace(settings, arms=default_arms(settings, opening["drafter"]))
    settings = _changed(settings, chosen)
    return measure(opening_of(**opening).of(model), settings, must_have_peer=chosen["--arms"] is not None)


def _changed(settings: "Settings", chosen: dict[str, Any]) -> "Settings":
    """Settings with what was typed; whoever asks for certain prompts or repeats is given the time for them."""
    changes: dict[str, Any] = {}
    lists: tuple[tuple[str, str, Callable[[str, str], Any]], ...] = (
        ("--workload", "workloads", _word),
        ("--context", "contexts", _number),
        ("--batch", "batches", _number),
        ("--sampling", "samplings", _word),
        ("--arms", "arms", _word),
    )
    for name, field, parse in lists:
        if chosen[name] is not None:
            parts = [part.strip() for words in chosen[name] for part in words.split(",")]
            changes[field] = tuple(parse(name, part) for part in parts if part)
    for name, field in (("--prompts", "prompts"), ("--tokens", "tokens")):
        if chosen[name] is not None:
            changes[field] = chosen[name]
    if chosen["--repeats"] is not None:
        least, _, most = chosen["--repeats"].partition("-")
        changes["min_repeats"] = _number("--repeats", least)
        changes["max_repeats"] = _number("--repeats", most) if most else changes["min_repeats"]
        changes["budget_s"] = None
    return replace(settings, **changes)


def _word(name: str, text: str) -> str:
    return text


def _number(name: str, text: str) -> int:
    text = text.strip()
    if not text.isascii() or not text.isdigit() or len(text) > 8:
        raise ParameterError(f"{name} takes whole numbers, got {text!r}; write for example {name} 4")
    return int(text)


def _last_model() -> str:
    from mlx_mtp.store import last_model

    name = last_model().value
    if name is None:
        raise ParameterError("no model was named and none was used here before; try: mlx-mtp bench demo")
    say(f"measuring {name}, the model used last")
    return str(name)


def _compare(files: tuple[Path, Path], *, force: bool) -> None:
    from mlx_mtp.cli.bench_text import comparison_text
    from mlx_mtp.measure.compare import compare_runs, unlike
    from mlx_mtp.measure.results import read_document

    one, other = (read_document(path) for path in files)
    found = compare_runs(one, other, force=force)
    for why in unlike(one, other):
        say(f"warning: compared by force, although {why}")
    write_answer(comparison_text(found, terminal_columns()) + "\n")


def _give(document: "Document", form: str | None, output: Path | None, plot: Path | None) -> None:
    """The run where it was asked for; if a file cannot be written it is shown, so that it is not lost."""
    from mlx_mtp.cli.bench_text import as_text
    from mlx_mtp.measure.tables import in_format

    columns = terminal_columns() if output is None else None
    text = in_format(document, form) if form else as_text(document, columns) + "\n"  # type: ignore[arg-type]
    if output is None:
        write_answer(text)
    else:
        from mlx_mtp.store import write_bytes

        try:
            write_bytes(output.absolute(), text.encode())
        except StorageError:
            write_answer(text)
            raise
        say(f"written to {output}")
    if plot is not None:
        from mlx_mtp.measure.plots import write_plots

        write_plots(document, plot)
        say(f"drawn in {plot}")


def _say_guarantee(document: "Document") -> bool:
    from mlx_mtp.cli.bench_text import findings_text
    from mlx_mtp.measure.guarantee import check_guarantee, keeps_its_word

    findings = check_guarantee(document)
    holds = keeps_its_word(findings, document)
    say(findings_text(findings, terminal_columns(sys.stderr)))
    say(
        "never slower, and the same text: it holds" if holds else "never slower, and the same text: NOT shown"
    )
    return holds
