"""What every arm of peers.py shares: the job it is given, the clock, and the line of JSON that it prints.

Needs neither this package nor MLX, so that it runs in every peer's own environment.
"""

import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """One process of one arm; lies as JSON in the file that it is started with."""

    target: str  # folder
    drafter: str  # folder
    prompts: list[list[int]]
    tokens: int  # of each reply
    drafts: int  # a round; 0 is plain decoding
    warm_ups: int  # discarded runs over the first prompt
    runs: int
    float32: bool  # all weights and activations, whatever the files hold
    watch: bool  # play once more and watch what the host does


@dataclass
class Clock:
    """The spans of time that count: from the first token of a reply to its last, so without prefill."""

    spans: list[tuple[float, float]] = field(default_factory=list)
    processor_s: float = 0.0  # of this thread, in all spans
    began: float = 0.0
    began_processor: float = 0.0

    def start(self) -> None:
        """Called as soon as the first token is on the host."""
        self.began, self.began_processor = time.perf_counter(), time.thread_time()

    def stop(self) -> None:
        """Called when the last token is on the host and nothing is left in flight."""
        self.processor_s += time.thread_time() - self.began_processor
        self.spans.append((self.began, time.perf_counter()))

    @property
    def seconds(self) -> float:
        return sum(end - begin for begin, end in self.spans)


@dataclass
class Reply:
    """What one prompt gave: tokens, rounds after the first token, and drafts kept in them."""

    tokens: list[int]
    rounds: int
    accepted: int


Play = Callable[[list[int], Clock], Reply]
Watching = Callable[
    [], AbstractContextManager[Any]
]  # peer_watch.watching; None where the host computes itself


def play_all(play: Play, job: Job, prompts: list[list[int]] | None = None) -> tuple[Clock, list[Reply]]:
    """Every prompt once, each from a cold cache."""
    clock, replies = Clock(), []
    for ids in prompts or job.prompts:
        reply = play(ids, clock)
        if len(reply.tokens) != job.tokens:
            sys.exit(f"{len(reply.tokens)} tokens came, {job.tokens} were asked for: nothing is reported")
        replies.append(reply)
    return clock, replies


def as_run(clock: Clock, replies: list[Reply]) -> dict[str, Any]:
    return {
        "tokens": [reply.tokens for reply in replies],
        "seconds": clock.seconds,
        "rounds": sum(reply.rounds for reply in replies),
        "accepted": sum(reply.accepted for reply in replies),
    }


def run_arm(
    open_arm: Callable[[Job], Play], packages: tuple[str, ...], watching: Watching | None = None
) -> None:
    """Read the job named on the command line, play it, and print what it gave as the last line."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    play = open_arm(job)
    for _ in range(job.warm_ups):
        play_all(play, job, job.prompts[:1])
    runs = [as_run(*play_all(play, job)) for _ in range(job.runs)]
    host = None
    if job.watch and watching is not None:
        with watching() as watch:
            clock, replies = play_all(play, job)
        host = watch.summary(clock.spans, clock.processor_s, sum(reply.rounds for reply in replies))
    versions = {package: version(package) for package in packages}
    print(json.dumps({"versions": versions, "runs": runs, "host": host}))


def write_job(job: Job, path: Path) -> Path:
    path.write_text(json.dumps(asdict(job)))
    return path
