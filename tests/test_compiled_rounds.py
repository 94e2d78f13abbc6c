"""A round compiled in parts is the round: layers of one sort share a trace, each with its own weights."""

import functools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_mtp.compiled_drafts
import mlx_mtp.compiled_pass
from mlx_mtp.array_parts import arrays_of, likeness, with_arrays
from mlx_mtp.conversation import make_request, start_row
from mlx_mtp.pair import Pair
from mlx_mtp.round import Played, Rounds
from mlx_mtp.sampling import Sampling, sampler_class
from mlx_mtp.state import State
from mlx_mtp.turns import History
from mlx_mtp.weights import QuantizedWeight
from pairs import VARIANTS, golden_pair
from talks import golden_text

GREEDY = Sampling(temperature=0.0)
DRAWN = Sampling(temperature=1.0, top_k=8, presence_penalty=0.5, seed=3)
BUCKET = 256

pair_of = functools.cache(golden_pair)


def prefilled(pair: Pair, sampling: Sampling = GREEDY, pending: int = 0) -> State:
    """A golden prompt with so many pending drafts, right and wrong ones; buffers of its own."""
    ids, after = golden_text(pair.name, "long")
    request = make_request(pair, ids, max_tokens=8, sampling=sampling)
    kv, hidden, _ = History(pair.target).extend(ids, room=64)
    state = start_row(pair, request, kv, hidden, with_bias=False, with_counts=sampling.penalises)
    drafts = [*after[1 : 1 + pending - 1], 5][:pending]
    return state._replace(drafts=mx.array([drafts], mx.uint32).reshape(1, pending))


def played(pair: Pair, sampling: Sampling, *, pending: int, k: int, compiled: bool) -> Played:
    rounds = Rounds(pair.target, pair.drafter, compiled=compiled)
    return rounds.played(
        prefilled(pair, sampling, pending), k=k, bucket=BUCKET, sampler=sampler_class([sampling])
    )


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("pending, k", [(0, 0), (0, 2), (3, 3)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_round(variant: str, pending: int, k: int, sampling: Sampling) -> None:
    one, other = (
        played(pair_of(variant), sampling, pending=pending, k=k, compiled=compiled)
        for compiled in (True, False)
    )
    assert one.tokens.tolist() == other.tokens.tolist() and one.n.tolist() == other.n.tolist()
    assert one.state.drafts.shape == (1, k) and one.state.drafts.tolist() == other.state.drafts.tolist()
    for name in ("length", "last", "counts"):
        found, expected = (getattr(each.state, name) for each in (one, other))
        assert (found is None) == (expected is None)
        assert found is None or found.tolist() == expected.tolist()
    np.testing.assert_allclose(np.array(one.hidden), np.array(other.hidden), atol=2e-4)
    for both, expected in zip(one.state.kv, other.state.kv, strict=True):
        for buffer, wanted in zip(both, expected, strict=True):
            np.testing.assert_allclose(np.array(buffer), np.array(wanted), atol=2e-4)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_one_step_makes_any_number_of_drafts(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    pair, sampler = pair_of("e2b"), sampler_class([GREEDY])
    rounds = Rounds(pair.target, pair.drafter)
    steps = traced(monkeypatch, mlx_mtp.compiled_drafts, "draft_one")
    state = prefilled(pair)
    wanted = Rounds(pair.target, pair.drafter, compiled=False).first_drafts(
        state, k=6, bucket=BUCKET, sampler=sampler
    )
    rounds.first_drafts(state, k=3, bucket=BUCKET, sampler=sampler)
    assert len(steps) == 1
    found = rounds.first_drafts(state, k=k, bucket=BUCKET, sampler=sampler)
    assert len(steps) == 1 and found.drafts.tolist() == wanted.drafts[:, :k].tolist()


def traced(patch: pytest.MonkeyPatch, module: Any, name: str) -> list[Any]:
    """What the function of a module is called with from now on, which is once for each trace."""
    calls: list[Any] = []
    sound = getattr(module, name)

    def noted(*words: Any) -> Any:
        calls.append(words)
        return sound(*words)

    patch.setattr(module, name, noted)
    return calls


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_of_one_sort_are_traced_once_and_a_bucket_traces_full_ones_only(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, sampler = pair_of(variant), sampler_class([GREEDY])
    layers = traced(monkeypatch, mlx_mtp.compiled_pass, "play_layer")
    rounds, state = Rounds(pair.target, None), prefilled(pair)
    rounds(state, k=0, bucket=BUCKET, sampler=sampler)
    sorts = {likeness(layer) for layer in pair.target.layers}
    assert len(layers) == len(sorts) < pair.target.text.num_layers
    layers.clear()
    rounds(state, k=0, bucket=BUCKET // 2, sampler=sampler)
    assert len(layers) == len({sort for sort in sorts if "full_attention" in sort})  # type: ignore[operator]
    layers.clear()
    rounds(state, k=0, bucket=BUCKET, sampler=sampler)
    assert layers == []


@pytest.mark.parametrize("variant", ["e2b", "a4b"])
def test_a_layer_is_its_arrays_and_the_rest(variant: str) -> None:
    first, second = pair_of(variant).target.layers[:2]
    other = with_arrays(first, iter([array + 1 for array in arrays_of(first)]))
    assert likeness(other) == likeness(first) and type(other) is type(first)
    for one, two in zip(arrays_of(other), arrays_of(first), strict=True):
        assert mx.array_equal(one, two + 1)
    swapped = with_arrays(first, iter(arrays_of(second)))
    assert [id(array) for array in arrays_of(swapped)] == [id(array) for array in arrays_of(second)]


def test_formats_are_sorts_of_their_own() -> None:
    """Quantised matrices of the same stored shapes can hold other numbers of values."""
    arrays = (mx.zeros((8, 4), mx.uint32), mx.zeros((8, 1)), mx.zeros((8, 1)))
    one = QuantizedWeight(*arrays, group_size=32, bits=4, mode="affine", dtype=mx.float32)
    other = QuantizedWeight(*arrays, group_size=64, bits=2, mode="affine", dtype=mx.float32)
    again = QuantizedWeight(
        *(mx.ones_like(a) for a in arrays), group_size=32, bits=4, mode="affine", dtype=mx.float32
    )
    assert likeness(one) == likeness(again) != likeness(other)
