"""One reply as it is given to callers: rounds in, chunks of text and figures out."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_mtp.decode import Step
from mlx_mtp.pair import Pair
from mlx_mtp.policy import Policy
from mlx_mtp.stats import RowCount, Stats
from mlx_mtp.stream import Piece, TextStream

if TYPE_CHECKING:
    from mlx_mtp.conversation import Request

BROKEN = "the model gave no usable numbers; its cache was dropped and the next turn starts cold"


@dataclass(frozen=True, slots=True)
class Chunk:
    """What a round added: text of the answer, of the thoughts, of tool calls; `stats` so far.

    note: in words, why the reply ends here without being complete; None otherwise.
    """

    text: str
    thought: str
    tool_call: str
    tokens: tuple[int, ...]
    finish_reason: str | None
    stats: Stats
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole reply; `finish_reason` is "stop", "length", "cancelled" or "error"; `note` says what went wrong."""

    text: str
    thought: str
    tool_call: str
    tokens: list[int]
    finish_reason: str
    stats: Stats
    note: str | None = None


class Reply:
    """Turns one row's steps into chunks and figures."""

    def __init__(self, pair: Pair, request: "Request", reused: int, started: float, row: int = 0):
        self.tokens: list[int] = []
        self.row = row
        self._pair, self._request, self._reused = pair, request, reused
        self._count = RowCount()
        self._stream = TextStream(
            pair.prompt_format.tokenizer, stop=request.stop, eos_ids=pair.prompt_format.eos_ids
        )
        self._started, self._first_at = started, time.perf_counter()

    @property
    def finish_reason(self) -> str | None:
        return self._stream.finish_reason

    @property
    def failed(self) -> bool:
        """Whether its K/V is to be dropped: rows that are no numbers must not be reused, and scarce memory is freed."""
        return self.finish_reason == "error"

    def take(self, step: Step, policy: Policy) -> Chunk:
        """This row's part of a step -> the chunk for it."""
        tokens, finish = step.tokens[self.row], step.finish[self.row]
        pushed = self._stream.push(tokens)
        pieces = pushed.pieces
        if finish is not None and pushed.finish_reason is None:
            pieces += self._stream.finish(finish).pieces
        used = tokens[: pushed.used]
        self.tokens += used
        self._count.add(step, self.row, len(used))
        return self._chunk(pieces, used, policy, BROKEN if self.failed else None)

    def stop(self, policy: Policy, note: str) -> Chunk:
        """The last chunk of a reply that cannot go on, with the text that was held back."""
        pieces = self._stream.finish("error").pieces
        return self._chunk(pieces, (), policy, note)

    def _chunk(
        self, pieces: Sequence[Piece], tokens: tuple[int, ...], policy: Policy, note: str | None = None
    ) -> Chunk:
        return Chunk(
            text=_joined(pieces, "answer"),
            thought=_joined(pieces, "thought"),
            tool_call=_joined(pieces, "tool"),
            tokens=tokens,
            finish_reason=self.finish_reason,
            stats=self.stats(policy),
            note=note,
        )

    def stats(self, policy: Policy) -> Stats:
        """The figures so far."""
        count, now = self._count, time.perf_counter()
        prefill_s, decode_s = self._first_at - self._started, now - self._first_at
        prompt_tokens, rounds = len(self._request.ids), self._pair.rounds
        return Stats(
            prompt_tokens=prompt_tokens,
            reused_tokens=self._reused,
            generation_tokens=count.tokens,
            rounds=count.rounds,
            drafted=count.drafted,
            accepted=count.accepted,
            accepted_by_position=tuple(count.by_position),
            num_draft_tokens=tuple(count.num_draft_tokens),
            prompt_tps=(prompt_tokens - self._reused) / prefill_s if prefill_s > 0 else 0.0,
            generation_tps=max(count.tokens - 1, 0) / decode_s if decode_s > 0 else 0.0,
            ttft_s=prefill_s,
            peak_memory_bytes=mx.get_peak_memory(),
            parked=policy.parked,
            reason=policy.reason,
            warning=rounds.fit.warning,
            seed=self._request.sampling.seed,
            exact=None if rounds.exactness is None else rounds.exactness.holds,
            exactness_tax=None if rounds.tax is None else rounds.tax.ratio,
        )


def collect(chunks: Iterable[Chunk]) -> Generation:
    """All chunks of one reply -> the reply."""
    taken = list(chunks)
    last = taken[-1]
    return Generation(
        text="".join(chunk.text for chunk in taken),
        thought="".join(chunk.thought for chunk in taken),
        tool_call="".join(chunk.tool_call for chunk in taken),
        tokens=[token for chunk in taken for token in chunk.tokens],
        finish_reason=last.finish_reason or "cancelled",
        stats=last.stats,
        note=last.note,
    )


def _joined(pieces: Sequence[Piece], channel: str) -> str:
    return "".join(piece.text for piece in pieces if piece.channel == channel)
