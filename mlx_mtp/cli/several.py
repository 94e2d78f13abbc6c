"""Several answers to one prompt on the terminal: each under its number, in the order asked for."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlx_mtp.cli.status import short_count
from mlx_mtp.cli.terminal import ReplyWriter, say

if TYPE_CHECKING:
    from mlx_mtp.reply import Generation


def write_answers(answers: "Sequence[Generation]") -> None:
    """The answers on stdout with an empty line between two; numbers, thoughts and what was unusual on stderr."""
    for number, out in enumerate(answers, 1):
        writer = ReplyWriter()
        if number > 1:
            writer.write("\n", "answer")
        say(f"[answer {number} of {len(answers)}, seed {out.stats.seed}]")
        writer.write(out.thought, "thought")
        writer.write(out.tool_call, "tool call")
        writer.write(out.text, "answer")
        writer.finish()
        if out.finish_reason == "length":
            say("(cut off: the reply reached its limit of tokens; --max-tokens sets it)")
        elif out.note is not None:
            say(f"({out.note})")
    say(_figures(answers))


def _figures(answers: "Sequence[Generation]") -> str:
    """`4 answers · 412 tok · accept 71 %` and the policy's reason, if there is one."""
    stats = [out.stats for out in answers]
    parts = [f"{len(answers)} answers", f"{short_count(sum(own.generation_tokens for own in stats))} tok"]
    drafted = sum(own.drafted for own in stats)
    if drafted:
        parts.append(f"accept {100 * sum(own.accepted for own in stats) / drafted:.0f} %")
    if stats[-1].reason is not None:
        parts.append(stats[-1].reason)
    return " · ".join(parts)
