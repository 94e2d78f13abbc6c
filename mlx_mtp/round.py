"""One round as a pure function of device state: verify, accept, commit, draft; and its compile cache."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from mlx_mtp.accept import accept, row_at
from mlx_mtp.draft import draft
from mlx_mtp.drafter import Drafter
from mlx_mtp.fit import Fit
from mlx_mtp.layers import OnChoice
from mlx_mtp.round_times import RoundTimes
from mlx_mtp.sampling import SamplerClass, choose
from mlx_mtp.state import KeysValues, State
from mlx_mtp.target import Target, logits_of
from mlx_mtp.verify import verify

if TYPE_CHECKING:
    from mlx_mtp.exactness import Exactness
    from mlx_mtp.exactness_tax import Tax


class Played(NamedTuple):
    """A round that is described; `hidden` and `distinct` cost nothing unless they are evaluated."""

    state: State
    tokens: mx.array  # [B, verified + 1]
    n: mx.array  # [B]
    hidden: mx.array  # [B, verified + 1, H] post-norm rows that the tokens were chosen from
    distinct: mx.array | None  # experts read in a layer, averaged (float32 []); None without experts


def play_round(
    target: Target,
    drafter: Drafter | None,
    state: State,
    *,
    k: int,
    bucket: int,
    sampler: SamplerClass,
    on_choice: OnChoice | None = None,
    on_hidden: Callable[[mx.array], None] | None = None,
) -> tuple[State, mx.array, mx.array]:
    """Verify the pending drafts, accept, commit, draft k more -> state', tokens [B, k_pending+1], n [B].

    Row b emits tokens[b, :n[b]+1]. Plain decoding is the same function without drafts. `on_choice`: see `verify`;
    `on_hidden` is shown the post-norm rows [B, k_pending+1, H] that the tokens are chosen from.
    """
    tokens = state.last[:, None]
    if state.drafts.shape[1] > 0:
        tokens = mx.concatenate([tokens, state.drafts], axis=1)
    hidden, kv = verify(target, tokens, state.kv, state.length, bucket=bucket, on_choice=on_choice)
    if on_hidden is not None:
        on_hidden(hidden)

    chosen, valid = _choose(target, hidden, state, sampler)
    n = accept(state.drafts, chosen, valid, state.active)

    state = commit(state, kv, hidden, chosen, n, sampler)
    if drafter is not None and k > 0:
        state = state._replace(drafts=draft(target, drafter, state, sampler, k=k, bucket=bucket))
    return state, chosen, n


def _choose(
    target: Target, hidden: mx.array, state: State, sampler: SamplerClass
) -> tuple[mx.array, mx.array]:
    """Post-norm hidden [B, k+1, H] of the last token and its drafts -> the target's own choices and their validity."""
    positions = state.length[:, None] + 1 + mx.arange(hidden.shape[1], dtype=mx.int32)
    how = (positions, state.seed, state.sampling, sampler)
    if sampler.decided_by_best and target.kernels.head_choose is not None:
        cap = target.text.final_logit_softcapping
        return target.kernels.head_choose(target.embedding, cap, hidden, *how)
    return choose(logits_of(target, hidden), *how, counts=_counts_by_row(state, sampler))


def commit(
    state: State, kv: KeysValues, hidden: mx.array, chosen: mx.array, n: mx.array, sampler: SamplerClass
) -> State:
    """Move each row past its n accepted drafts and the target's own token; K/V rows beyond are dead."""
    moved = n >= 0
    at = mx.maximum(n, 0)
    counts = state.counts
    if sampler.penalties and counts is not None:
        emitted = mx.arange(chosen.shape[1], dtype=mx.int32) <= n[:, None]
        added = (_one_hot(chosen, counts.shape[-1]) * emitted[..., None]).sum(axis=1)
        counts = mx.stack([counts[:, 0], counts[:, 1] + added], axis=1)
    return state._replace(
        kv=kv,
        length=state.length + n + 1,
        last=mx.where(moved, row_at(chosen, at)[:, 0], state.last),
        hidden=mx.where(moved[:, None, None], row_at(hidden, at), state.hidden),
        drafts=state.drafts[:, :0],
        counts=counts,
    )


def _counts_by_row(state: State, sampler: SamplerClass) -> mx.array | None:
    """Token counts [B, k+1, 2, V] before each verified row's choice: the drafts up to it count as generated."""
    if not sampler.penalties or state.counts is None:
        return None
    if state.drafts.shape[1] == 0:
        return state.counts[:, None]
    in_prompt, generated = state.counts[:, None, 0], state.counts[:, None, 1]
    drafted = mx.cumsum(_one_hot(state.drafts, generated.shape[-1]), axis=1)
    generated = mx.concatenate([generated, generated + drafted], axis=1)
    return mx.stack([mx.broadcast_to(in_prompt, generated.shape), generated], axis=2)


def _one_hot(tokens: mx.array, vocab_size: int) -> mx.array:
    """tokens [B, M] -> [B, M, V] int32."""
    return (tokens[..., None] == mx.arange(vocab_size, dtype=mx.uint32)).astype(mx.int32)


def distinct_experts(chosen: Sequence[mx.array], experts: int) -> mx.array:
    """Ids [rows, top_k] chosen in each layer, below `experts` -> distinct ones in a layer, averaged: a float32 [].

    A few operations for all layers together; rows that have ended count, for their experts are read too.
    """
    ids = mx.stack([own.reshape(-1) for own in chosen])
    used = mx.put_along_axis(mx.zeros((len(chosen), experts), mx.int32), ids, mx.array(1, mx.int32), axis=1)
    return used.sum() / len(chosen)


class Rounds:
    """`play_round` compiled in two parts, so that a number of drafts to verify is traced once whatever is drafted next.

    Per bucket and sampler class, and drafts per number of them; mx.compile retraces per drafts verified, batch and
    capacity.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        *,
        compiled: bool = True,
        times: RoundTimes | None = None,
    ):
        self.target = target
        self.drafter = drafter
        self.compiled = compiled
        self.exactness: Exactness | None = None  # what `exactness_of` found, once it was asked
        self.tax: Tax | None = None  # and what exactness costs, once that was measured
        self.fit = Fit()  # what the drafts of all requests say about the pair
        self.times = times or RoundTimes()  # and what all rounds say about their cost
        self._functions: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self._shapes: set[tuple[Any, ...]] = set()

    def is_new(self, state: State, *, k: int, bucket: int, sampler: SamplerClass) -> bool:
        """Whether the round that is asked for next has to be traced first; its time says nothing about later ones."""
        verified, capacity = state.drafts.shape, state.kv[-1][0].shape
        shapes = {("verify", bucket, sampler, *verified, *capacity), ("draft", k, bucket, sampler, *capacity)}
        known = shapes <= self._shapes
        self._shapes |= shapes
        return not known

    def __call__(
        self, state: State, *, k: int, bucket: int, sampler: SamplerClass
    ) -> tuple[State, mx.array, mx.array]:
        """A round built lazily from `state`; nothing is evaluated."""
        played = self.played(state, k=k, bucket=bucket, sampler=sampler)
        return played.state, played.tokens, played.n

    def played(self, state: State, *, k: int, bucket: int, sampler: SamplerClass) -> Played:
        """The same, with what is seen of it beside."""
        key = (bucket, sampler)
        if key not in self._functions:
            self._functions[key] = self._make(bucket, sampler)
        changed, tokens, n, hidden, distinct = self._functions[key](
            _changing(state), state.seed, state.sampling, state.active
        )
        after = self.first_drafts(_with_changed(state, changed), k=k, bucket=bucket, sampler=sampler)
        return Played(after, tokens, n, hidden, distinct)

    def first_drafts(self, state: State, *, k: int, bucket: int, sampler: SamplerClass) -> State:
        """A state without drafts, fresh from a prefill or a round, with its k pending ones, built lazily."""
        if self.drafter is None or k == 0:
            return state
        key = (k, bucket, sampler)
        if key not in self._functions:
            self._functions[key] = self._make_drafts(k, bucket, sampler)
        drafts = self._functions[key](_changing(state), state.seed, state.sampling, state.active)
        return state._replace(drafts=drafts)

    def _make_drafts(self, k: int, bucket: int, sampler: SamplerClass) -> Callable[..., Any]:
        target, drafter = self.target, self.drafter
        assert drafter is not None

        def make(changing: Changing, seed: mx.array, sampling: dict[str, mx.array], active: mx.array) -> Any:
            state = _state_of(changing, seed, sampling, active)
            return draft(target, drafter, state, sampler, k=k, bucket=bucket)

        return mx.compile(make) if self.compiled else make

    def _make(self, bucket: int, sampler: SamplerClass) -> Callable[..., Any]:
        target, drafter = self.target, self.drafter

        def play(changing: Changing, seed: mx.array, sampling: dict[str, mx.array], active: mx.array) -> Any:
            state = _state_of(changing, seed, sampling, active)
            chosen: list[mx.array] = []
            rows: list[mx.array] = []
            state, tokens, n = play_round(
                target,
                drafter,
                state,
                k=0,
                bucket=bucket,
                sampler=sampler,
                on_choice=chosen.append,
                on_hidden=rows.append,
            )
            distinct = distinct_experts(chosen, target.text.num_experts) if chosen else None
            return _changing(state), tokens, n, rows[0], distinct

        return mx.compile(play) if self.compiled else play


Changing = tuple[KeysValues, mx.array, mx.array, mx.array, mx.array, mx.array | None]


def _changing(state: State) -> Changing:
    """What a round changes, as the plain tuple that mx.compile takes and gives."""
    return (state.kv, state.length, state.last, state.hidden, state.drafts, state.counts)


def _state_of(changing: Changing, seed: mx.array, sampling: dict[str, mx.array], active: mx.array) -> State:
    kv, length, last, hidden, drafts, counts = changing
    return State(kv, length, last, hidden, drafts, seed, sampling, counts, active)


def _with_changed(state: State, changed: Changing) -> State:
    kv, length, last, hidden, drafts, counts = changed
    return state._replace(kv=kv, length=length, last=last, hidden=hidden, drafts=drafts, counts=counts)
