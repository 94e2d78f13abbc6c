"""Recording a race: the same prompt and seeds, once plain and once with MTP, each token with the time it came."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_mtp.conversation import Prompt
    from mlx_mtp.pair import Pair
    from mlx_mtp.reply import Chunk, Origin
    from mlx_mtp.stats import Stats

WARM_UP_TOKENS = 32  # of each arm, before its recording: what MLX compiles is no part of a race


@dataclass(frozen=True, slots=True)
class Mark:
    """One token as it came: seconds since the first of its arm, which answer it belongs to, its text, its origin."""

    at: float
    row: int
    text: str
    origin: "Origin"


@dataclass(frozen=True, slots=True)
class Arm:
    """One arm from its first token to its last; `tokens` and `stats` of each answer."""

    name: str
    marks: tuple[Mark, ...]
    tokens: tuple[tuple[int, ...], ...]
    stats: "tuple[Stats, ...]"

    @property
    def seconds(self) -> float:
        """From the first token of all answers to the last."""
        return self.marks[-1].at

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all answers after the first to come, over the seconds since it."""
        return (len(self.marks) - 1) / self.seconds if self.seconds else 0.0


def record(
    pair: "Pair",
    prompt: "Prompt",
    *,
    name: str,
    n: int,
    num_draft_tokens: int | str,
    on_tokens: Callable[[int], None],
    **request: Any,
) -> Arm:
    """Play one arm, a few tokens first to warm up; `on_tokens` is told how many of it have come."""
    warm_up = {**request, "max_tokens": min(WARM_UP_TOKENS, request["max_tokens"])}
    _play(pair, prompt, n, num_draft_tokens, warm_up, lambda now, row, chunk: None)
    marks: list[Mark] = []
    began: list[float] = []

    def on_chunk(now: float, row: int, chunk: "Chunk") -> None:
        if not began:
            began.append(now)
        at = now - began[0]
        for one in chunk.written:
            marks.append(Mark(at, row, "".join(piece.text for piece in one.pieces), one.origin))
        on_tokens(len(marks))

    outs = _play(pair, prompt, n, num_draft_tokens, request, on_chunk)
    return Arm(name, tuple(marks), tuple(tuple(out.tokens) for out in outs), tuple(out.stats for out in outs))


def _play(
    pair: "Pair",
    prompt: "Prompt",
    n: int,
    num_draft_tokens: int | str,
    request: dict[str, Any],
    on_chunk: Callable[[float, int, "Chunk"], None],
) -> Sequence[Any]:
    from mlx_mtp.answers import answers_in
    from mlx_mtp.batch_watch import Watch
    from mlx_mtp.conversation import Conversation

    def on_row(row: int, chunk: "Chunk") -> None:
        on_chunk(time.perf_counter(), row, chunk)

    return answers_in(
        Conversation(pair),
        prompt,
        n,
        num_draft_tokens=num_draft_tokens,
        watch=Watch(on_chunk=on_row),
        **request,
    )


def first_difference(plain: Arm, mtp: Arm) -> tuple[int, int] | None:
    """The first answer and token at which the arms differ, None where they are identical."""
    for row, (a, b) in enumerate(zip(plain.tokens, mtp.tokens, strict=True)):
        if a != b:
            shared = min(len(a), len(b))
            return row, next((i for i in range(shared) if a[i] != b[i]), shared)
    return None
