"""`mlx-mtp tune`: time rounds anew, and say what drafting costs and which share of right drafts pays for it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_mtp.cli import options
from mlx_mtp.cli.first_choice import choose_model
from mlx_mtp.cli.opening import Opening, opened, opening, progress_shown
from mlx_mtp.cli.terminal import say, write_answer
from mlx_mtp.errors import MachineError, ParameterError

if TYPE_CHECKING:
    from mlx_mtp.cli.tune_text import Tuning
    from mlx_mtp.pair import Pair
    from mlx_mtp.round_times import RoundTimes


def tune(
    model: options.ModelOrLast = "",
    drafter: options.Drafter = "auto",
    quantize: options.Quantize = None,
    drafter_bits: options.DrafterBits = "auto",
    revision: options.Revision = None,
    yes: options.Yes = False,
    show: Annotated[bool, typer.Option("--show", help="Measure nothing; show what is known.")] = False,
    export: Annotated[
        Path | None, typer.Option("--export", metavar="FILE", help="Write the profile, to be shared.")
    ] = None,
    taken_from: Annotated[
        Path | None,
        typer.Option("--import", metavar="FILE", help="Take a profile from a file instead of measuring."),
    ] = None,
    experts: Annotated[
        bool,
        typer.Option("--experts", help="Count the distinct experts of 1 to 16 rows, instead of timing."),
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option("--text", metavar="FILE", help="With --experts: on this text, not on replies."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Time at most 20 rounds with 0 to 8 drafts, keep the times, and show where drafting breaks even."""
    _check_options(show, export, taken_from, experts, text)
    given = None if taken_from is None else read_given(taken_from, "--import")
    wanted = opening(
        drafter=drafter, quantize=quantize, drafter_bits=drafter_bits, revision=revision, yes=yes
    )
    asked = wanted.of(model)
    if not model:
        asked = choose_model(asked)
    if experts:
        from mlx_mtp.cli.tune_experts import show_experts

        show_experts(asked, text, as_json=as_json)
        return
    _tune(asked, given, show=show, export=export, as_json=as_json)


def _check_options(
    show: bool, export: Path | None, taken_from: Path | None, experts: bool, text: Path | None
) -> None:
    """Refuse words that have no meaning together, before anything is opened."""
    if text is not None and not experts:
        raise ParameterError("--text belongs to --experts; add --experts, or leave it out")
    if experts and (show or export is not None or taken_from is not None):
        raise ParameterError("--experts times nothing; leave out --show, --export and --import")
    if taken_from is not None and (show or export is not None):
        raise ParameterError("--import takes a profile that exists; leave out --show and --export")


def read_given(path: Path, option: str) -> bytes:
    """A file that was named on the command line; refused where it is none, or larger than any that is meant."""
    from mlx_mtp.profiles import LARGEST_BYTES

    try:
        if not path.is_file():
            raise ParameterError(f"{option} takes a file, and {path} is none; check its name")
        if path.stat().st_size > LARGEST_BYTES:
            raise ParameterError(f"{path}: larger than {LARGEST_BYTES >> 20} MB; give a shorter file")
        return path.read_bytes()
    except OSError as error:
        raise ParameterError(f"{path}: cannot be read ({error.strerror}); check its name") from None


def _tune(asked: Opening, given: bytes | None, *, show: bool, export: Path | None, as_json: bool) -> None:
    from mlx_mtp.cli.tune_text import as_fields, as_text
    from mlx_mtp.profiles import export as exported
    from mlx_mtp.profiles import key_of
    from mlx_mtp.store import write_bytes

    with opened(asked) as pair:
        key = key_of(pair)
        if given is not None:
            _take_over(pair, given)
        found = _tuned(pair, measure=not show and given is None, is_given=given is not None)
        if export is not None:
            if not pair.rounds.times.is_known():
                raise ParameterError("nothing was timed here yet, so there is no profile; leave out --show")
            write_bytes(export.absolute(), exported(pair.rounds.times, key).encode())
            say(f"written to {export}")
        write_answer((json.dumps(as_fields(found, key), indent=1) if as_json else as_text(found)) + "\n")


def _take_over(pair: "Pair", given: bytes) -> None:
    """Replace what is known of the pair's rounds by a profile from elsewhere."""
    from mlx_mtp.profiles import import_profile, key_of
    from mlx_mtp.round_times import RoundTimes

    times = RoundTimes(pair.rounds.times.prior)
    import_profile(given, times, key_of(pair))
    pair.rounds.times = times


def _tuned(pair: "Pair", *, measure: bool, is_given: bool) -> "Tuning":
    from mlx_mtp.cli.tune_text import Start, Tuning
    from mlx_mtp.machine import this_machine

    times, machine = pair.rounds.times, this_machine()
    began_with: Start = "the file" if is_given else "a profile" if times.is_known() else "published"
    if began_with == "published" and not times.has_prior:
        began_with = "nothing"
    tax = None
    if measure:
        times = pair.rounds.times = _measured(pair)
        tax = pair.exactness_tax()
        times.plain_tax = tax.ratio
    return Tuning(pair.name, machine.chip, machine.gpu_cores, began_with, measure, times, tax)


def _measured(pair: "Pair") -> "RoundTimes":
    """Times found afresh; what was known of wider batches and of experts is kept."""
    from mlx_mtp.calibration import calibrate, is_calibrated
    from mlx_mtp.round_times import RoundTimes

    before: dict[str, Any] = pair.rounds.times.to_json()
    before["widths"].pop("1", None)
    times = RoundTimes(pair.rounds.times.prior)
    times.learn(before)
    with progress_shown() as on_progress:
        calibrate(pair, on_progress, times)
    if not is_calibrated(times):
        raise MachineError(
            "the rounds could not be timed: the clock jumped, or the machine slept or was very busy; run it again"
        )
    return times
