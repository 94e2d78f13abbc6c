"""`mlx-mtp serve`: an OpenAI-compatible server for this machine."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from mlx_mtp.cli import options
from mlx_mtp.cli.opening import Opening, opening
from mlx_mtp.cli.option_groups import takes
from mlx_mtp.cli.serving import Offer, check_installed, check_offer, run_server
from mlx_mtp.errors import ParameterError

PORT = 8383
REPLY_TOKENS = 4096
QUEUE = 64
GRACE_S = 10.0
LARGEST_KEY_FILE = 4096


@takes(wanted=opening)
def serve(
    *,
    model: options.Model,
    wanted: Opening,
    host: Annotated[
        str, typer.Option("--host", help="The address to listen at; others than loopback need --key-file.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", help="0 takes any free port and says which in JSON on stdout.")
    ] = PORT,
    name: Annotated[
        str | None, typer.Option("--name", help="What clients call the model; without it: MODEL.")
    ] = None,
    key_file: Annotated[
        str | None,
        typer.Option(
            "--key-file", metavar="FILE|-", help="A file, or stdin, with the key that clients must send."
        ),
    ] = None,
    launch_token: Annotated[
        bool,
        typer.Option(
            "--launch-token", help="Make a key for this launch and tell it in JSON on stdout: for apps."
        ),
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", help="A name in Host that is answered; may be repeated."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option("--allow-origin", help="A web page's origin that may ask (CORS); may be repeated."),
    ] = None,
    width: Annotated[int, typer.Option("--width", help="Requests decoded together at most.")] = 8,
    queue: Annotated[
        int, typer.Option("--queue", help="Requests that may wait; more are told to retry.")
    ] = QUEUE,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", help="The longest reply where a request does not say.")
    ] = REPLY_TOKENS,
    mtp: options.Mtp = "auto",
    thinking: options.Thinking = None,
    grace: Annotated[
        float, typer.Option("--grace", help="Seconds that replies may go on once the server is to end.")
    ] = GRACE_S,
    exit_with_parent: Annotated[
        bool, typer.Option("--exit-with-parent", help="End when the program that started this one has ended.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Say where it listens, and when it is ready, in JSON on stdout.")
    ] = False,
) -> None:
    """Serve a model to programs that speak OpenAI's interface, at http://127.0.0.1:8383/v1."""
    asked = wanted.of(model)
    check_installed()
    token = _new_token() if launch_token else None
    given = None if key_file is None else _key(key_file)
    offer = Offer(
        host=host,
        port=port,
        keys=tuple(key for key in (token, given) if key is not None),
        hosts=tuple(allow_host or ()),
        origins=tuple(allow_origin or ()),
        name=name or _public_name(asked.model),
        width=width,
        queue=queue,
        max_tokens=max_tokens,
        num_draft_tokens=options.parse_mtp(mtp),
        thinking=thinking,
        grace_s=grace,
        with_parent=exit_with_parent,
        tells=as_json or launch_token or port == 0,
        token=token,
    )
    check_offer(offer)
    run_server(asked, offer)


def _new_token() -> str:
    import secrets

    return secrets.token_urlsafe(32)


def _public_name(model: str) -> str:
    """The model's name for clients: of a folder only the last part, which says nothing about this machine."""
    if model.startswith((".", "/", "~")):
        return Path(model).expanduser().resolve().name or "model"
    return model


def _key(file: str) -> str:
    """The one line of a key file, or of stdin."""
    try:
        if file == "-":
            text = sys.stdin.readline(LARGEST_KEY_FILE)
        else:
            with Path(file).open(encoding="utf-8") as opened:
                text = opened.read(LARGEST_KEY_FILE)
    except (OSError, UnicodeDecodeError) as error:
        raise ParameterError(
            f"the key cannot be read from {file}: {error}; give a file with one line"
        ) from None
    key = text.strip()
    if not key:
        raise ParameterError(f"the key in {file} is empty; write one of 8 characters or more into it")
    return key
