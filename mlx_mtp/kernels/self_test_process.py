"""The other process: `python -m mlx_mtp.kernels.self_test_process` tests and races what it reads, a JSON line each.

Whatever a kernel does here ends this process and no other. On stdin: {"columns": of a tested matrix, "sizes": rows of
the self-test or null, "repeats": of the race or null, "operations": [{"name", "description", "rows"}]}. On stdout for
each operation, by its place in that list: {"step"}, several times; then {"tested"} and, if it passed, {"raced"};
{"raised"} where MLX or a kernel raised; at the end {"done"}.
"""

import json
import os
import signal
import sys
from typing import Any, TextIO

import mlx.core as mx

from mlx_mtp.kernels.families import FAMILIES, Family, key_of
from mlx_mtp.kernels.operations import HEAD_CHOOSE
from mlx_mtp.kernels.race import REPEATS, race_operation
from mlx_mtp.kernels.results import raced_entry, tested_entry
from mlx_mtp.kernels.self_test import SIZES, check_operation
from mlx_mtp.kernels.specimens import specimen

COLUMNS = 1024  # of a tested matrix: sums are as long as in the model, only fewer
HEAD_COLUMNS = 16_384  # of a head's: many parts of the vocabulary, whose best are merged
SEED = 401


def main() -> None:
    """Answer on what was stdout; whatever else is printed there goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    asked = json.load(sys.stdin)
    signal.alarm(asked["seconds"])  # should nobody be left to end a kernel that hangs
    answer_all(asked, answers)


def answer_all(asked: dict[str, Any], answers: TextIO) -> None:
    """Test and race every operation, in order."""
    for index, one in enumerate(asked["operations"]):

        def say(index: int = index, **words: Any) -> None:
            answers.write(json.dumps({"operation": index, **words}) + "\n")
            answers.flush()

        try:
            _answer(one, asked, say)
        except Exception as error:  # a kernel that raises has failed; the next may be right
            say(raised=f"{type(error).__name__}: {error}"[:300])
        mx.clear_cache()
    answers.write(json.dumps({"done": True}) + "\n")
    answers.flush()


def _answer(one: dict[str, Any], asked: dict[str, Any], say: Any) -> None:
    name, description = one["name"], one["description"]
    say(step="random numbers")
    columns = HEAD_COLUMNS if name == HEAD_CHOOSE else COLUMNS
    subject = specimen(description, seed=SEED, columns=asked["columns"] or columns)
    family: Family = FAMILIES[key_of(name, subject)]
    tested = check_operation(
        name,
        subject,
        family.kernel,
        family.reference,
        step=lambda what: say(step=what),
        sizes=asked["sizes"] or SIZES,
    )
    say(tested=tested_entry(tested))
    del subject
    if tested.passed and one["rows"]:
        raced = race_operation(
            name,
            description,
            family.kernel,
            tested,
            one["rows"],
            step=lambda what: say(step=what),
            repeats=asked["repeats"] or REPEATS,
        )
        say(raced=raced_entry(raced))


if __name__ == "__main__":
    main()
