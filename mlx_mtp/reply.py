"""One reply as it is given to callers: rounds in, chunks of text and figures out."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import mlx.core as mx

from mlx_mtp.decode import Step
from mlx_mtp.log_probs import TokenLogProbs
from mlx_mtp.pair import Pair
from mlx_mtp.policy import Policy
from mlx_mtp.stats import RowCount, Stats
from mlx_mtp.stream import Channel, Piece, TextStream

if TYPE_CHECKING:
    from mlx_mtp.conversation import Request

BROKEN = "the model gave no usable numbers; its cache was dropped and the next turn starts cold"


# How a token came: from the prefill, from a round without drafts, as a draft that was kept, as the target's own choice
# at the first draft that was wrong, or as the target's extra one after all drafts were right.
Origin = Literal["prefill", "plain", "accepted", "recovered", "bonus"]


@dataclass(frozen=True, slots=True)
class Written:
    """One token of a reply and the text that it made certain: none while a character or stop string is incomplete.

    channel: where its own text goes, None for a control token without any. log_probs: where they were asked for.
    """

    id: int
    origin: Origin
    pieces: tuple[Piece, ...]
    channel: Channel | None = None
    log_probs: TokenLogProbs | None = None


@dataclass(frozen=True, slots=True)
class Played:
    """One round as a row saw it; the first token, which prefill gives, counts as a round without drafts."""

    drafted: int  # drafts verified
    accepted: int  # drafts that were right
    emitted: int  # tokens; an end may have cut some


@dataclass(frozen=True, slots=True)
class Chunk:
    """What a round added: text of the answer, of the thoughts, of tool calls; `stats` so far.

    note: in words, why the reply ends here without being complete; None otherwise. written: the tokens one by one.
    tail: text that was held back and belongs to no token of this chunk.
    """

    text: str
    thought: str
    tool_call: str
    tokens: tuple[int, ...]
    finish_reason: str | None
    stats: Stats
    note: str | None = None
    written: tuple[Written, ...] = ()
    rounds: tuple[Played, ...] = ()
    tail: tuple[Piece, ...] = ()

    def followed_by(self, later: "Chunk") -> "Chunk":
        """Both as one chunk."""
        return Chunk(
            text=self.text + later.text,
            thought=self.thought + later.thought,
            tool_call=self.tool_call + later.tool_call,
            tokens=self.tokens + later.tokens,
            finish_reason=later.finish_reason,
            stats=later.stats,
            note=later.note,
            written=self.written + later.written,
            rounds=self.rounds + later.rounds,
            tail=later.tail,
        )


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole reply; `finish_reason` is "stop", "length", "cancelled" or "error"; `note` says what went wrong.

    log_probs: one for each of `tokens`, where they were asked for.
    """

    text: str
    thought: str
    tool_call: str
    tokens: list[int]
    finish_reason: str
    stats: Stats
    note: str | None = None
    log_probs: list[TokenLogProbs] | None = None


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
        # What the reply was made to begin with is its text too, told with the first token.
        self._begun = self._stream.push(request.begin_with).pieces
        self._started, self._first_at = started, time.perf_counter()

    @property
    def finish_reason(self) -> str | None:
        return self._stream.finish_reason

    @property
    def failed(self) -> bool:
        """Whether its K/V is to be dropped: rows that are no numbers must not be reused, and scarce memory is freed."""
        return self.finish_reason == "error"

    def take(self, step: Step, policy: Policy, *, is_cancelled: bool = False) -> Chunk:
        """This row's part of a step -> the chunk for it; a reply that is cancelled ends with what the step gave."""
        tokens, finish, accepted = step.tokens[self.row], step.finish[self.row], step.accepted[self.row]
        log_probs = None if step.log_probs is None else step.log_probs.get(self.row)
        written: list[Written] = []
        for i, token in enumerate(tokens):
            if self.finish_reason is not None:
                break
            origin = _origin(i, step.verified, accepted)
            pieces, channel = self._stream.push((token,)).pieces, self._stream.token_channel
            own = None if log_probs is None else log_probs[i]
            written.append(Written(token, origin, self._take_begun() + pieces, channel, own))
        if finish is None and is_cancelled:
            finish = "cancelled"
        tail: tuple[Piece, ...] = () if self.finish_reason is None else self._take_begun()
        if finish is not None and self.finish_reason is None:
            tail = self._take_begun() + self._stream.finish(finish).pieces
        if tail and written:
            last = written.pop()
            written.append(replace(last, pieces=last.pieces + tail))
            tail = ()
        self.tokens += tokens[: len(written)]
        self._count.add(step, self.row, len(written))
        rounds = (Played(step.verified, max(accepted, 0), len(written)),) if written else ()
        return self._chunk(policy, tuple(written), rounds, tail, BROKEN if self.failed else None)

    def stop(self, policy: Policy, note: str | None, reason: str = "error") -> Chunk:
        """The last chunk of a reply that cannot go on, with the text that was held back."""
        return self._chunk(policy, tail=self._take_begun() + self._stream.finish(reason).pieces, note=note)

    def _take_begun(self) -> tuple[Piece, ...]:
        begun, self._begun = self._begun, ()
        return begun

    def _chunk(
        self,
        policy: Policy,
        written: tuple[Written, ...] = (),
        rounds: tuple[Played, ...] = (),
        tail: tuple[Piece, ...] = (),
        note: str | None = None,
    ) -> Chunk:
        pieces = [piece for one in written for piece in one.pieces] + list(tail)
        return Chunk(
            text=_joined(pieces, "answer"),
            thought=_joined(pieces, "thought"),
            tool_call=_joined(pieces, "tool"),
            tokens=tuple(one.id for one in written),
            finish_reason=self.finish_reason,
            stats=self.stats(policy),
            note=note,
            written=written,
            rounds=rounds,
            tail=tail,
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


@dataclass(slots=True)
class Gathered:
    """Adds up the chunks of one reply without keeping them: each has the figures of all rounds before it."""

    texts: dict[str, list[str]] = field(default_factory=lambda: {"text": [], "thought": [], "tool_call": []})
    tokens: list[int] = field(default_factory=list)
    log_probs: list[TokenLogProbs] = field(default_factory=list)
    last: Chunk | None = None

    def add(self, chunk: Chunk) -> None:
        self.texts["text"].append(chunk.text)
        self.texts["thought"].append(chunk.thought)
        self.texts["tool_call"].append(chunk.tool_call)
        self.tokens += chunk.tokens
        self.log_probs += (one.log_probs for one in chunk.written if one.log_probs is not None)
        self.last = chunk

    def generation(self) -> Generation:
        """The reply so far."""
        assert self.last is not None, "a reply has at least one chunk"
        return Generation(
            **{name: "".join(parts) for name, parts in self.texts.items()},
            tokens=list(self.tokens),
            finish_reason=self.last.finish_reason or "cancelled",
            stats=self.last.stats,
            note=self.last.note,
            log_probs=list(self.log_probs) or None,
        )


def collect(chunks: Iterable[Chunk]) -> Generation:
    """All chunks of one reply -> the reply."""
    gathered = Gathered()
    for chunk in chunks:
        gathered.add(chunk)
    return gathered.generation()


def _origin(i: int, verified: int, accepted: int) -> Origin:
    """Of the i-th token that a round emitted, which verified so many drafts and accepted so many (-1: no round)."""
    if accepted < 0:
        return "prefill"
    if i < accepted:
        return "accepted"
    if verified == 0:
        return "plain"
    return "bonus" if accepted == verified else "recovered"


def _joined(pieces: Sequence[Piece], channel: str) -> str:
    return "".join(piece.text for piece in pieces if piece.channel == channel)
