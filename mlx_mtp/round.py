"""One round as a pure function of device state: verify, accept, commit, draft; and all rounds of a pair."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from mlx_mtp.accept import accept, row_at
from mlx_mtp.compiled_drafts import CompiledDrafts
from mlx_mtp.compiled_pass import CompiledPass
from mlx_mtp.draft import draft
from mlx_mtp.drafter import Drafter
from mlx_mtp.fit import Fit
from mlx_mtp.layers import OnChoice
from mlx_mtp.round_times import RoundTimes
from mlx_mtp.sampling import SamplerClass, choose
from mlx_mtp.state import KeysValues, State
from mlx_mtp.target import Target, final_norm, logits_of
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

    state, chosen, n = settle(target, state, kv, hidden, sampler)
    if drafter is not None and k > 0:
        state = state._replace(drafts=draft(target, drafter, state, sampler, k=k, bucket=bucket))
    return state, chosen, n


def settle(
    target: Target, state: State, kv: KeysValues, hidden: mx.array, sampler: SamplerClass
) -> tuple[State, mx.array, mx.array]:
    """K/V and hidden [B, k+1, H] after a pass over pending drafts -> state' without any, tokens [B, k+1], n [B]."""
    chosen, valid = _choose(target, hidden, state, sampler)
    n = accept(state.drafts, chosen, valid, state.active)
    return commit(state, kv, hidden, chosen, n, sampler), chosen, n


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
    """Rounds of one pair, compiled in parts so that little is traced and much of it shared.

    The target's layers as `compiled_pass` has it, drafts as `compiled_drafts`; what stands between them is compiled per
    sampler class. mx.compile retraces per drafts verified, batch and capacity.
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
        self._pass = CompiledPass(target)
        self._drafts = None if drafter is None else CompiledDrafts(target, drafter)
        self._settles: dict[SamplerClass, Callable[..., Any]] = {}
        self._shapes: set[tuple[Any, ...]] = set()

    def is_new(self, state: State, *, k: int, bucket: int, sampler: SamplerClass) -> bool:
        """Whether the round that is asked for next has to be traced first; its time says nothing about later ones."""
        verified, capacity = state.drafts.shape, state.kv[-1][0].shape
        shapes = {("verify", bucket, sampler, *verified, *capacity)}
        if k > 0:
            shapes.add(("draft", bucket, sampler, *capacity))
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
        play = self._play_compiled if self.compiled else self._play
        played = play(state, bucket, sampler)
        return played._replace(state=self.first_drafts(played.state, k=k, bucket=bucket, sampler=sampler))

    def first_drafts(self, state: State, *, k: int, bucket: int, sampler: SamplerClass) -> State:
        """A state without drafts, fresh from a prefill or a round, with its k pending ones, built lazily."""
        if self.drafter is None or self._drafts is None or k == 0:
            return state
        if self.compiled:
            return state._replace(drafts=self._drafts(state, sampler, k=k, bucket=bucket))
        return state._replace(drafts=draft(self.target, self.drafter, state, sampler, k=k, bucket=bucket))

    def _play(self, state: State, bucket: int, sampler: SamplerClass) -> Played:
        """A round that makes no drafts, operation by operation."""
        chosen: list[mx.array] = []
        rows: list[mx.array] = []
        see: dict[str, Any] = {"on_choice": chosen.append, "on_hidden": rows.append}
        state, tokens, n = play_round(self.target, None, state, k=0, bucket=bucket, sampler=sampler, **see)
        return Played(state, tokens, n, rows[0], self._distinct(chosen))

    def _play_compiled(self, state: State, bucket: int, sampler: SamplerClass) -> Played:
        passed = self._pass(state.last, state.drafts, state.kv, state.length, bucket)
        if sampler not in self._settles:
            self._settles[sampler] = mx.compile(self._make_settle(sampler))
        changed, *seen = self._settles[sampler](
            passed.x, passed.chosen, _changing(state), state.seed, state.sampling, state.active
        )
        return Played(_with_changed(state, passed.kv, changed), *seen)

    def _make_settle(self, sampler: SamplerClass) -> Callable[..., Any]:
        """What follows the layers: x [B * (k+1), H] -> what changed, tokens, n, hidden, distinct experts."""
        target = self.target

        def end(
            x: mx.array,
            chosen: list[mx.array],
            changing: Changing,
            seed: mx.array,
            sampling: dict[str, mx.array],
            active: mx.array,
        ) -> Any:
            state = State((), *changing[:4], seed, sampling, changing[4], active)
            hidden = final_norm(target, x).reshape(active.shape[0], -1, x.shape[-1])
            state, tokens, n = settle(target, state, (), hidden, sampler)
            return _changing(state), tokens, n, hidden, self._distinct(chosen)

        return end

    def _distinct(self, chosen: Sequence[mx.array]) -> mx.array | None:
        return distinct_experts(chosen, self.target.text.num_experts) if chosen else None


Changing = tuple[mx.array, mx.array, mx.array, mx.array, mx.array | None]


def _changing(state: State) -> Changing:
    """What a round changes beside K/V, as the plain tuple that mx.compile takes and gives."""
    return (state.length, state.last, state.hidden, state.drafts, state.counts)


def _with_changed(state: State, kv: KeysValues, changed: Changing) -> State:
    length, last, hidden, drafts, counts = changed
    return state._replace(kv=kv, length=length, last=last, hidden=hidden, drafts=drafts, counts=counts)
