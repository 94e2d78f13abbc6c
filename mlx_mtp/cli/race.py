"""`mlx-mtp race`: one prompt and one seed, plain against MTP, side by side."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_mtp.cli import options
from mlx_mtp.cli.opening import DEMO, Opening, opened, opening
from mlx_mtp.cli.option_groups import takes
from mlx_mtp.cli.stdin_text import argument_text
from mlx_mtp.cli.terminal import is_smart, say, write_answer
from mlx_mtp.errors import PairError, ParameterError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mlx_mtp.cli.race_record import Arm
    from mlx_mtp.pair import Pair

PROMPT = "Write a Python class for a stack with push, pop and peek, and explain in two sentences what it is good for."
SECONDS_A_FRAME = 0.05
CAST_COLUMNS, CAST_LINES = 120, 32
RECORDED = "recorded one after the other and replayed in step"


@takes(wanted=opening)
def race(
    *,
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help=options.MODEL_HELP)] = DEMO,
    prompt: Annotated[str, typer.Option("--prompt", help="What both are asked.")] = PROMPT,
    wanted: Opening,
    mtp: Annotated[
        str, typer.Option("--mtp", metavar="auto|N", help="Draft tokens a round of the arm with MTP.")
    ] = "auto",
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Tokens of each answer, at most.")] = 256,
    seed: Annotated[int, typer.Option("--seed", help="Of both arms.")] = 1,
    temperature: Annotated[float, typer.Option("--temperature", help="Of both arms.")] = 1.0,
    n: Annotated[
        int, typer.Option("-n", metavar="N", help="Answers raced at once; each has the next seed.")
    ] = 1,
    cast: Annotated[
        Path | None, typer.Option("--cast", metavar="FILE", help="Also write an asciinema recording.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the replay.")] = False,
) -> None:
    """Race plain decoding against MTP: same prompt, same seed. Exits with 1 where the texts differ."""
    from mlx_mtp.api import check_answers

    reply = options.reply_options(mtp=mtp, max_tokens=max_tokens, seed=seed, temperature=temperature)
    if reply.num_draft_tokens == 0:
        raise ParameterError("a race without drafts has one arm; leave --mtp out, or give a number from 1 on")
    check_answers(n)
    messages = [{"role": "user", "content": argument_text(prompt)}]
    with opened(wanted.of(model)) as pair:
        if pair.drafter is None:
            raise PairError("there is no drafter to race with; give one with --drafter PATH")
        arms = _record_both(pair, messages, n, reply.request(pair))
    title = f"{model}, seed {seed}, temperature {temperature:g}: {RECORDED}"
    if cast is not None:
        _write_cast(cast, arms, title)
        say(f"recording written: {cast}")
    if as_json:
        write_answer(json.dumps(_as_json(model, seed, temperature, arms)) + "\n")
    else:
        if is_smart(sys.stdout):
            _replay(arms, title)
        write_answer(verdict(*arms) + "\n")
    from mlx_mtp.cli.race_record import first_difference

    raise typer.Exit(0 if first_difference(*arms) is None else 1)


def _record_both(
    pair: "Pair", messages: list[dict[str, Any]], n: int, request: dict[str, Any]
) -> "tuple[Arm, Arm]":
    from mlx_mtp.cli.race_record import record

    total = n * request["max_tokens"]
    drafts = request.pop("num_draft_tokens")
    arms = []
    for name, k in (("plain", 0), ("MTP", drafts)):

        def on_tokens(done: int, name: str = name) -> None:
            _progress(f"recording {name}: {done}/{total} tokens")

        _progress(f"warming up {name}")
        arms.append(
            record(pair, messages, name=name, n=n, num_draft_tokens=k, on_tokens=on_tokens, **request)
        )
    _progress("")
    return arms[0], arms[1]


def _progress(text: str) -> None:
    """One line painted over on a terminal, nothing elsewhere: a race takes seconds."""
    from mlx_mtp.cli.terminal import write_aside

    if is_smart(sys.stderr):
        write_aside(f"\r\x1b[K{text}")


def verdict(plain: "Arm", mtp: "Arm") -> str:
    """`1,024 tokens identical, ×1.90 (24.9 -> 47.3 tok/s); ...` and why drafting is parked, where it is."""
    from mlx_mtp.cli.race_record import first_difference

    different = first_difference(plain, mtp)
    total = sum(len(own) for own in plain.tokens)
    if different is None:
        same = f"{total:,} tokens identical"
    else:
        row, at = different
        answer = f"answer {row + 1}, " if len(plain.tokens) > 1 else ""
        same = f"the texts differ from {answer}token {at + 1:,} on; `mlx-mtp prove` says why"
    speeds = f"{plain.tokens_per_second:.1f} -> {mtp.tokens_per_second:.1f} tok/s"
    ratio = mtp.tokens_per_second / plain.tokens_per_second if plain.tokens_per_second else 0.0
    text = f"{same}, ×{ratio:.2f} ({speeds}); {RECORDED}"
    reason = mtp.stats[-1].reason
    return text if reason is None else f"{text}; {reason}"


def _frames(
    arms: "tuple[Arm, Arm]", title: str, columns: int, lines: int
) -> "Iterator[tuple[float, RenderableType]]":
    """Moments until both have ended, each with its frame."""
    from mlx_mtp.cli.race_view import Panes

    panes, seconds = Panes(arms, title, columns, lines), 0.0
    end = max(arm.seconds for arm in arms)
    while seconds < end:
        yield seconds, panes.at(seconds)
        seconds += SECONDS_A_FRAME
    yield end, panes.at(end)


def _replay(arms: "tuple[Arm, Arm]", title: str) -> None:
    """Show both on the terminal as they went; Ctrl-C skips to the end."""
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    started = time.monotonic()
    last: RenderableType = ""
    try:
        with Live(console=console, auto_refresh=False, transient=False) as live:
            for seconds, last in _frames(arms, title, console.width, min(console.height - 2, 40)):
                ahead = started + seconds - time.monotonic()
                if ahead > 0:
                    time.sleep(ahead)
                elif seconds < arms[0].seconds and ahead < -SECONDS_A_FRAME:
                    continue  # a slow terminal drops frames, not seconds
                live.update(last, refresh=True)
    except KeyboardInterrupt:
        say("(skipped to the end)")


def _write_cast(path: Path, arms: "tuple[Arm, Arm]", title: str) -> None:
    from mlx_mtp.cli.cast import write_cast

    frames = _frames(arms, title, CAST_COLUMNS, CAST_LINES - 1)
    write_cast(path, frames, columns=CAST_COLUMNS, lines=CAST_LINES, title=f"mlx-mtp race: {verdict(*arms)}")


def _as_json(model: str, seed: int, temperature: float, arms: "tuple[Arm, Arm]") -> dict[str, Any]:
    from mlx_mtp.cli.race_record import first_difference
    from mlx_mtp.cli.status import figures

    different = first_difference(*arms)
    return {
        "model": model,
        "seed": seed,
        "temperature": temperature,
        "identical": different is None,
        "first_difference": None if different is None else {"answer": different[0], "token": different[1]},
        "arms": {
            arm.name: {
                "seconds": arm.seconds,
                "tokens": [len(own) for own in arm.tokens],
                "tokens_per_second": arm.tokens_per_second,
                "stats": [figures(own) for own in arm.stats],
            }
            for arm in arms
        },
    }
