"""`mlx-mtp batch`: a file of prompts, answered together, one line out for each line in."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_mtp.cli import options
from mlx_mtp.cli.batch_progress import BatchProgress
from mlx_mtp.cli.first_choice import choose_model
from mlx_mtp.cli.opening import Opening, opened, opening
from mlx_mtp.cli.option_groups import takes
from mlx_mtp.cli.terminal import say
from mlx_mtp.errors import MtpError, ParameterError, PromptError

if TYPE_CHECKING:
    from mlx_mtp.batch_choice import Goal
    from mlx_mtp.conversation import Request
    from mlx_mtp.pair import Pair
    from mlx_mtp.prompt_lines import Answers, Line
    from mlx_mtp.reply import Generation

REPLY_TOKENS = 1024


@takes(wanted=opening, reply=partial(options.reply_options, max_tokens=REPLY_TOKENS))
def batch(
    *,
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] PROMPTS",
            help="A file with a JSON object a line: prompt or messages; also id, max_tokens, sampling, seed, stop, "
            f"thinking, tools. {options.MODEL_HELP} {options.LAST_HELP}",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Where answers go, each as it ends; lines answered there are skipped.",
        ),
    ],
    wanted: Opening,
    width: Annotated[
        str,
        typer.Option(
            "--width", metavar="auto|N", help="Lines decoded together at most; auto tries what pays."
        ),
    ] = "auto",
    goal: Annotated[
        str,
        typer.Option(
            "--goal",
            metavar="throughput|latency",
            help="Of --width auto: most tokens a second, or each line nearly as fast as alone.",
        ),
    ] = "throughput",
    reply: options.ReplyOptions,
    text: Annotated[
        bool, typer.Option("--text", help="Continue each prompt as it is, without the chat template.")
    ] = False,
) -> None:
    """Answer a file of prompts: each line's text is what `generate` gives. Run again to go on after an interrupt."""
    from mlx_mtp.batch_choice import check_goal
    from mlx_mtp.prompt_lines import Answers, read_lines

    most = parse_width(width)
    aim = check_goal(goal)
    if len(words) > 2:
        raise ParameterError(
            f"a model and a file of prompts are wanted, got {len(words)} words; write MODEL PROMPTS"
        )
    prompts, model = Path(words[-1]), words[0] if len(words) == 2 else ""
    lines = read_lines(prompts)
    if not lines:
        raise PromptError(f'{prompts} holds no line; write {{"prompt": "..."}}, one a line')
    if output.exists() and output.samefile(prompts):
        raise PromptError(f"{output} is the file of prompts itself; give another file to write to")
    asked = wanted.of(model)
    if not model:
        asked = choose_model(asked)
    answers = Answers(output)
    try:
        left = [line for line in lines if not answers.take(line)]
        if len(left) < len(lines):
            say(f"({len(lines) - len(left)} of {len(lines)} lines were answered already)")
        if left:
            with opened(asked) as pair:
                _answer(pair, left, answers, reply, most, aim, as_text=text)
    finally:
        answers.close()


def parse_width(text: str) -> int | None:
    """`auto` (None) or a number of lines; ParameterError where it is neither."""
    from mlx_mtp.batch_width import check_batch

    word = text.strip().lower()
    return None if word == "auto" else check_batch(int(word) if word.lstrip("-").isdecimal() else word)


def _answer(
    pair: "Pair",
    lines: "list[Line]",
    answers: "Answers",
    reply: options.ReplyOptions,
    width: int | None,
    goal: "Goal",
    *,
    as_text: bool,
) -> None:
    from mlx_mtp.batch import generate_rows
    from mlx_mtp.batch_choice import make_chooser
    from mlx_mtp.batch_watch import Watch
    from mlx_mtp.pressure import Guard
    from mlx_mtp.prompt_lines import answer_line

    settings, progress = reply.request(pair), BatchProgress(len(lines))
    asked = _checked(pair, lines, settings, answers, progress, as_text=as_text)

    def on_done(index: int, out: "Generation") -> None:
        answers.write(answer_line(asked[index][0], out))
        progress.ended(failed=out.finish_reason == "error")

    policy, rounds = pair.policy(reply.num_draft_tokens), pair.rounds
    watch = Watch(on_round=progress.round, on_done=on_done, on_note=progress.note)
    chooser = make_chooser(rounds.times, rounds.fit, reply.num_draft_tokens, goal)
    requests = [request for _, request in asked]
    try:
        generate_rows(pair, requests, policy, Guard(), watch, max_batch=width or chooser)
    finally:
        progress.clear()
    say(
        f"{progress.answered} of {len(lines)} lines answered, {progress.failed} with an error · "
        f"{progress.tokens} tok · {progress.rate:.1f} tok/s"
        + ("" if width else f" · up to {chooser.width} at a time")
        + (f" · {policy.reason}" if policy.reason else "")
    )


def _checked(
    pair: "Pair",
    lines: "list[Line]",
    settings: dict[str, Any],
    answers: "Answers",
    progress: BatchProgress,
    *,
    as_text: bool,
) -> "list[tuple[Line, Request]]":
    """The lines that can be answered, with their requests; the others are answered with what is wrong."""
    from mlx_mtp.prompt_lines import error_line

    asked: list[tuple[Line, Request]] = []
    for line in lines:
        try:
            asked.append((line, _request(pair, line, settings, as_text=as_text)))
        except MtpError as error:
            answers.write(error_line(line, error))
            progress.ended(failed=True)
    return asked


def _request(pair: "Pair", line: "Line", settings: dict[str, Any], *, as_text: bool) -> "Request":
    from mlx_mtp.conversation import make_request
    from mlx_mtp.prompt_lines import request_of

    default = {name: settings[name] for name in ("max_tokens", "stop", "thinking")}
    if as_text:
        del default["thinking"]
    own = request_of(line, settings["sampling"], as_text=as_text)
    return make_request(pair, own.pop("prompt"), **{**default, **own})
