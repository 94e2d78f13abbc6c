"""The `mlx-mtp` command: one file a subcommand; the only code here that prints.

Exit codes: 0 ok, 1 the answer is no (`prove`, `race`, `bench --guarantee`), 2 usage, 3 model, drafter or
machine, 4 memory, 5 network, 130 interrupted.
"""

import sys
from io import TextIOWrapper
from typing import Annotated

import typer

import mlx_mtp
from mlx_mtp.clean import clean_for_terminal
from mlx_mtp.cli import models
from mlx_mtp.cli.batch import batch
from mlx_mtp.cli.bench import bench
from mlx_mtp.cli.chat import chat
from mlx_mtp.cli.doctor import doctor
from mlx_mtp.cli.generate import generate
from mlx_mtp.cli.layout import terminal_columns, wrapped
from mlx_mtp.cli.prove import prove
from mlx_mtp.cli.race import race
from mlx_mtp.cli.serve import serve
from mlx_mtp.cli.terminal import hold_standard_files
from mlx_mtp.cli.tune import tune
from mlx_mtp.errors import MtpError

app = typer.Typer(
    name="mlx-mtp",
    help="Gemma 4 with multi-token prediction on MLX.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mlx-mtp {mlx_mtp.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and leave.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    pass


app.command()(chat)
app.command()(generate)
app.command()(batch)
app.command()(prove)
app.command()(bench)
app.command()(race)
app.command()(serve)
app.command()(tune)
app.command()(doctor)
app.add_typer(models.app)


def main() -> None:
    """Run the command line and exit with its code; an `MtpError` becomes one line on stderr."""
    hold_standard_files()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # what a terminal's encoding lacks must not end a reply
    try:
        app()
    except MtpError as error:
        message = f"mlx-mtp: {clean_for_terminal(str(error))}"
        print(wrapped(message, terminal_columns(sys.stderr)), file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
