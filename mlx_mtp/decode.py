"""The loop, for plain and MTP decoding alike: build the next round while this one runs, read, dispatch, hand on."""

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import mlx.core as mx

from mlx_mtp.log_probs import LogProbRows, TokenLogProbs, log_prob_rows, read_log_probs
from mlx_mtp.policy import Plan, Policy
from mlx_mtp.round import Rounds
from mlx_mtp.sampling import SamplerClass
from mlx_mtp.state import State, StateCell, bucket_for, no_drafts
from mlx_mtp.target import Target

COUNT_EVERY = 8  # rounds with the same number of drafts in which the experts that were read are counted once


@dataclass(frozen=True, slots=True)
class RowLimits:
    """Where one row ends: after max_tokens more, or at any of its EOS ids (which is emitted)."""

    max_tokens: int
    eos_ids: frozenset[int]
    is_new: bool = True  # its `last` is still to be handed on; False for a row that goes on
    log_probs: int | None = None  # alternatives that are wanted with each token's log_prob; None: neither


@dataclass(frozen=True, slots=True)
class Step:
    """What one round gave; the first step is the prefill's token."""

    tokens: tuple[tuple[int, ...], ...]  # new tokens of each row
    finish: tuple[str | None, ...]  # "stop", "length" or "error" for rows that ended with this step
    verified: int  # drafts checked per row
    accepted: tuple[int, ...]  # drafts kept per row; -1 where the row took no part
    seconds: float | None  # since the previous round was read; None where a round was traced meanwhile
    distinct: float | None = None  # experts read in a layer, averaged; None where they were not counted
    log_probs: Mapping[int, tuple[TokenLogProbs, ...]] | None = (
        None  # by row that asks, of its tokens or more
    )


class Built(NamedTuple):
    """A round that is described but not necessarily dispatched."""

    state: State
    tokens: mx.array  # [B, verified + 1]
    n: mx.array  # [B]
    verified: int
    new_shape: bool
    distinct: mx.array | None = None  # experts read in a layer, averaged []; None where they are not counted
    log_probs: LogProbRows | None = None  # of the rows that ask for them


def decode(
    rounds: Rounds,
    cell: StateCell,
    rows: Sequence[RowLimits],
    policy: Policy,
    sampler: SamplerClass,
    *,
    until_one_ends: bool = False,
) -> Generator[Step, None, None]:
    """Take the state from `cell`, yield a Step a round until every row has ended, and put the state back.

    until_one_ends: stop after a step in which a row ended, so that another can take its place. Whoever stops iterating
    gets the state back too: rows 0 .. length-1 then hold exactly the tokens yielded, but the last, and rows that have
    not ended can go on from it.
    """
    ledger = Ledger(cell.peek(), rows)
    step = ledger.first_step(cell.peek(), rounds.target)
    yield step
    state: State | None = None
    current: Built | None = None
    is_over = ledger.all_ended or (until_one_ends and any(step.finish))
    try:
        if not is_over:
            # A row may have ended with its first token: without, or it would write beyond its buffers in time.
            state = ledger.without_ended(cell.take())
            state = _with_first_drafts(rounds, state, ledger, policy, sampler)
            plan = policy.plan(state.drafts.shape[1])
            current = _build(rounds, state, ledger, plan, sampler)
            state = None  # whoever keeps an old state makes every buffer copy
            _dispatch(current)
        while current is not None and not is_over:
            drafted = current.state.drafts.shape[1]
            plan = policy.plan(drafted)
            ahead = _build(rounds, current.state, ledger, plan, sampler, unread=current)
            step = ledger.record(current, traced_meanwhile=ahead.new_shape)
            is_over = ledger.all_ended or (until_one_ends and any(step.finish))
            if is_over:
                del ahead
            else:
                mx.eval(current.state.drafts)  # no reader of K/V is in flight when the next round writes
                if any(step.finish):
                    # The next round was built with a row that has ended: describe it again without.
                    ahead = _build(rounds, ledger.without_ended(current.state), ledger, plan, sampler)
                current = ahead
                del ahead
                _dispatch(current)
            policy.observe(  # while the next round runs: what it decides is for the one after
                step.verified,
                [n for n in step.accepted if n >= 0],
                step.seconds,
                drafted=drafted,
                batch=len(step.accepted),
                distinct=step.distinct,
            )
            yield step
    finally:
        left = state if current is None else current.state
        if left is not None:
            cell.put(ledger.settle(left))


def _with_first_drafts(
    rounds: Rounds, state: State, ledger: "Ledger", policy: Policy, sampler: SamplerClass
) -> State:
    """The prefilled state with drafts for its first round, so that no round is spent on the last token alone."""
    k = policy.plan(0).draft
    drafted = rounds.first_drafts(state, k=k, bucket=bucket_for(ledger.longest + 1), sampler=sampler)
    # Evaluated before the first round is dispatched: no reader of K/V may be in flight when that writes.
    mx.eval(drafted.drafts)
    return drafted


def _build(
    rounds: Rounds,
    state: State,
    ledger: "Ledger",
    plan: Plan,
    sampler: SamplerClass,
    unread: Built | None = None,
) -> Built:
    """Describe the next round from `state`; `unread` is the running one, whose outcome is not known yet."""
    if plan.verify < state.drafts.shape[1]:
        state = state._replace(drafts=state.drafts[:, : plan.verify])
    in_flight = 0 if unread is None else unread.verified + 1
    bucket = bucket_for(ledger.longest + in_flight + plan.verify + 1)
    new_shape = rounds.is_new(state, k=plan.draft, bucket=bucket, sampler=sampler)
    played = rounds.played(state, k=plan.draft, bucket=bucket, sampler=sampler)
    distinct = played.distinct if ledger.counts_experts(plan.verify) else None
    log_probs = log_prob_rows(rounds.target, played.hidden, played.tokens, ledger.asked_log_probs)
    return Built(played.state, played.tokens, played.n, plan.verify, new_shape, distinct, log_probs)


def _dispatch(built: Built) -> None:
    """Two evaluations, so that the tokens can be read before the drafts are done."""
    state = built.state
    seen = (built.tokens, built.n, built.distinct, built.log_probs)
    evaluate_soon(*seen, state.kv, state.length, state.last, state.hidden, state.counts)
    evaluate_soon(state.drafts)


def evaluate_soon(*arrays: Any) -> None:
    """Start evaluating without waiting."""
    mx.async_eval(*arrays)  # type: ignore[no-untyped-call]


def ints(array: mx.array) -> list[int]:
    """A vector's values on the host."""
    return cast(list[int], array.tolist())


class Ledger:
    """The host's account of each row: committed length, tokens left, whether it has ended."""

    def __init__(self, state: State, rows: Sequence[RowLimits]):
        self._rows = rows
        self._lengths = ints(state.length)
        self._left = [row.max_tokens for row in rows]
        self._ended: list[bool] = [not active for active in ints(state.active)]
        self._read_at = time.perf_counter()
        self._comparable = False
        self._played: dict[int, int] = {}  # rounds read so far, by drafts verified
        # As of the last round that was read, without the buffers, which must have one owner only.
        self._read = state._replace(kv=())

    @property
    def all_ended(self) -> bool:
        return all(self._ended)

    @property
    def longest(self) -> int:
        return max(self._lengths)

    def counts_experts(self, verified: int) -> bool:
        """Whether a round that verifies so many drafts says how many experts it read: now and then, for each number.

        A single row reads as many as it is sent to, always.
        """
        several = (verified + 1) * len(self._rows) > 1
        return several and self._played.get(verified, 0) % COUNT_EVERY == 0

    @property
    def asked_log_probs(self) -> list[int | None]:
        """For each row how many alternatives it wants; None for no log_probs."""
        return [None if ended else row.log_probs for row, ended in zip(self._rows, self._ended, strict=True)]

    def first_step(self, state: State, target: Target) -> Step:
        """The tokens that prefill chose, at position `length` and without a K/V row yet; inactive rows have none."""
        asked = [row.log_probs if row.is_new else None for row in self._rows]
        found = log_prob_rows(target, state.hidden, state.last[:, None], asked)
        tokens: list[tuple[int, ...]] = []
        finish: list[str | None] = []
        for b, token in enumerate(ints(state.last)):
            if not self._rows[b].is_new:
                tokens.append(())
                finish.append(None)
                continue
            new = [] if self._ended[b] else [token]
            tokens.append(tuple(new))
            finish.append(self._end_of(b, new))
        log_probs = None if found is None else read_log_probs(found, asked)
        return Step(tuple(tokens), tuple(finish), 0, tuple(-1 for _ in tokens), None, log_probs=log_probs)

    def record(self, built: Built, *, traced_meanwhile: bool) -> Step:
        """Read a round (the only sync with the device) and commit what each row takes of it.

        Its time says something only if neither it nor the next round had to be traced while it ran.
        """
        chosen, accepted = cast(list[list[int]], built.tokens.tolist()), ints(built.n)
        distinct = None if built.distinct is None else cast(float, built.distinct.item())
        asked = [row.log_probs for row in self._rows]
        log_probs = None if built.log_probs is None else read_log_probs(built.log_probs, asked)
        now = time.perf_counter()
        self._played[built.verified] = self._played.get(built.verified, 0) + 1
        usual = self._comparable and not built.new_shape and not traced_meanwhile
        seconds = now - self._read_at if usual else None
        self._read_at, self._comparable = now, True
        self._read = built.state._replace(kv=())
        tokens: list[tuple[int, ...]] = []
        finish: list[str | None] = []
        for b, n in enumerate(accepted):
            if self._ended[b]:
                tokens.append(())
                finish.append(None)
                accepted[b] = -1
                continue
            new = chosen[b][: n + 1]
            reason = self._end_of(b, new)
            self._lengths[b] += len(new)
            tokens.append(tuple(new))
            finish.append(reason)
        return Step(
            tuple(tokens), tuple(finish), built.verified, tuple(accepted), seconds, distinct, log_probs
        )

    def _end_of(self, b: int, new: list[int]) -> str | None:
        """Cut row b's new tokens at its end, if it has come; -> the finish reason."""
        if not new:
            self._ended[b] = True
            return "error"
        del new[self._left[b] :]
        eos = next((i for i, token in enumerate(new) if token in self._rows[b].eos_ids), None)
        if eos is not None:
            del new[eos + 1 :]
        self._left[b] -= len(new)
        reason = "stop" if eos is not None else "length" if self._left[b] == 0 else None
        self._ended[b] = reason is not None
        return reason

    def without_ended(self, state: State) -> State:
        """`state` after the round just read, with the rows that have ended inactive."""
        return state._replace(active=mx.array([not ended for ended in self._ended]))

    def settle(self, state: State) -> State:
        """`state` brought to what was read: lengths as counted, ended rows inactive, nothing pending.

        The rows of an unread round lie past `length` and are dead; `last` and `hidden` of a row that was cut are not
        those of its end, so a continuation forwards at least one token first.
        """
        return self.without_ended(self._read)._replace(
            kv=state.kv, length=mx.array(self._lengths, mx.int32), drafts=no_drafts(len(self._lengths))
        )
