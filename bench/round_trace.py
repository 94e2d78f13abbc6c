"""The order of events in our loop: the next round is built ahead, this one is read, then the next is dispatched.

    python bench/round_trace.py demo --rounds 4

On the CPU backend dispatching is computing, so that building ahead hides nothing there; on Metal the GPU computes one
round while the host builds the next, which `mlx-mtp doctor --report` measures.
"""

import argparse
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from demo_models import held_out_code, load_ours
from peer_watch import BUILD, watching

import mlx_mtp.decode
from mlx_mtp.conversation import Conversation
from mlx_mtp.pair import Pair
from mlx_mtp.sampling import Sampling

STAGES = {BUILD: "build ahead", "tolist": "read", "eval": "wait for drafts", "async_eval": "dispatch"}
START = ("wait for drafts", "build ahead", "dispatch")  # the first drafts; the first round
ROUND = ("build ahead", "read", "wait for drafts", "dispatch")  # the next, this one, this one, the next
END = ("build ahead", "read")  # the last round: what was built behind it is dropped
WIDTH = 60  # columns of the timeline


class Event(NamedTuple):
    """One stage: a call, or several alike in a row; in seconds."""

    stage: str
    begin: float
    end: float


def trace(pair: Pair, ids: Sequence[int], *, tokens: int, drafts: int) -> list[Event]:
    """The stages of one greedy reply from behind its first token until its last round is read."""
    chunks = Conversation(pair).stream(
        list(ids), max_tokens=tokens, sampling=Sampling(temperature=0.0), num_draft_tokens=drafts
    )
    next(chunks)
    with watching((mlx_mtp.decode, "_build", BUILD)) as watch:
        while next(chunks).finish_reason is None:
            pass
    named = [Event(STAGES[call.name], call.begin, call.end) for call in watch.calls]
    runs = [list(run) for _, run in groupby(named, key=lambda event: event.stage)]
    return [Event(run[0].stage, run[0].begin, run[-1].end) for run in runs]


def rounds_of(events: Sequence[Event]) -> list[list[Event]]:
    """The stages cut into start, rounds and end; raises ValueError at the first stage that comes out of order."""
    parts: list[list[Event]] = []
    rest = list(events)
    while rest:
        wanted = ROUND if len(rest) > len(END) else END
        wanted = wanted if parts else START
        part, rest = rest[: len(wanted)], rest[len(wanted) :]
        if (found := tuple(event.stage for event in part)) != wanted:
            raise ValueError(f"part {len(parts) + 1} goes {', '.join(found)}; expected {', '.join(wanted)}")
        parts.append(part)
    return parts


def timeline(parts: Sequence[Sequence[Event]]) -> list[str]:
    """A line a stage, with the round it belongs to and a bar where it lies in time."""
    begin, end = parts[0][0].begin, parts[-1][-1].end
    scale = WIDTH / (end - begin)
    lines = []
    for number, part in enumerate(parts):
        for event in part:
            is_next = event.stage in ("build ahead", "dispatch")
            owner = number + 1 if is_next else number
            left = int((event.begin - begin) * scale)
            bar = " " * left + "#" * max(1, int((event.end - begin) * scale) - left)
            lines.append(
                f"{1e3 * (event.begin - begin):8.2f} ms {1e3 * (event.end - event.begin):7.2f} ms"
                f"  {event.stage:15} round {owner:<3} |{bar}"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", nargs="?", default="demo", help='"demo" or the target folder of a pair')
    parser.add_argument("--drafts", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5, help="rounds to show")
    args = parser.parse_args()
    pair, (ids,) = load_ours(args.target), held_out_code(args.target, 1)
    tokens = (args.rounds + 4) * (args.drafts + 1)
    trace(pair, ids, tokens=tokens, drafts=args.drafts)  # traces and compiles
    parts = rounds_of(trace(pair, ids, tokens=tokens, drafts=args.drafts))
    print("   starts     takes  stage           of round")
    for line in timeline(parts[: args.rounds]):
        print(line)


if __name__ == "__main__":
    main()
