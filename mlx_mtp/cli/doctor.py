"""`mlx-mtp doctor`: what this machine is, what it can run, and what works; `--report` measures it all, once."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_mtp.cli import options
from mlx_mtp.cli.terminal import say, write_answer
from mlx_mtp.errors import MtpError, ParameterError

if TYPE_CHECKING:
    from mlx_mtp.diagnosis import Diagnosis
    from mlx_mtp.report.setting import Setting

REPORTED = "e2b"  # what --report measures when no model is named
CONTEXT = 8192  # tokens that a measured model is opened for
DEVICES = ("auto", "cpu", "gpu")


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help=f"For --report and --kernels; {REPORTED} if left out."),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Measure for up to 20 minutes and write one JSON file.")
    ] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Test our Metal kernels for a model; some minutes, once.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE.json", help="Where --report writes.")
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="With --report: compare only models that are downloaded.")
    ] = False,
    device: Annotated[
        str, typer.Option("--device", metavar="auto|cpu|gpu", help="What MLX computes on.")
    ] = "auto",
    machine: Annotated[
        Path | None, typer.Option("--machine", metavar="FILE", help="Answer for a machine described in JSON.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
    yes: options.Yes = False,
) -> None:
    """Say what this machine is, which models it can run, what is kept where, and what works; exits with 3 if nothing
    can run."""
    _check_options(model, report, kernels, out, offline, device, machine)
    if device != "auto":
        _use_device(device)
    if report:
        _report(model or REPORTED, out, offline=offline, yes=yes)
        return
    if kernels:
        from mlx_mtp.cli.kernel_tests import show_kernels

        show_kernels(model or REPORTED, yes=yes, as_json=as_json)
        return
    diagnosis = _diagnose(machine)
    if as_json:
        write_answer(json.dumps(diagnosis.as_json(), indent=1) + "\n")
    else:
        from mlx_mtp.cli.doctor_text import as_text

        write_answer(as_text(diagnosis) + "\n")
    raise typer.Exit(0 if diagnosis.is_usable else 3)


def _check_options(
    model: str | None,
    report: bool,
    kernels: bool,
    out: Path | None,
    offline: bool,
    device: str,
    machine: Path | None,
) -> None:
    """Refuse words that have no meaning together."""
    if device not in DEVICES:
        raise ParameterError(f"--device is auto, cpu or gpu, got {device!r}; leave it out")
    if report and machine is not None:
        raise ParameterError("--report measures this machine, and --machine describes another; give one")
    if kernels and (report or machine is not None):
        raise ParameterError("--kernels tests this machine alone; leave out --report and --machine")
    if model is not None and not (report or kernels):
        raise ParameterError("MODEL belongs to --report; add --report or --kernels, or leave it out")
    for name, given in (("-o", out), ("--offline", offline or None)):
        if given is not None and not report:
            raise ParameterError(f"{name} belongs to --report; add --report, or leave it out")


def _use_device(device: str) -> None:
    import mlx.core as mx

    wanted = mx.Device(mx.cpu if device == "cpu" else mx.gpu)
    if not mx.is_available(wanted):
        raise ParameterError(f"MLX has no {device} here; leave --device out")
    mx.set_default_device(wanted)


def _diagnose(machine: Path | None) -> "Diagnosis":
    from mlx_mtp.diagnosis import diagnose
    from mlx_mtp.machine import read_machine

    return diagnose(None if machine is None else read_machine(machine))


def _report(model: str, out: Path | None, *, offline: bool, yes: bool) -> None:
    """Play the protocol; the file is written after every section, so that a crash leaves what was found."""
    from mlx_mtp.report.protocol import run_protocol
    from mlx_mtp.report.sections import SECTIONS

    path = out or Path(f"mlx-mtp-report-{_as_file_name(model)}.json")

    def keep(document: dict[str, Any]) -> None:
        from mlx_mtp.store import write_bytes

        write_bytes(path.absolute(), (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())

    with _setting(model, offline=offline, yes=yes) as setting:
        document = run_protocol(
            setting,
            SECTIONS,
            on_section=lambda section: say(f"{section.name}: {section.question}"),
            keep=keep,
        )
    for name, entry in document["sections"].items():
        if entry["status"] != "ok":
            say(f"{name}: {entry['status']}: {entry['reason']}")
    if document["sections"].get("experts", {}).get("status") == "ok":
        from mlx_mtp.cli.tune_experts import HINT

        say(HINT)
    write_answer(f"{path}\n")


@contextmanager
def _setting(model: str, *, offline: bool, yes: bool) -> "Iterator[Setting]":
    """The model opened, or the reason why it could not be: the sections that need none are then still played."""
    from mlx_mtp.aliases import find_alias
    from mlx_mtp.cli.opening import Opening, opened
    from mlx_mtp.machine import this_machine
    from mlx_mtp.report.setting import Setting

    alias = find_alias(model)
    setting = Setting(
        name=model, machine=this_machine(), offline=offline, size=None if alias is None else alias.size
    )
    asked = Opening(model, context=None if model == "demo" else CONTEXT, yes=yes)
    manager = opened(asked)
    try:
        pair = manager.__enter__()
    except MtpError as error:
        say(f"no model: {error}")
        setting.no_pair_because = str(error)
        yield setting
        return
    setting.pair, setting.target_folder, setting.drafter_folder = pair, pair.folder, pair.drafter_folder
    try:
        yield setting
    finally:
        manager.__exit__(*sys.exc_info())


def _as_file_name(model: str) -> str:
    """A name without what a file's may not hold: "org/name" -> "org-name"."""
    return "".join(char if char.isalnum() or char in "-_." else "-" for char in Path(model).name or "model")
