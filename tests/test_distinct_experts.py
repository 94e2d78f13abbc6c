"""Experts that a verify reads: as many as the router's choices name, told to the policy, without a sync of its own."""

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

import mlx_mtp.decode
import mlx_mtp.kernels.verify_experts as kernel
import mlx_mtp.layers
from expert_cases import EPS, make_experts, rows_for, stock_product
from goldens import golden
from kernel_pairs import on_kernels, quantised_pair
from mlx_mtp import generate, generate_batch
from mlx_mtp.pair import Pair
from mlx_mtp.policy import FixedPolicy
from mlx_mtp.round import Rounds
from msl.stand_in import Runner
from pairs import golden_pair

PROMPTS = [golden("a4b", name).prompt for name in ("long", "short")]
EXPERTS = 8

pair_of = functools.cache(golden_pair)


class Told(FixedPolicy):
    """Remembers, for each round, the drafts it verified, its rows and the experts that it was told of."""

    heard: list[tuple[int, int, float | None]]

    def observe(self, verified: int, accepted: list[int], seconds: float | None, **more: Any) -> None:
        self.heard.append((verified, (verified + 1) * more["batch"], more["distinct"]))
        super().observe(verified, accepted, seconds, **more)


def told(pair: Pair, k: int, batch: int, patch: pytest.MonkeyPatch, tokens: int = 24) -> list[Any]:
    """What a policy hears while `batch` rows are decoded with k drafts; their texts are the golden ones."""
    policy = Told(k)
    policy.heard = []
    with patch.context() as inside:
        inside.setattr("mlx_mtp.pair.make_policy", lambda *words, **how: policy)
        prompts = [PROMPTS[row % 2] for row in range(batch)]
        if batch == 1:
            outs = [generate(pair, prompts[0], max_tokens=tokens, num_draft_tokens=k)]
        else:
            outs = generate_batch(pair, prompts, max_tokens=tokens, num_draft_tokens=k)
    for row, out in enumerate(outs):
        assert out.tokens == golden("a4b", ("long", "short")[row % 2]).new_tokens[:tokens]
    return policy.heard


def watched_counts(patch: pytest.MonkeyPatch) -> list[tuple[mx.array, list[mx.array]]]:
    """-> for each round built from now on: its count, and what the router chose in each of its layers."""
    found: list[tuple[mx.array, list[mx.array]]] = []
    chosen: list[mx.array] = []
    sound_route, sound_played = mlx_mtp.layers.route, Rounds.played

    def route(*words: Any) -> tuple[mx.array, mx.array]:
        ids, weights = sound_route(*words)
        chosen.append(ids)
        return ids, weights

    def played(rounds: Rounds, *words: Any, **how: Any) -> Any:
        chosen.clear()
        built = sound_played(rounds, *words, **how)
        found.append((built[-1], list(chosen)))
        return built

    patch.setattr(mlx_mtp.layers, "route", route)
    patch.setattr(Rounds, "played", played)
    return found


def by_hand(chosen: list[mx.array]) -> float:
    sizes = [len({expert for row in layer.tolist() for expert in row}) for layer in chosen]
    return sum(sizes) / len(sizes)


@pytest.mark.parametrize("k, batch", [(0, 1), (0, 2), (1, 1), (3, 1), (4, 3), (7, 1)])
def test_as_many_as_the_router_chose(k: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, layers = pair_of("a4b"), pair_of("a4b").target.text.num_layers
    found = watched_counts(monkeypatch)
    heard = told(pair, k, batch, monkeypatch)
    assert len(found) >= len(heard) > 2
    assert all(len(chosen) == layers for _, chosen in found)
    expected = [by_hand(chosen) for _, chosen in found]
    assert [float(count) for count, _ in found] == pytest.approx(expected)
    rows = (k + 1) * batch
    for (_, told_rows, distinct), count in zip(heard[:2], expected, strict=False):  # those that are counted
        assert told_rows == rows and distinct == (pytest.approx(count) if rows > 1 else None)
    if k and batch == 1:
        assert min(expected) < max(expected) <= min(EXPERTS, 2 * rows)  # it is no constant


@pytest.mark.parametrize("compiled", [False, True])
def test_counted_now_and_then_and_the_same_where_rounds_are_compiled(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlx_mtp.decode, "COUNT_EVERY", 1)
    every = told(pair_of("a4b"), 2, 1, monkeypatch, tokens=48)
    assert all(distinct is not None for _, _, distinct in every)
    monkeypatch.setattr(mlx_mtp.decode, "COUNT_EVERY", 8)
    pair = golden_pair("a4b", compiled=compiled)
    some = told(pair, 2, 1, monkeypatch, tokens=48)
    # The next round is built before this one is read, hence also the second.
    assert [i for i, (_, _, distinct) in enumerate(some) if distinct is not None] == [
        i for i in range(len(some)) if i == 0 or i % 8 == 1
    ]
    assert len(some) > 10
    for (_, _, distinct), (_, _, expected) in zip(some, every, strict=True):
        assert distinct is None or distinct == pytest.approx(expected)


def test_a_dense_target_reports_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pair_of("31b")
    generate(pair, golden("31b", "long").prompt, max_tokens=12, num_draft_tokens=3)
    assert pair.rounds.times.distinct == {}


def test_the_pair_learns_how_many_by_rows() -> None:
    pair = golden_pair("a4b")
    generate(pair, PROMPTS[0], max_tokens=24, num_draft_tokens=3)
    assert set(pair.rounds.times.distinct) == {4} and 2 < pair.rounds.times.distinct[4] <= EXPERTS


@pytest.mark.parametrize("k", [0, 3])
def test_no_round_waits_once_more_and_counts_come_with_the_tokens(
    k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is started and waited for is the same with and without; a count is started together with its tokens."""
    pair = pair_of("a4b")

    def events(every: int) -> list[str]:
        seen: list[str] = []
        with monkeypatch.context() as patch:
            patch.setattr(mlx_mtp.decode, "COUNT_EVERY", every)
            patch.setattr(mlx_mtp.decode, "mx", Watched(seen))
            patch.setattr(mlx_mtp.decode, "evaluate_soon", started(seen))
            generate_batch(pair, PROMPTS, max_tokens=20, num_draft_tokens=k)
        return seen

    always, never = events(1), events(10**9)
    assert [event.removesuffix(" and count") for event in always] == [
        event.removesuffix(" and count") for event in never
    ]
    # The first two rounds are counted whatever is asked for: nothing of their kind was read before they were built.
    assert always.count("tokens and count") == len([e for e in always if e.startswith("tokens")]) > 4
    assert never.count("tokens and count") == 2


class Watched:
    """mlx.core, writing down each wait."""

    def __init__(self, seen: list[str]):
        self._seen = seen

    def __getattr__(self, name: str) -> Any:
        return vars(mx)[name]

    def eval(self, *arrays: Any) -> None:
        self._seen.append("wait")
        mx.eval(*arrays)


def started(seen: list[str]) -> Callable[..., None]:
    sound = mlx_mtp.decode.evaluate_soon

    def start(*arrays: Any) -> None:
        is_tokens = len(arrays) > 1
        counts = [one for one in arrays[:3] if isinstance(one, mx.array) and one.ndim == 0]
        seen.append(("tokens" if is_tokens else "drafts") + (" and count" if counts else ""))
        sound(*arrays)

    return start


def test_our_kernels_say_what_they_chose(metal: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_experts(8, 2, 128, 192, bits=8, group=64, dtype=mx.bfloat16, seed=2)
    x = rows_for(layer, 9)
    wanted: list[mx.array] = []
    kernel.reference(layer, x, EPS, stock_product, wanted.append)
    for most in (kernel.MAX_PAIRS, 8):  # at once, and in parts of 4 rows
        monkeypatch.setattr(kernel, "MAX_PAIRS", most)
        seen: list[mx.array] = []
        kernel.verify_experts(layer, x, EPS, stock_product, seen.append)
        assert [sorted(row) for row in seen[0].tolist()] == [sorted(row) for row in wanted[0].tolist()]
        assert len(seen) == 1


def test_a_pair_on_our_kernels_counts_what_it_reads(metal: Runner) -> None:
    """Against the number of runs that its own sort of the pairs found."""
    pair = on_kernels(quantised_pair("a4b"))
    runs: list[mx.array] = []
    sound = kernel.choose_experts

    def choose(*words: Any) -> Any:
        routing = sound(*words)
        runs.append(routing.runs)
        return routing

    with pytest.MonkeyPatch.context() as patch:
        found: list[Any] = []
        sound_played = Rounds.played

        def played(rounds: Rounds, *words: Any, **how: Any) -> Any:
            runs.clear()
            built = sound_played(rounds, *words, **how)
            found.append((built[-1], list(runs)))
            return built

        patch.setattr(kernel, "choose_experts", choose)
        patch.setattr(Rounds, "played", played)
        generate(pair, PROMPTS[1][:8], max_tokens=6, num_draft_tokens=3)
    assert len(found) > 1
    for count, layers in found:
        in_use = [int(own[0]) for own in layers]
        assert len(in_use) == pair.target.text.num_layers
        assert float(count) == pytest.approx(sum(in_use) / len(in_use))
