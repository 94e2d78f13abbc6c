"""What a model still lacks on this disk, shown with its size, and the question before it is downloaded."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from mlx_mtp.cli.opening import Opening
from mlx_mtp.cli.question import ask, can_ask
from mlx_mtp.cli.sizes import bytes_text
from mlx_mtp.cli.terminal import say
from mlx_mtp.errors import HubError, MemoryRefusal, ParameterError

if TYPE_CHECKING:
    from mlx_mtp.aliases import Alias
    from mlx_mtp.download import DownloadPlan
    from mlx_mtp.hub import ModelName
    from mlx_mtp.memory import MemoryEstimate


@dataclass(frozen=True, slots=True)
class Missing:
    """Repositories that are to be downloaded: the target's first, where it is one of them."""

    target: "ModelName"
    parts: tuple["ModelName", ...]

    @property
    def lacks_target(self) -> bool:
        return self.target in self.parts


def settle_downloads(asked: Opening) -> Opening:
    """`asked` once everything is on disk or its download was agreed to; what is on disk opens no socket."""
    missing = find_missing(asked)
    if missing.lacks_target:
        check_memory(asked, missing.target)
    if not missing.parts or asked.yes:
        return asked
    if not can_ask():
        raise ParameterError(_refusal(asked, missing))
    return ask_for(asked, missing)


def ask_for(asked: Opening, missing: Missing, reason: str | None = None) -> Opening:
    """Show what is missing, then ask; a no ends the command. `reason`: why this model, where nobody named it."""
    plans = plan_missing(asked, missing)
    whose = "" if missing.lacks_target else "the drafter of "
    say(reason or f"{whose}{asked.model} is not on this disk yet:")
    if len(plans) < len(missing.parts):
        asked = replace(asked, drafter="none")
    if plans:
        show_plans(plans, asked, missing.target, with_memory=reason is None)
        if reason is not None:
            say("To try without a download: mlx-mtp chat demo (tiny, comes with this program)")
        if not ask("Download it now?"):
            decline(asked.model)
    return replace(asked, yes=True)


def plan_missing(asked: Opening, missing: Missing) -> list["DownloadPlan"]:
    """What the hub says of each; opens sockets. A drafter that nobody asked for by name may be refused."""
    from mlx_mtp.download import plan_download

    plans = []
    for part in missing.parts:
        try:
            plans.append(plan_download(_repo(part), part.revision))
        except HubError as error:
            if part == missing.target or asked.drafter != "auto":
                raise
            warn_of_drafter(error)
    return plans


def warn_of_drafter(error: HubError) -> None:
    say(f"warning: decoding will be plain, because the drafter cannot be had: {error}")


def find_missing(asked: Opening) -> Missing:
    """Which repositories of the target and its drafter are not complete in the cache; opens no socket."""
    from mlx_mtp.cache import cached_snapshot
    from mlx_mtp.hub import drafter_for, parse_name
    from mlx_mtp.sources import copy_without_source

    target = parse_name(asked.model, asked.revision)
    folder = target.folder or cached_snapshot(_repo(target), target.revision)
    folder = folder or copy_without_source(target, asked.quantize)
    parts = [target] if folder is None else []
    drafter = drafter_for(target, folder, asked.drafter_or_none)
    if drafter is not None and drafter.folder is None:
        parts += [] if cached_snapshot(_repo(drafter), drafter.revision) else [drafter]
    return Missing(target, tuple(parts))


def show_plans(
    plans: Sequence["DownloadPlan"], asked: Opening, target: "ModelName", *, with_memory: bool = True
) -> None:
    """One line a repository, then the sum and the disk, and the memory unless that was said already."""
    for plan in plans:
        what = "" if plan.repo_id == target.repo_id else " (drafter)"
        rest = "" if plan.missing_bytes == plan.total_bytes else f", {bytes_text(plan.missing_bytes)} to go"
        say(f"  {bytes_text(plan.total_bytes)}  {plan.repo_id}{what}{rest}")
    facts = [f"{bytes_text(sum(plan.missing_bytes for plan in plans))} to download"]
    facts.append(f"{bytes_text(free_disk())} free on the disk")
    say("  " + ", ".join(facts))
    alias = _alias(target)
    if alias is not None and with_memory:
        say(f"  {memory_text(_estimate(asked, alias.name, _context(asked)))}")
    smaller = quantised_twin(target)
    if smaller is not None and asked.quantize is None:
        say(
            f"  these weights are not quantised; {smaller.name} is the same model in 4 bits{size_in_words(smaller)}"
        )


def check_memory(asked: Opening, target: "ModelName", files: Path | None = None) -> None:
    """Refuse what this machine can never hold, by what is known of it before a download; raises MemoryRefusal.

    files: a folder with the target's config.json, for those whose id alone does not tell.
    """
    from mlx_mtp.admission import admit_model
    from mlx_mtp.machine import this_machine

    alias = _alias(target)
    model = alias.name if alias is not None else files
    if model is not None:
        admit_model(
            _estimate(asked, model, _context(asked)),
            this_machine(),
            free=None,
            name=asked.model,
            context=_context(asked),
            estimate_at=partial(_estimate, asked, model),
        )


def _estimate(asked: Opening, model: str | Path, context: int) -> "MemoryEstimate":
    """The memory that running it takes on this machine."""
    from mlx_mtp.machine import this_machine
    from mlx_mtp.memory import estimate_memory

    return estimate_memory(
        model,
        context,
        bits=asked.quantize,
        drafter=None if asked.drafter_or_none is None else "auto",
        drafter_bits=asked.drafter_bits,
        dtype=None if this_machine().has_metal else "float32",
    )


def memory_text(estimate: "MemoryEstimate") -> str:
    """What it runs in, and what models may take."""
    from mlx_mtp.admission import budget_bytes, gigabytes
    from mlx_mtp.machine import this_machine

    budget = gigabytes(budget_bytes(this_machine()))
    return f"runs in about {gigabytes(estimate.total)} of memory; models may take {budget} here"


def quantised_twin(target: "ModelName") -> "Alias | None":
    """The 4-bit alias of a target that is not quantised, None for any other."""
    from mlx_mtp.aliases import find_alias

    alias = _alias(target)
    return None if alias is None or alias.bits != 16 else find_alias(f"{alias.size}:4bit")


def free_disk() -> int:
    """Bytes free where downloads go."""
    from mlx_mtp.cache import hub_cache

    folder = hub_cache().absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def _context(asked: Opening) -> int:
    """Tokens that an estimate is for."""
    from mlx_mtp.sources import ADMITTED_CONTEXT

    return asked.context or ADMITTED_CONTEXT


def _alias(target: "ModelName") -> "Alias | None":
    """The alias that was typed, or the one of the id that was typed."""
    from mlx_mtp.aliases import alias_of

    return target.alias or alias_of(_repo(target))


def _repo(name: "ModelName") -> str:
    assert name.repo_id is not None
    return name.repo_id


def _refusal(asked: Opening, missing: Missing) -> str:
    revision = "" if asked.revision is None else f" --revision {asked.revision}"
    pull = f"nobody can be asked here; type: mlx-mtp models pull {asked.model}{revision}"
    if not missing.lacks_target:
        return f"the drafter of {asked.model} is not on this disk, and {pull}, or add --drafter none"
    alias = _alias(missing.target)
    size = "" if alias is None else size_in_words(alias)
    return f"{asked.model} is not on this disk{size}, and {pull}"


def size_in_words(alias: "Alias") -> str:
    """` (a download of about 6.8 GB)`, or nothing where its source does not tell."""
    return "" if alias.download_gb is None else f" (a download of about {alias.download_gb:g} GB)"


def decline(model: str) -> NoReturn:
    """The person said no: say what else there is, and leave with 2, for the command did not do what it was for."""
    say("Nothing was downloaded. What else there is:")
    for line in other_ways(model):
        say(f"  {line}")
    raise typer.Exit(2)


def other_ways(model: str) -> list[str]:
    """Aliases that suit this machine, other than `model`, and the pair that needs no download."""
    from mlx_mtp.aliases import find_alias
    from mlx_mtp.machine import this_machine
    from mlx_mtp.recommend import recommend

    lines = []
    try:
        found = recommend(this_machine())
    except MemoryRefusal:  # no model fits here
        choices: list[Alias] = []
    else:
        choices = [found.alias, *found.alternatives]
    for alias in choices:
        if alias != find_alias(model):
            lines.append(f"mlx-mtp chat {alias.name}{size_in_words(alias)}")
    return [
        *lines,
        "mlx-mtp chat demo (tiny, comes with this program)",
        "mlx-mtp models list",
    ]
