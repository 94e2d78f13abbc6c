"""`mlx-mtp tune --experts`: how many distinct experts a pass of several rows reads, on real text."""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_mtp.cli.bars import Bar, bars, has_blocks
from mlx_mtp.cli.layout import table, terminal_columns, wrapped
from mlx_mtp.cli.opening import Opening, opened, progress_shown
from mlx_mtp.cli.terminal import say, write_answer
from mlx_mtp.errors import ParameterError, PromptError
from mlx_mtp.progress import OnProgress, Progress

if TYPE_CHECKING:
    from mlx_mtp.pair import Pair
    from mlx_mtp.report.experts import Text

SCHEMA = "mlx-mtp experts 1"
MOST_TOKENS = 2048  # of a text from a file
HINT = (
    "Nobody has published this for Gemma 4. If this is the real 26B-A4B, please send the figures: "
    "docs/tuning.md says how."
)


def show_experts(asked: Opening, path: Path | None, *, as_json: bool) -> None:
    """Open the model, count, keep the averages for `auto`, and write the curve."""
    from mlx_mtp.cli.tune import read_given

    given = None if path is None else read_given(path, "--text")
    with opened(asked) as pair:
        text = pair.target.text
        if not text.num_experts:
            raise ParameterError(
                f"{asked.model} is a dense model: all of its weights are read for every row, and there are no experts "
                "to count; name one with experts, such as 26b"
            )
        found = _counted(pair, given)
        for rows, own in found["by_rows"].items():
            pair.rounds.times.distinct[int(rows)] = own["distinct"]
    found = {"schema": SCHEMA, "model": asked.model, "text": "replies" if given is None else "file", **found}
    if as_json:
        write_answer(json.dumps(found, indent=1) + "\n")
        return
    write_answer(_as_text(found) + "\n")
    say(HINT)


def _counted(pair: "Pair", given: bytes | None) -> dict[str, Any]:
    from mlx_mtp.machine import this_machine
    from mlx_mtp.report.experts import measure_overlap, replies
    from mlx_mtp.report.setting import PROMPTS, Setting

    texts: Iterable[Text]
    if given is None:
        setting = Setting(pair.name, this_machine(), pair)
        texts, count = replies(setting), len(PROMPTS)
    else:
        texts, count = [_text_of(pair, given)], 1
    found: dict[str, Any] = {}
    with progress_shown() as on_progress:
        measure_overlap(pair.target, _shown(texts, count, on_progress), found, _never_ends)
    if not found.get("by_rows"):
        raise PromptError("there is no text to count experts on; give a longer one")
    return found


def _shown(texts: "Iterable[Text]", count: int, on_progress: OnProgress) -> "Iterator[Text]":
    on_progress(Progress("read", f"counting experts in text 1 of {count}"))
    for i, text in enumerate(texts, start=1):
        yield text
        if i < count:
            on_progress(Progress("read", f"counting experts in text {i + 1} of {count}"))


def _text_of(pair: "Pair", given: bytes) -> "Text":
    """The first tokens of a file: one goes before, as a verify always has a token before its rows."""
    from mlx_mtp.prompt import prompt_ids
    from mlx_mtp.report.experts import Text

    try:
        words = given.decode()
    except UnicodeDecodeError:
        raise PromptError("--text takes a file of UTF-8 text, got other bytes; give a text file") from None
    ids = prompt_ids(pair.prompt_format, words).ids
    most = min(MOST_TOKENS, pair.max_context)
    if len(ids) > most:
        say(f"(the first {most} of {len(ids)} tokens are used)")
    return Text(list(ids[:1]), list(ids[1:most]))


def _never_ends() -> None:
    """Nothing limits the time but Ctrl-C."""


def _as_text(found: dict[str, Any]) -> str:
    columns = terminal_columns(sys.stdout)
    by_rows = found["by_rows"]
    rows = [
        [
            rows,
            f"{own['distinct']:.1f}",
            f"{own['independent']:.1f}",
            str(own["pairs"]),
            f"{100 * own['share_of_pairs']:.0f} %",
        ]
        for rows, own in by_rows.items()
    ]
    drawn = [
        Bar(rows, own["distinct"], f"{own['distinct']:.1f}", own["independent"])
        for rows, own in by_rows.items()
    ]
    of = "the model's own replies" if found["text"] == "replies" else "the file"
    told = (
        f"{found['model']}: distinct experts of a layer that rows in succession are sent to, of {found['experts']}, "
        f"{found['experts_per_token']} each; {found['rows_of_text']} rows of {of}"
    )
    marked = "The bar: experts read; the mark: if rows chose regardless of one another"
    header = ["rows", "distinct", "if independent", "pairs", "read of them"]
    return "\n\n".join(
        [
            wrapped(told, columns),
            table(header, rows, columns, title=0),
            wrapped(marked, columns) + "\n" + bars(drawn, columns, blocks=has_blocks(sys.stdout)),
        ]
    )
