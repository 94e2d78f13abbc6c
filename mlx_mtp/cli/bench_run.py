"""Playing a bench for the command: the lock, the model, mlx-lm's copy of it, progress, and the file that is kept."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_mtp.clean import clean_for_terminal
from mlx_mtp.cli.bench_lock import alone
from mlx_mtp.cli.bench_progress import BenchProgress
from mlx_mtp.cli.opening import Opening, opened
from mlx_mtp.cli.terminal import say, write_aside
from mlx_mtp.errors import CheckpointError, MemoryRefusal, ParameterError, StorageError
from mlx_mtp.measure.plan import PEER, PLAIN, Settings, settings_of
from mlx_mtp.measure.results import Document, Keeper, new_document

if TYPE_CHECKING:
    from mlx_mtp.pair import Pair

FOLDER = "bench"  # of kept runs, in the program's data folder
COPY_ROOM = 1.1  # of its files, that mlx-lm's copy of the model takes
GPU_IDLE = 10  # percent of a Mac's GPU that others may use


def measure(asked: Opening, settings: Settings, *, must_have_peer: bool) -> Document:
    """A new run; the file that it is kept in is told on stderr."""
    with alone(), opened(asked) as pair:
        return _play(pair, asked, settings, None, _new_path(asked), must_have_peer=must_have_peer)


def go_on(document: Document, path: Path, model: str | None, *, yes: bool) -> Document:
    """Play what a kept run lacks, on the same model and machine. Raises ParameterError where they are others."""
    if document["complete"]:
        return document
    asked = _opening_of(document, model, yes=yes)
    with alone(), opened(asked) as pair:
        return _play(pair, asked, settings_of(document["settings"]), document, path, must_have_peer=False)


def _play(
    pair: "Pair",
    asked: Opening,
    settings: Settings,
    document: Document | None,
    path: Path | None,
    *,
    must_have_peer: bool,
) -> Document:
    from mlx_mtp.measure.conditions import read_machine
    from mlx_mtp.measure.fingerprint import differences, fingerprint
    from mlx_mtp.measure.run import Run

    if pair.drafter is None and any(arm not in (PLAIN, PEER) for arm in settings.arms):
        raise ParameterError(
            "there is no drafter, so only plain and mlx-lm can be measured; add --arms plain,mlx-lm or --drafter"
        )
    now = fingerprint(pair, read_machine())
    if document is None:
        document = new_document(settings, _opening_json(asked), now)
        document["notes"] = _gpu_notes()
    else:
        _refuse_other(differences(document["fingerprint"], now))
    peer, bytes_of = _peer(pair, settings, document, must_have=must_have_peer)
    keeper = Keeper(path)
    with BenchProgress() as progress:

        def keep(document: Document, at_once: bool) -> None:
            trouble = keeper.keep(document, at_once=at_once)
            if trouble is not None:
                progress.note(f"not kept: {trouble}; the measuring goes on")

        keep(document, True)
        try:
            Run(pair, settings, document, peer=peer, bytes_of=bytes_of, on_step=progress, keep=keep).play()
        except KeyboardInterrupt:
            progress.clear()
            _say_how_to_go_on(keeper)
            raise
    if path is not None and keeper.trouble is None:
        say(f"kept in {path}")
    return document


def _say_how_to_go_on(keeper: Keeper) -> None:
    if keeper.path is None or keeper.trouble is not None:
        say("(stopped; nothing could be kept)")
        return
    say("(stopped; what was measured is kept, and this goes on with it:)")
    write_aside(f"mlx-mtp bench --resume {clean_for_terminal(str(keeper.path))}\n")  # unbroken, to be copied


def _refuse_other(why: list[str]) -> None:
    if why:
        raise ParameterError(
            f"the run was begun on something else ({'; '.join(why)[:400]}); go on with it there, or begin another"
        )


def _new_path(asked: Opening) -> Path | None:
    """A name of its own for the run to be kept under; None where this user has no folders."""
    from mlx_mtp.store import data_folder

    stamp = time.strftime("%Y%m%d-%H%M%S")
    try:
        return data_folder() / FOLDER / f"{_as_file_name(asked.model)}-{stamp}.json"
    except StorageError as error:
        say(f"not kept: {error}")
        return None


def _as_file_name(model: str) -> str:
    name = Path(model).name or "model"
    return "".join(char if char.isalnum() or char in "-_." else "-" for char in name)


def _opening_json(asked: Opening) -> dict[str, Any]:
    """How to open the model again; a folder's place is nobody's business, so only its name is kept."""
    options = {name: value for name, value in asdict(asked).items() if name not in ("model", "yes")}
    is_folder = asked.model.startswith((".", "/", "~"))
    drafter_is_folder = asked.drafter.startswith((".", "/", "~"))
    return {
        **options,
        "name": _as_file_name(asked.model),
        "model": None if is_folder else asked.model,
        "drafter": "auto" if drafter_is_folder else asked.drafter,
    }


def _opening_of(document: Document, model: str | None, *, yes: bool) -> Opening:
    kept = document["opening"]
    name = model or kept.get("model")
    if name is None:
        raise ParameterError("the run's model is a folder; name it: mlx-mtp bench FOLDER --resume FILE")
    if model is not None and kept.get("model") not in (None, model):
        raise ParameterError(f"the run is of {kept['model']}, got {model}; leave MODEL out")
    options = {key: kept.get(key) for key in ("drafter", "quantize", "drafter_bits", "revision", "context")}
    try:
        return Opening(str(name), **options, yes=yes)
    except TypeError as error:
        raise ParameterError(f"the run does not say how to open its model ({error}); begin another") from None


def _gpu_notes() -> list[str]:
    """A warning where others use a Mac's GPU: nothing of ours computes yet."""
    import platform

    if platform.system() != "Darwin":
        return []
    from mlx_mtp.measure.conditions_macos import gpu_busy

    busy = gpu_busy()
    if busy is None or busy <= GPU_IDLE:
        return []
    return [f"other programs used {busy} % of the GPU when this began; close them and measure again"]


def _peer(
    pair: "Pair", settings: Settings, document: Document, *, must_have: bool
) -> tuple[Any, dict[str, int]]:
    """mlx-lm's copy of the model, if its arm is wanted and can be had, and what both copies take.

    Where it cannot be had, the reason is kept in the run.
    """
    if PEER not in settings.arms:
        return None, {}
    import mlx.core as mx

    from mlx_mtp.against_mlx_lm import load_mlx_lm

    assert pair.folder is not None, "load gives every pair its folder"
    try:
        _refuse_no_room(pair.folder)
        ours = mx.get_active_memory()
        model = load_mlx_lm(pair, pair.folder)
        mx.eval(model.parameters())
        return model, {PLAIN: ours, PEER: mx.get_active_memory() - ours}
    except (CheckpointError, MemoryRefusal) as error:
        if must_have:
            raise
        document["peer_missing"] = f"not measured: {error}".replace(str(pair.folder), "the model")
        say(f"without mlx-lm's arm: {error}")
        return None, {}


def _refuse_no_room(folder: Path) -> None:
    """Arms are alternated, so both copies of the model are held at once."""
    from mlx_mtp.admission import budget_bytes, gigabytes
    from mlx_mtp.headers import weight_files
    from mlx_mtp.machine import footprint_bytes, free_bytes, this_machine

    needed = int(COPY_ROOM * sum(file.stat().st_size for file in weight_files(folder)[0]))
    room = min(free_bytes(), budget_bytes(this_machine()) - footprint_bytes())
    if needed > room:
        raise MemoryRefusal(
            f"mlx-lm's copy of the model needs {gigabytes(needed)} beside ours, and {gigabytes(max(room, 0))} can be "
            "taken; leave it out with --arms plain,auto"
        )


def default_arms(settings: Settings, drafter: str) -> tuple[str, ...]:
    """Without a drafter nothing can be drafted."""
    return (PLAIN, PEER) if drafter == "none" else settings.arms
