"""All that decoding knows, as arrays in one immutable State; the K/V buffers and who may hold them."""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_mtp.config import FULL, SLIDING, TextConfig
from mlx_mtp.errors import ParameterError
from mlx_mtp.target import Target

MAX_DRAFT_TOKENS = 15

# A ring keeps this many rows beyond the window, whatever k is asked for: two rounds of MAX_DRAFT_TOKENS + 1 rows may
# be written past a position to which a stop inside the first of them rewinds.
RING_SLACK = 2 * (MAX_DRAFT_TOKENS + 1)

KeysValues = tuple[tuple[mx.array, mx.array], ...]


class State(NamedTuple):
    """One batch of B rows between two rounds; a pytree of arrays, nothing else."""

    kv: KeysValues  # per K/V-owning layer: full [B, kv_heads, capacity, D], sliding [B, kv_heads, ring, D]
    length: mx.array  # [B] int32, committed rows in kv
    last: mx.array  # [B] uint32, committed token that will sit at position `length`
    hidden: mx.array  # [B, 1, H] post-norm row that produced `last`
    drafts: mx.array  # [B, k] uint32, proposals for positions length+1 .. length+k
    seed: mx.array  # [B] uint32
    sampling: dict[str, mx.array]  # per-row settings, see sampling.sampling_arrays
    counts: mx.array | None  # [B, 2, V] int32 tokens in the prompt and generated, only if penalties are on
    active: mx.array  # [B] bool; an inactive row keeps its length and emits nothing


class StateCell:
    """The one place that holds a State: `take` empties it, so that MLX may write its buffers in place.

    A buffer with a second owner is copied whole by the next write.
    """

    def __init__(self, state: State | None = None):
        self._state = state

    def put(self, state: State) -> None:
        self._state = state

    def take(self) -> State:
        """The state, which the caller now owns alone."""
        if self._state is None:
            raise RuntimeError("the state was taken already and not put back")
        state, self._state = self._state, None
        return state

    def peek(self) -> State:
        """The state for a look; do not keep it over a round."""
        if self._state is None:
            raise RuntimeError("the state was taken already and not put back")
        return self._state


def ring_rows(text: TextConfig) -> int:
    """Rows in a sliding layer's ring; position p lives in slot p % ring."""
    return text.sliding_window + RING_SLACK


def bucket_for(rows: int) -> int:
    """Rows a full layer's attention reads so that `rows` are covered: few sizes, hence few compilations."""
    step = 256 if rows <= 8192 else 2048
    return -(-rows // step) * step


def capacity_for(rows: int) -> int:
    """Rows to allocate so that every bucket up to `rows` plus two rounds of drafts fits."""
    return bucket_for(rows + RING_SLACK)


def kv_shapes(text: TextConfig, batch: int, capacity: int) -> list[tuple[int, ...]]:
    """The shape of K (and V) of every K/V-owning layer."""
    rows = {SLIDING: ring_rows(text), FULL: capacity}
    kinds = text.layer_types[: text.first_shared_layer]
    return [(batch, text.kv_heads_of(kind), rows[kind], text.head_dim_of(kind)) for kind in kinds]


def new_kv(target: Target, capacity: int) -> KeysValues:
    """Zeroed K/V buffers for one row, evaluated."""
    kv = tuple(
        (mx.zeros(shape, target.dtype), mx.zeros(shape, target.dtype))
        for shape in kv_shapes(target.text, 1, capacity)
    )
    mx.eval(kv)
    return kv


def capacity_of(text: TextConfig, kv: KeysValues) -> int:
    """Rows that the full layers have room for."""
    return kv[text.feeding_layers[FULL]][0].shape[2]


def grow(text: TextConfig, kv: list[tuple[mx.array, mx.array]], capacity: int) -> None:
    """Enlarge the full layers of `kv` in place of the list, one layer at a time, so that only one exists twice."""
    for i, kind in enumerate(text.layer_types[: text.first_shared_layer]):
        if kind == FULL and kv[i][0].shape[2] < capacity:
            pad = [(0, 0), (0, 0), (0, capacity - kv[i][0].shape[2]), (0, 0)]
            grown = tuple(mx.pad(buffer, pad) for buffer in kv[i])
            mx.eval(grown)
            kv[i] = (grown[0], grown[1])


def no_drafts(batch: int) -> mx.array:
    """[B, 0]: nothing is pending."""
    return mx.zeros((batch, 0), mx.uint32)


def join_rows(text: TextConfig, states: list[State]) -> State:
    """Solo states -> one state whose rows they are; capacities are levelled, pending drafts dropped."""
    capacity = max(capacity_of(text, state.kv) for state in states)
    levelled = []
    for state in states:
        own = list(state.kv)
        grow(text, own, capacity)
        levelled.append(own)
    kv = tuple(
        (mx.concatenate([row[i][0] for row in levelled]), mx.concatenate([row[i][1] for row in levelled]))
        for i in range(len(levelled[0]))
    )
    with_counts = [state.counts for state in states if state.counts is not None]
    if with_counts and len(with_counts) != len(states):
        raise ParameterError("rows with and without penalties cannot be joined; give every row its counts")
    joined = State(
        kv=kv,
        length=mx.concatenate([s.length for s in states]),
        last=mx.concatenate([s.last for s in states]),
        hidden=mx.concatenate([s.hidden for s in states]),
        drafts=no_drafts(sum(s.length.shape[0] for s in states)),
        seed=mx.concatenate([s.seed for s in states]),
        sampling={name: mx.concatenate([s.sampling[name] for s in states]) for name in states[0].sampling},
        counts=mx.concatenate(with_counts) if with_counts else None,
        active=mx.concatenate([s.active for s in states]),
    )
    mx.eval(joined)
    return joined


def keep_rows(cell: StateCell, rows: Sequence[int]) -> None:
    """Narrow the cell's state to some of its rows, one layer at a time, so that only one exists twice."""
    at = mx.array(list(rows), mx.int32)
    state = cell.take()
    kv = list(state.kv)
    state = state._replace(kv=())
    for i, (keys, values) in enumerate(kv):
        kv[i] = (mx.take(keys, at, axis=0), mx.take(values, at, axis=0))
        del keys, values
        mx.eval(kv[i])
    sampling = {name: value[at] for name, value in state.sampling.items()}
    fields = {name: value[at] for name, value in state._asdict().items() if isinstance(value, mx.array)}
    narrowed = state._replace(**fields, kv=tuple(kv), sampling=sampling)
    mx.eval(narrowed)
    cell.put(narrowed)
