"""One reply after another on the same K/V: request in, chunks of text out."""

import secrets
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlx_mtp.decode import RowLimits, Step, decode
from mlx_mtp.errors import ParameterError, PromptError
from mlx_mtp.pair import Pair
from mlx_mtp.policy import Policy, make_policy
from mlx_mtp.prefill import CHUNK, first_token
from mlx_mtp.prompt import prompt_ids
from mlx_mtp.sampling import Sampling, fold_seed, sampler_class, sampling_arrays
from mlx_mtp.state import KeysValues, State, StateCell, no_drafts
from mlx_mtp.stats import RowCount, Stats
from mlx_mtp.stream import Piece, TextStream, check_stops
from mlx_mtp.turns import History

Prompt = str | list[int] | list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Request:
    """One checked request: token ids, where model turns open in them, and how to go on from there."""

    ids: list[int]
    boundaries: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """What a round added: text of the answer, of the thoughts, of tool calls; `stats` so far."""

    text: str
    thought: str
    tool_call: str
    tokens: tuple[int, ...]
    finish_reason: str | None
    stats: Stats


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole reply; `finish_reason` is "stop", "length", "cancelled" or "error"."""

    text: str
    thought: str
    tool_call: str
    tokens: list[int]
    finish_reason: str
    stats: Stats


def make_request(
    pair: Pair,
    prompt: Prompt,
    *,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    stop: str | Sequence[str] = (),
    tools: list[dict[str, Any]] | None = None,
    thinking: bool | None = None,
) -> Request:
    """Check everything that can be checked before any work. Raises PromptError or ParameterError."""
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
        raise ParameterError(
            f"max_tokens must be a whole number >= 1, got {max_tokens!r}; ask for at least one token"
        )
    stops = check_stops(stop)
    rendered = prompt_ids(pair.prompt_format, prompt, tools=tools, thinking=thinking)
    room = pair.max_context - len(rendered.ids)
    if room < 1:
        raise PromptError(
            f"the prompt has {len(rendered.ids)} tokens and the context holds {pair.max_context}, of which at least "
            "one is for the reply; shorten the prompt"
        )
    sampling = sampling or pair.sampling
    if sampling.logit_bias:
        sampling_arrays(sampling, pair.target.text.vocab_size)  # refuses ids outside the vocabulary
    if sampling.seed is None:
        sampling = replace(sampling, seed=secrets.randbits(32))
    return Request(rendered.ids, rendered.boundaries, min(max_tokens, room), sampling, stops)


def start_row(
    pair: Pair, request: Request, kv: KeysValues, hidden: mx.array, *, with_bias: bool, with_counts: bool
) -> State:
    """Prefilled K/V and last hidden row -> a state of one row whose first token is chosen."""
    text = pair.target.text
    sampler = sampler_class([request.sampling])
    state = State(
        kv=kv,
        length=mx.array([len(request.ids)], mx.int32),
        last=mx.zeros((1,), mx.uint32),
        hidden=hidden,
        drafts=no_drafts(1),
        seed=mx.array([fold_seed(request.sampling.seed or 0)], mx.uint32),
        sampling=sampling_arrays(request.sampling, text.vocab_size, with_bias=with_bias),
        counts=prompt_counts(request.ids, text.vocab_size) if with_counts else None,
        active=mx.array([True]),
    )
    token, valid = first_token(pair.target, state, sampler)
    if state.counts is not None:
        generated = (token[:, None] == mx.arange(text.vocab_size, dtype=mx.uint32)).astype(mx.int32)
        state = state._replace(counts=mx.stack([state.counts[:, 0], generated], axis=1))
    state = state._replace(last=token, active=valid)
    mx.eval(state.last, state.active, state.counts, state.sampling)
    return state


def prompt_counts(ids: Sequence[int], vocab_size: int) -> mx.array:
    """ids -> [1, 2, V] int32: how often each token stands in the prompt; none is generated yet."""
    in_prompt = mx.zeros((vocab_size,), mx.int32).at[mx.array(list(ids), mx.uint32)].add(1)
    return mx.stack([in_prompt, mx.zeros_like(in_prompt)])[None]


class Conversation:
    """Prompts that share a K/V cache: each one prefills only what the last did not leave there."""

    def __init__(self, pair: Pair, *, chunk: int = CHUNK):
        self.pair = pair
        self.history = History(pair.target)
        self._chunk = chunk
        self._policies: dict[int | str, Policy] = {}
        self._busy = False

    def clear(self) -> None:
        """Drop the K/V; the next prompt starts cold."""
        self.history.clear()

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        num_draft_tokens: int | str = "auto",
        stop: str | Sequence[str] = (),
        tools: list[dict[str, Any]] | None = None,
        thinking: bool | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Generator[Chunk, None, None]:
        """Reply to `prompt`, which is the whole context each time; arguments are checked before this returns.

        Closing the iterator cancels within one round and keeps the tokens yielded. `on_progress(done, total)` is told
        of prefilled tokens; if it raises, prefill stops there.
        """
        request = make_request(
            self.pair,
            prompt,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop,
            tools=tools,
            thinking=thinking,
        )
        has_drafter = self.pair.drafter is not None
        # Made first: it refuses what is no number of drafts, such as True, which a dictionary takes for 1.
        new = make_policy(num_draft_tokens, has_drafter=has_drafter, fit=self.pair.rounds.fit)
        policy = self._policies.setdefault(num_draft_tokens, new)
        return self._reply(request, policy, on_progress)

    def generate(self, prompt: Prompt, **options: Any) -> Generation:
        """`stream`, collected."""
        return collect(self.stream(prompt, **options))

    def _reply(
        self, request: Request, policy: Policy, on_progress: Callable[[int, int], None] | None
    ) -> Generator[Chunk, None, None]:
        if self._busy:
            raise ParameterError("this conversation is replying already; finish or close that reply first")
        self._busy = True
        try:
            yield from self._rounds(request, policy, on_progress)
        finally:
            self._busy = False

    def _rounds(
        self, request: Request, policy: Policy, on_progress: Callable[[int, int], None] | None
    ) -> Generator[Chunk, None, None]:
        started = time.perf_counter()
        kv, hidden, reused = self.history.extend(
            request.ids,
            room=request.max_tokens,
            boundaries=request.boundaries,
            chunk=self._chunk,
            on_progress=on_progress,
        )
        penalises = request.sampling.penalises
        try:
            state = start_row(self.pair, request, kv, hidden, with_bias=False, with_counts=penalises)
        except BaseException:
            self.history.keep(request.ids, kv)
            raise
        cell = StateCell(state)
        del kv, hidden, state
        reply = Reply(self.pair, request, reused, started)
        steps = decode(
            self.pair.rounds,
            cell,
            [RowLimits(request.max_tokens, frozenset(self.pair.prompt_format.eos_ids))],
            policy,
            sampler_class([request.sampling]),
        )
        try:
            for step in steps:
                chunk = reply.take(step, policy)
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            steps.close()
            if reply.broken:
                self.history.clear()
            else:
                self.history.keep([*request.ids, *reply.tokens], cell.take().kv)


class Reply:
    """Turns one row's steps into chunks and figures."""

    def __init__(self, pair: Pair, request: Request, reused: int, started: float, row: int = 0):
        self.tokens: list[int] = []
        self.broken = False
        self._pair, self._request, self._reused, self._row = pair, request, reused, row
        self._count = RowCount()
        self._stream = TextStream(
            pair.prompt_format.tokenizer, stop=request.stop, eos_ids=pair.prompt_format.eos_ids
        )
        self._started, self._first_at = started, time.perf_counter()

    @property
    def finish_reason(self) -> str | None:
        return self._stream.finish_reason

    def take(self, step: Step, policy: Policy) -> Chunk:
        """This row's part of a step -> the chunk for it."""
        tokens, finish = step.tokens[self._row], step.finish[self._row]
        pushed = self._stream.push(tokens)
        pieces = pushed.pieces
        if finish is not None and pushed.finish_reason is None:
            pieces += self._stream.finish(finish).pieces
        self.broken = self.broken or finish == "error"
        used = tokens[: pushed.used]
        self.tokens += used
        self._count.add(step, self._row, len(used))
        return Chunk(
            text=_joined(pieces, "answer"),
            thought=_joined(pieces, "thought"),
            tool_call=_joined(pieces, "tool"),
            tokens=used,
            finish_reason=self.finish_reason,
            stats=self.stats(policy),
        )

    def stats(self, policy: Policy) -> Stats:
        """The figures so far."""
        count, now = self._count, time.perf_counter()
        prefill_s, decode_s = self._first_at - self._started, now - self._first_at
        prompt_tokens = len(self._request.ids)
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
            warning=self._pair.rounds.fit.warning,
            seed=self._request.sampling.seed,
            exact=self._pair.rounds.exact,
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
    )


def _joined(pieces: Sequence[Piece], channel: str) -> str:
    return "".join(piece.text for piece in pieces if piece.channel == channel)
