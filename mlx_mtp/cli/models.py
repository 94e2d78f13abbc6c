"""`mlx-mtp models list|pull|rm`: what is on this disk, what could be, and getting rid of it."""

import json
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_mtp.cli import options
from mlx_mtp.cli.downloads import (
    Missing,
    check_memory,
    decline,
    find_missing,
    plan_missing,
    quantised_twin,
    show_plans,
    warn_of_drafter,
)
from mlx_mtp.cli.opening import Opening, opening, progress_shown
from mlx_mtp.cli.question import ask, can_ask
from mlx_mtp.cli.sizes import bytes_text
from mlx_mtp.cli.terminal import say, write_answer
from mlx_mtp.errors import HubError, ParameterError

if TYPE_CHECKING:
    from pathlib import Path

    from mlx_mtp.hub import ModelName

app = typer.Typer(
    name="models",
    help="Models on this disk and the names of those that could be.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Name = Annotated[str, typer.Argument(metavar="MODEL", help="An alias such as e4b, or a hub id.")]


@app.command("list")
def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """List what is downloaded, and what each alias takes here."""
    from mlx_mtp.cli.model_list import as_json as listed
    from mlx_mtp.cli.model_list import as_text

    write_answer((json.dumps(listed()) if as_json else as_text()) + "\n")


@app.command()
def pull(
    model: Name,
    drafter: options.Drafter = "auto",
    quantize: options.Quantize = None,
    revision: options.Revision = None,
    context: options.Context = None,
    yes: options.Yes = False,
) -> None:
    """Download a model and its drafter; prints the target's folder. Goes on where an earlier download stopped."""
    wanted = opening(drafter=drafter, quantize=quantize, revision=revision, context=context, yes=yes)
    write_answer(f"{_pulled(wanted.of(model))}\n")


@app.command("rm")
def remove(
    model: Name,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
) -> None:
    """Remove a model; its drafter too unless another uses it. Quantised copies of it go as well."""
    from mlx_mtp.cli.removal import find_removal

    doomed = find_removal(model)
    for line in doomed.lines():
        say(f"  {line}")
    if not yes:
        if not can_ask():
            raise ParameterError(f"nobody can be asked here; type: mlx-mtp models rm {model} --yes")
        if not ask(f"Remove {bytes_text(doomed.bytes)}?"):
            say("Nothing was removed.")
            raise typer.Exit(2)
    write_answer(f"{bytes_text(doomed.remove())} freed\n")


def _pulled(asked: Opening) -> "Path":
    """Download what is missing; -> the target's folder."""
    from mlx_mtp.cache import cached_snapshot
    from mlx_mtp.hub import parse_name

    target = parse_name(asked.model, asked.revision)
    if target.repo_id is None:
        raise ParameterError(f"{asked.model} is on this disk already; only models on the hub are downloaded")
    for warning in target.warnings:
        say(f"warning: {warning}")
    check_memory(asked, target)
    for _ in ("target and drafter", "a drafter that only the target's config.json tells"):
        missing = find_missing(asked)
        if not missing.parts or not _fetch_missing(asked, missing):
            break
    folder = cached_snapshot(target.repo_id, target.revision)
    assert folder is not None, "fetch gives complete snapshots"
    return folder


def _fetch_missing(asked: Opening, missing: Missing) -> bool:
    """Show sizes, then download; -> whether all of it came. A drafter that nobody named may be refused."""
    from mlx_mtp.download import fetch

    plans = plan_missing(asked, missing)
    if not plans:
        return False
    show_plans(plans, asked, missing.target)
    if missing.lacks_target:
        _confirm_unquantised(asked, missing.target)
    all_came = len(plans) == len(missing.parts)
    for plan in plans:
        is_target = plan.repo_id == missing.target.repo_id
        admit = partial(check_memory, asked, missing.target) if is_target else (lambda folder: None)
        try:
            with progress_shown() as on_progress:
                fetch(plan, on_progress, before_weights=admit)
        except HubError as error:
            if is_target or asked.drafter != "auto":
                raise
            warn_of_drafter(error)
            all_came = False
    return all_came


def _confirm_unquantised(asked: Opening, target: "ModelName") -> None:
    """A model four times as large as it need be is downloaded only if that is meant."""
    twin = quantised_twin(target)
    if twin is None or asked.yes or asked.quantize is not None:
        return
    if not can_ask():
        raise ParameterError(
            f"{asked.model} is not quantised; type: mlx-mtp models pull {twin.name}, "
            f"or, if it is meant: mlx-mtp models pull {asked.model} --yes"
        )
    if not ask("Download it now?"):
        decline(asked.model)
