"""One reply after another on the same K/V: request in, chunks of text out."""

import secrets
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import mlx.core as mx

from mlx_mtp.decode import RowLimits, decode
from mlx_mtp.errors import ContextError, MemoryRefusal, ParameterError
from mlx_mtp.log_probs import check_log_probs
from mlx_mtp.memory_parts import prefill_bytes
from mlx_mtp.pair import Pair
from mlx_mtp.policy import Policy, make_policy
from mlx_mtp.prefill import CHUNK, first_token
from mlx_mtp.pressure import REMEDY, STOPPED, Guard, StoppedForMemory, out_of_memory_refused
from mlx_mtp.prompt import check_ids, prompt_ids
from mlx_mtp.reply import Chunk, Generation, Reply, collect
from mlx_mtp.sampling import Sampling, dense_bias, fold_seed, sampler_class, sampling_arrays
from mlx_mtp.state import KeysValues, State, StateCell, no_drafts
from mlx_mtp.stream import check_stops
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
    num_draft_tokens: int | str = (
        "auto"  # looked at where requests that ask for different numbers share rounds
    )
    log_probs: int | None = None  # alternatives with each token's; None: not wanted
    begin_with: tuple[int, ...] = ()  # the last of `ids`, which are the reply's first


def make_request(
    pair: Pair,
    prompt: Prompt,
    *,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    num_draft_tokens: int | str = "auto",
    stop: str | Sequence[str] = (),
    tools: list[dict[str, Any]] | None = None,
    thinking: bool | None = None,
    log_probs: int | None = None,
    begin_with: Sequence[int] = (),
) -> Request:
    """Check everything that can be checked before any work. Raises PromptError or ParameterError.

    begin_with: ids that the reply is made to begin with: prefilled, not drawn, and part of its text.
    """
    check_max_tokens(max_tokens)
    make_policy(num_draft_tokens, has_drafter=pair.drafter is not None)  # refuses what is no number of drafts
    stops = check_stops(stop)
    check_log_probs(log_probs)
    rendered = prompt_ids(pair.prompt_format, prompt, tools=tools, thinking=thinking)
    begun = check_ids(begin_with, pair.prompt_format.vocab_size) if begin_with else []
    ids = rendered.ids + begun
    room = pair.max_context - len(ids)
    if room < 1:
        raise ContextError(
            f"the prompt has {len(ids)} tokens and the context holds {pair.max_context}, of which at least "
            "one is for the reply; shorten the prompt"
        )
    sampling = sampling or pair.sampling
    if sampling.logit_bias:
        dense_bias(sampling.logit_bias, pair.target.text.vocab_size)  # refuses ids outside the vocabulary
    if sampling.seed is None:
        sampling = replace(sampling, seed=secrets.randbits(32))
    return Request(
        ids,
        rendered.boundaries,
        min(max_tokens, room),
        sampling,
        stops,
        num_draft_tokens,
        log_probs,
        tuple(begun),
    )


def check_max_tokens(max_tokens: int) -> int:
    """`max_tokens` if a reply can have so many; ParameterError otherwise."""
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
        raise ParameterError(
            f"max_tokens must be a whole number >= 1, got {max_tokens!r}; ask for at least one token"
        )
    return max_tokens


def start_row(
    pair: Pair,
    request: Request,
    kv: KeysValues,
    hidden: mx.array,
    *,
    with_bias: bool,
    with_counts: bool,
    written: Sequence[int] = (),
) -> State:
    """Prefilled K/V and last hidden row -> a state of one row whose first token is chosen.

    A reply that goes on has `written` tokens already; all but the last of them are in the K/V.
    """
    text = pair.target.text
    sampler = sampler_class([request.sampling])
    state = State(
        kv=kv,
        length=mx.array([len(request.ids) + max(len(written) - 1, 0)], mx.int32),
        last=mx.zeros((1,), mx.uint32),
        hidden=hidden,
        drafts=no_drafts(1),
        seed=mx.array([fold_seed(request.sampling.seed or 0)], mx.uint32),
        sampling=sampling_arrays(request.sampling, text.vocab_size, with_bias=with_bias),
        counts=prompt_counts(request.ids, text.vocab_size) if with_counts else None,
        active=mx.array([True]),
    )
    if written:
        token, valid = mx.array([written[-1]], mx.uint32), state.active
    else:
        token, valid = first_token(pair.target, state, sampler)
    if state.counts is not None:
        generated = _counted(written or cast(list[int], token.tolist()), text.vocab_size)
        state = state._replace(counts=mx.stack([state.counts[:, 0], generated[None]], axis=1))
    state = state._replace(last=token, active=valid)
    mx.eval(state.last, state.active, state.counts, state.sampling)
    return state


def prompt_counts(ids: Sequence[int], vocab_size: int) -> mx.array:
    """ids -> [1, 2, V] int32: how often each token stands in the prompt; none is generated yet."""
    in_prompt = _counted(ids, vocab_size)
    return mx.stack([in_prompt, mx.zeros_like(in_prompt)])[None]


def _counted(ids: Sequence[int], vocab_size: int) -> mx.array:
    return mx.zeros((vocab_size,), mx.int32).at[mx.array(list(ids), mx.uint32)].add(1)


class Conversation:
    """Prompts that share a K/V cache: each one prefills only what the last did not leave there."""

    def __init__(self, pair: Pair, *, chunk: int = CHUNK, guard: Guard | None = None):
        self.pair = pair
        self.history = History(pair.target)
        self.guard = guard or Guard()
        self._chunk = chunk
        self._policies: dict[int | str, Policy] = {}
        self._busy = False

    def clear(self) -> None:
        """Drop the K/V; the next prompt starts cold."""
        self.history.clear()

    def shrink(self) -> None:
        """Keep less: turns that diverge in their history are prefilled from further back."""
        self.history.drop_checkpoints()
        mx.clear_cache()

    def stream(
        self,
        prompt: Prompt,
        *,
        num_draft_tokens: int | str = "auto",
        on_progress: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> Generator[Chunk, None, None]:
        """Reply to `prompt`, which is the whole context each time; `options` as `make_request`, which checks them now.

        Closing the iterator cancels within one round and keeps the tokens yielded. `on_progress(done, total)` is told
        of prefilled tokens; if it raises, prefill stops there. A reply that stops for lack of memory keeps its text,
        and its last chunk has a `note`; MemoryRefusal is raised where there is no text yet, or where MLX ran out.
        """
        request = make_request(self.pair, prompt, **options)
        return self._reply(request, self.policy(num_draft_tokens), on_progress)

    def policy(self, num_draft_tokens: int | str) -> Policy:
        """What chooses the number of drafts for such requests: one for all of them, so that it keeps what it learnt."""
        # Made first: it refuses what is no number of drafts, such as True, which a dictionary takes for 1.
        new = self.pair.policy(num_draft_tokens)
        return self._policies.setdefault(num_draft_tokens, new)

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
            with out_of_memory_refused(self.clear):
                yield from self._rounds(request, policy, on_progress)
        finally:
            self._busy = False

    def _rounds(
        self, request: Request, policy: Policy, on_progress: Callable[[int, int], None] | None
    ) -> Generator[Chunk, None, None]:
        started = time.perf_counter()
        cell, reused = self._begin(request, on_progress)
        reply = Reply(self.pair, request, reused, started)
        eos = frozenset(self.pair.prompt_format.eos_ids)
        steps = decode(
            self.pair.rounds,
            cell,
            [RowLimits(request.max_tokens, eos, log_probs=request.log_probs)],
            policy,
            sampler_class([request.sampling]),
        )
        try:
            for step in steps:
                chunk = reply.take(step, policy)
                yield chunk
                if chunk.finish_reason is not None:
                    return
                relief = self.guard.relief()
                if relief == "shrink":
                    self.shrink()
                elif relief == "stop":
                    yield reply.stop(policy, STOPPED)
                    return
        finally:
            steps.close()
            kv = cell.take().kv
            if reply.failed:
                self.history.clear()
                del kv
                mx.clear_cache()
            else:
                self.history.keep([*request.ids, *reply.tokens], kv)

    def _begin(
        self, request: Request, on_progress: Callable[[int, int], None] | None
    ) -> tuple[StateCell, int]:
        """Prefill what is new of the prompt -> the state with the first token chosen, and how many were reused."""
        kv, hidden, reused = self.history.extend(
            request.ids,
            room=request.max_tokens,
            boundaries=request.boundaries,
            chunk=self._chunk,
            on_progress=self._watched(on_progress),
            admit=partial(self._admit, len(request.ids)),
        )
        penalises = request.sampling.penalises
        try:
            state = start_row(self.pair, request, kv, hidden, with_bias=False, with_counts=penalises)
        except BaseException:
            self.history.keep(request.ids, kv)
            raise
        return StateCell(state), reused

    def _admit(self, prompt_tokens: int, new_bytes: int) -> None:
        """Refuse a prompt whose K/V and scratch do not fit; the conversation stays as it was."""
        target = self.pair.target
        scratch = prefill_bytes(target.text, prompt_tokens, prompt_tokens, target.dtype.size)
        needed = new_bytes + scratch
        try:
            self.guard.admit(needed)
        except MemoryRefusal:
            self.shrink()
            self.guard.admit(needed)

    def _watched(self, on_progress: Callable[[int, int], None] | None) -> Callable[[int, int], None]:
        """`on_progress`, with a look at memory after each chunk."""

        def watched(done: int, total: int) -> None:
            relief = self.guard.relief()
            if relief == "shrink":
                self.shrink()
            elif relief == "stop" and done < total:
                raise StoppedForMemory(
                    f"this machine is short of memory, the prompt was given up at token {done:,} of {total:,}; {REMEDY}"
                )
            if on_progress is not None:
                on_progress(done, total)

        return watched
