"""`mlx-mtp generate`: one prompt, one reply; only the answer on stdout."""

import json
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

import mlx_mtp
from mlx_mtp.cli import options
from mlx_mtp.cli.opening import Opening, opened, opening
from mlx_mtp.cli.option_groups import takes
from mlx_mtp.cli.patience import Patience
from mlx_mtp.cli.several import write_answers
from mlx_mtp.cli.status import figures, status_line
from mlx_mtp.cli.stdin_text import argument_text, piped_text
from mlx_mtp.cli.terminal import ReplyWriter, say, write_answer
from mlx_mtp.errors import PromptError

if TYPE_CHECKING:
    from mlx_mtp.pair import Pair
    from mlx_mtp.reply import Generation

REPLY_TOKENS = 1024


@takes(wanted=opening, reply=partial(options.reply_options, max_tokens=REPLY_TOKENS))
def generate(
    *,
    model: options.Model,
    prompt: Annotated[str, typer.Argument(metavar="[PROMPT]", help="Text piped in is put after it.")] = "",
    wanted: Opening,
    reply: options.ReplyOptions,
    system: options.System = None,
    n: Annotated[int, typer.Option("-n", metavar="N", help="Answers; each has the next seed.")] = 1,
    text: Annotated[
        bool, typer.Option("--text", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object at the end instead of text as it comes.")
    ] = False,
) -> None:
    """Answer one prompt. `cat file | mlx-mtp generate MODEL "question"` asks about the file."""
    from mlx_mtp.api import check_answers

    check_answers(n)
    asked = "\n\n".join(part for part in (argument_text(prompt), piped_text()) if part)
    if not asked:
        raise PromptError('the prompt is empty; give one: mlx-mtp generate MODEL "question"')
    if text and (system is not None or reply.thinking is not None):
        raise PromptError("--system and --thinking belong to the chat template; leave out --text")
    prepared = asked if text else _messages(asked, system)
    with opened(wanted.of(model)) as pair:
        if n > 1:
            _print_several(pair, prepared, n, reply.request(pair), as_json=as_json)
        elif as_json:
            _print_json(pair, prepared, reply.request(pair))
        else:
            _print_as_it_comes(pair, prepared, reply.request(pair))


def _messages(asked: str, system: str | None) -> list[dict[str, str]]:
    told = [] if system is None else [{"role": "system", "content": system}]
    return [*told, {"role": "user", "content": asked}]


def _print_as_it_comes(pair: "Pair", prompt: str | list[dict[str, str]], request: dict[str, Any]) -> None:
    reply = ReplyWriter()
    with closing(mlx_mtp.stream_generate(pair, prompt, **request)) as chunks, Patience(reply) as patience:
        for chunk in chunks:
            patience.heard()
            reply.write(chunk.thought, "thought")
            reply.write(chunk.tool_call, "tool call")
            reply.write(chunk.text, "answer")
            stats, finish_reason, note = chunk.stats, chunk.finish_reason, chunk.note
    reply.finish()
    if finish_reason == "length":
        say("(the reply was cut off; --max-tokens sets its length)")
    elif note is not None:
        say(f"({note})")
    if stats.warning is not None:
        say(f"warning: {stats.warning}")
    say(status_line(stats, pair.max_context))


def _print_json(pair: "Pair", prompt: str | list[dict[str, str]], request: dict[str, Any]) -> None:
    write_answer(json.dumps(_fields(mlx_mtp.generate(pair, prompt, **request))) + "\n")


def _print_several(
    pair: "Pair", prompt: str | list[dict[str, str]], n: int, request: dict[str, Any], *, as_json: bool
) -> None:
    outs = mlx_mtp.generate_batch(pair, [prompt], n=n, **request)
    if as_json:
        write_answer(json.dumps({"answers": [_fields(out) for out in outs]}) + "\n")
    else:
        write_answers(outs)


def _fields(out: "Generation") -> dict[str, Any]:
    return {
        "text": out.text,
        "thought": out.thought,
        "tool_call": out.tool_call,
        "tokens": out.tokens,
        "finish_reason": out.finish_reason,
        "note": out.note,
        "stats": figures(out.stats),
    }
