"""What happens to a request, as frozen events: Progress, Drafted, Accepted, Token, Parked and, at the end, Done."""

from collections.abc import Iterator
from dataclasses import dataclass

from mlx_mtp.log_probs import TokenLogProbs
from mlx_mtp.progress import Progress
from mlx_mtp.reply import Chunk, Generation, Origin
from mlx_mtp.stream import Piece

__all__ = ["Accepted", "Done", "Drafted", "Event", "EventMaker", "Parked", "Progress", "Token"]


@dataclass(frozen=True, slots=True)
class Drafted:
    """A round, counted from 1, verified so many drafts; rounds without drafts have no such event."""

    round: int
    count: int


@dataclass(frozen=True, slots=True)
class Accepted:
    """`count` of a round's `drafted` drafts were right; its tokens follow, an end may cut them."""

    round: int
    count: int
    drafted: int


@dataclass(frozen=True, slots=True)
class Token:
    """The reply's token `index`, from 0, and the text that it made certain, which may be none or earlier tokens' too.

    origin: "prefill" (the first), "plain" (a round without drafts), "accepted" (a draft that was kept), "recovered"
    (the target's own where a draft was wrong) or "bonus" (the target's extra one after all drafts were right).
    log_probs: where they were asked for.
    """

    index: int
    id: int
    origin: Origin
    pieces: tuple[Piece, ...]
    log_probs: TokenLogProbs | None = None

    @property
    def text(self) -> str:
        """Its text in the answer, without thoughts and tool calls."""
        return "".join(piece.text for piece in self.pieces if piece.channel == "answer")


@dataclass(frozen=True, slots=True)
class Parked:
    """Drafting stopped or was taken up again; `reason` says why in words."""

    parked: bool
    reason: str | None


@dataclass(frozen=True, slots=True)
class Done:
    """The reply has ended; `tail` is text that was held back and that no Token has."""

    result: Generation
    tail: tuple[Piece, ...] = ()

    @property
    def finish_reason(self) -> str:
        return self.result.finish_reason


Event = Progress | Drafted | Accepted | Token | Parked | Done


class EventMaker:
    """Turns one reply's chunks into events, in order."""

    def __init__(self) -> None:
        self._tokens = self._rounds = 0
        self._is_parked = False

    def events(self, chunk: Chunk) -> Iterator[Event]:
        """The events of a chunk, which may be several rounds' in one; `Done` is left to whoever has the result."""
        at = 0
        for played in chunk.rounds:
            is_round = chunk.written[at].origin != "prefill"
            self._rounds += is_round
            if played.drafted:
                yield Drafted(self._rounds, played.drafted)
                yield Accepted(self._rounds, played.accepted, played.drafted)
            for one in chunk.written[at : at + played.emitted]:
                yield Token(self._tokens, one.id, one.origin, one.pieces, one.log_probs)
                self._tokens += 1
            at += played.emitted
        if chunk.stats.parked != self._is_parked:
            self._is_parked = chunk.stats.parked
            yield Parked(chunk.stats.parked, chunk.stats.reason)
