"""The server of `mlx-mtp serve`: options checked, an engine that loads meanwhile, words on stderr, an exit code."""

import contextlib
import json
import logging
import signal
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from mlx_mtp.cli.opening import DEMO, DEMO_NOTICE, Opening, progress_shown
from mlx_mtp.cli.terminal import say, write_answer
from mlx_mtp.errors import MachineError, ParameterError

if TYPE_CHECKING:
    from mlx_mtp.engine import Engine
    from mlx_mtp.progress import OnProgress
    from mlx_mtp.server.running import Server


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


def check_installed() -> None:
    """Raise MachineError without the extra `server`."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise MachineError(
            "the server's packages are not installed; install them with: pip install 'mlx-mtp[server]'"
        ) from None


def check_offer(offer: Offer) -> None:
    """Everything that can be refused before a model is looked at."""
    from mlx_mtp.batch_width import check_batch
    from mlx_mtp.policy import make_policy
    from mlx_mtp.server.guards import make_guard

    if not 0 <= offer.port <= 65535:
        raise ParameterError(f"a port is a number from 0 to 65535, got {offer.port}; choose one")
    if offer.queue < 1 or offer.max_tokens < 1:
        raise ParameterError("--queue and --max-tokens are numbers from 1 on; choose others")
    if not 0 <= offer.grace_s <= 3600:
        raise ParameterError(f"--grace is 0 to 3600 seconds, got {offer.grace_s:g}; choose another")
    check_batch(offer.width)
    make_policy(offer.num_draft_tokens, has_drafter=True)
    make_guard(offer.host, keys=offer.keys, allowed_hosts=offer.hosts, origins=offer.origins)


def run_server(asked: Opening, offer: Offer) -> None:
    """Listen, load, serve, and leave with the code that says how it ended."""
    from mlx_mtp.cli.downloads import settle_downloads
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
        engine = _engine(asked, offer, on_progress)
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


def _engine(asked: Opening, offer: Offer, on_progress: "OnProgress") -> "Engine":
    """It loads on its own thread: meanwhile the server says so."""
    from mlx_mtp.engine import Engine

    return Engine(
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
        # What its thread reads cannot be interrupted; the process's end waits for it, but not for ever.
        say("(ended while the model was loaded)")
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
