"""`mlx-mtp serve`: an OpenAI-compatible server for this machine."""

import contextlib
import json
import logging
import signal
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_mtp.cli import options
from mlx_mtp.cli.opening import DEMO, DEMO_NOTICE, Opening, opening, progress_shown
from mlx_mtp.cli.terminal import say, write_answer
from mlx_mtp.errors import MachineError, ParameterError

if TYPE_CHECKING:
    from mlx_mtp.server.running import Server

PORT = 8383
REPLY_TOKENS = 4096
QUEUE = 64
GRACE_S = 10.0
LARGEST_KEY_FILE = 4096


@dataclass(frozen=True, slots=True)
class Offer:
    """How the model is offered, as it was typed and checked."""

    host: str
    port: int
    keys: tuple[str, ...]
    hosts: tuple[str, ...]
    origins: tuple[str, ...]
    name: str
    width: int
    queue: int
    max_tokens: int
    num_draft_tokens: int | str
    thinking: bool | None
    grace_s: float
    with_parent: bool
    tells: bool  # events in JSON on stdout
    token: str | None


def serve(
    model: options.Model,
    drafter: options.Drafter = "auto",
    quantize: options.Quantize = None,
    drafter_bits: options.DrafterBits = "auto",
    revision: options.Revision = None,
    context: options.Context = None,
    yes: options.Yes = False,
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
    asked = opening(
        model,
        drafter=drafter,
        quantize=quantize,
        drafter_bits=drafter_bits,
        revision=revision,
        context=context,
        yes=yes,
    )
    _check_installed()
    offer = _offer(
        asked,
        host=host,
        port=port,
        name=name,
        key_file=key_file,
        launch_token=launch_token,
        hosts=tuple(allow_host or ()),
        origins=tuple(allow_origin or ()),
        width=width,
        queue=queue,
        max_tokens=max_tokens,
        mtp=mtp,
        thinking=thinking,
        grace=grace,
        with_parent=exit_with_parent,
        as_json=as_json,
    )
    _serve(asked, offer)


def _check_installed() -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise MachineError(
            "the server's packages are not installed; install them with: pip install 'mlx-mtp[server]'"
        ) from None


def _offer(
    asked: Opening,
    *,
    host: str,
    port: int,
    name: str | None,
    key_file: str | None,
    launch_token: bool,
    hosts: tuple[str, ...],
    origins: tuple[str, ...],
    width: int,
    queue: int,
    max_tokens: int,
    mtp: str,
    thinking: bool | None,
    grace: float,
    with_parent: bool,
    as_json: bool,
) -> Offer:
    """Everything that can be refused before a model is looked at."""
    import secrets

    from mlx_mtp.batch import check_batch
    from mlx_mtp.policy import make_policy
    from mlx_mtp.server.guards import make_guard

    if not 0 <= port <= 65535:
        raise ParameterError(f"a port is a number from 0 to 65535, got {port}; choose one")
    if queue < 1 or max_tokens < 1:
        raise ParameterError("--queue and --max-tokens are numbers from 1 on; choose others")
    if not 0 <= grace <= 3600:
        raise ParameterError(f"--grace is 0 to 3600 seconds, got {grace:g}; choose another")
    check_batch(width)
    num_draft_tokens = options.parse_mtp(mtp)
    make_policy(num_draft_tokens, has_drafter=True)
    token = secrets.token_urlsafe(32) if launch_token else None
    keys = tuple(key for key in (token, None if key_file is None else _key(key_file)) if key is not None)
    make_guard(host, keys=keys, allowed_hosts=hosts, origins=origins)
    tells = as_json or launch_token or port == 0
    shown = name or _public_name(asked.model)
    return Offer(
        host,
        port,
        keys,
        hosts,
        origins,
        shown,
        width,
        queue,
        max_tokens,
        num_draft_tokens,
        thinking,
        grace,
        with_parent,
        tells,
        token,
    )


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


def _serve(asked: Opening, offer: Offer) -> None:
    from mlx_mtp.cli.downloads import settle_downloads
    from mlx_mtp.engine import Engine
    from mlx_mtp.machine import check_machine, this_machine
    from mlx_mtp.server.app import Service
    from mlx_mtp.server.guards import make_guard
    from mlx_mtp.server.running import Server, listen

    check_machine(this_machine())
    if asked.model == DEMO:
        say(DEMO_NOTICE)
    asked = settle_downloads(asked)
    guard = make_guard(offer.host, keys=offer.keys, allowed_hosts=offer.hosts, origins=offer.origins)
    with contextlib.closing(listen(offer.host, offer.port)) as socket, ExitStack() as until_ready:
        port = socket.getsockname()[1]
        _log_to_stderr()
        _announce(offer, port)
        on_progress = until_ready.enter_context(progress_shown())
        engine = Engine(
            asked.model,
            max_batch=offer.width,
            max_queue=offer.queue,
            set_memory_limits=True,
            wait=False,
            on_progress=on_progress,
            drafter=asked.drafter_or_none,
            quantize=asked.quantize,
            drafter_bits=asked.drafter_bits,
            revision=asked.revision,
            max_context=asked.context,
        )
        service = Service(engine, offer.name, guard, offer.max_tokens, offer.num_draft_tokens, offer.thinking)

        def on_ready() -> None:
            until_ready.close()
            for warning in (*engine.pair.warnings, service.served.template.warning):
                if warning is not None:
                    say(f"warning: {warning}")
            say(f"{offer.name} is ready (Ctrl-C ends)")
            _tell(offer, {"event": "ready", "model": offer.name})

        server = Server(service, grace_s=offer.grace_s, with_parent=offer.with_parent, on_ready=on_ready)
        server.run(sockets=[socket])
        until_ready.close()
        _finish(server)


def _announce(offer: Offer, port: int) -> None:
    """Where it listens: for people on stderr, for programs on stdout if they asked."""
    shown = f"[{offer.host}]" if ":" in offer.host else offer.host
    url = f"http://{shown}:{port}/v1"
    say(f"mlx-mtp serves {offer.name} at {url}" + (" (a key is needed)" if offer.keys else ""))
    event = {"event": "listening", "host": offer.host, "port": port, "url": url, "model": offer.name}
    if offer.token is not None:
        event["token"] = offer.token
    _tell(offer, event)


def _tell(offer: Offer, event: dict[str, object]) -> None:
    """A line on stdout; whoever started the server may have stopped reading, which ends nothing."""
    if offer.tells:
        with contextlib.suppress(typer.Exit):
            write_answer(json.dumps(event) + "\n")


def _finish(server: "Server") -> None:
    """Close the engine and leave with the code that says why: 0 asked for, 130 Ctrl-C, or what went wrong."""
    engine, ending = server.service.engine, server.ending
    if engine.status.status == "failed":
        engine.wait_ready()  # raises why
    if engine.status.status == "loading":
        say(
            "(ended while the model was loaded)"
        )  # what the thread reads cannot be interrupted; the exit waits a while
    else:
        engine.close()
    if ending.signal == signal.SIGINT:
        raise typer.Exit(130)


def _log_to_stderr() -> None:
    """Requests and failures, one line each, without a word of any prompt."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for logger, level in (("mlx_mtp", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logging.getLogger(logger).addHandler(handler)
        logging.getLogger(logger).setLevel(level)
