"""The `mlx-mtp` command: one file a subcommand; the only code here that prints.

Exit codes: 0 ok, 1 the answer is no (`prove`), 2 usage, 3 model or drafter, 4 memory, 130 interrupted.
"""

import sys
from typing import Annotated

import typer

import mlx_mtp
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


def main() -> None:
    """Run the command line and exit with its code; an `MtpError` becomes one line on stderr."""
    try:
        app()
    except MtpError as error:
        print(f"mlx-mtp: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
