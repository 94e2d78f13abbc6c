"""Figures: their formulas on rounds made by hand, and how they fit together on real ones."""

import functools

import pytest

from mlx_mtp import Sampling, generate, generate_batch, stream_generate
from mlx_mtp.conversation import Conversation
from mlx_mtp.decode import Step
from mlx_mtp.stats import RowCount, Stats
from pairs import golden_pair
from talks import golden_text, with_characters, with_eos

pair_of = functools.cache(golden_pair)


def counted(*rounds: tuple[int, int, int]) -> RowCount:
    """Rounds of (verified, accepted, used); an accepted of -1 is a round that the row took no part in."""
    count = RowCount()
    for verified, accepted, used in rounds:
        count.add(Step(((),), (None,), verified, (accepted,), None), 0, used)
    return count


def test_counting_by_hand():
    """The prefill's token, no draft accepted, one, all of them."""
    count = counted((0, -1, 1), (0, 0, 1), (3, 1, 2), (3, 0, 1), (4, 4, 5))
    assert (count.tokens, count.rounds) == (10, 4)
    assert (count.drafted, count.accepted) == (10, 5)
    assert count.by_position == [2, 1, 1, 1]
    assert count.num_draft_tokens == [0, 3, 3, 4]


def test_a_stop_inside_a_round_cuts_what_counts_as_accepted():
    """Drafts after the end were not emitted, although the target agreed."""
    count = counted((0, -1, 1), (4, 4, 2))
    assert (count.tokens, count.accepted, count.by_position) == (3, 2, [1, 1, 0, 0])
    count = counted((0, -1, 1), (4, 2, 3))  # the target's own token was the last
    assert (count.tokens, count.accepted, count.by_position) == (4, 2, [1, 1, 0, 0])


def test_rows_of_a_batch_are_counted_apart():
    count = RowCount()
    count.add(Step(((), ()), (None, None), 3, (-1, 2), None), 1, 3)
    count.add(Step(((), ()), (None, None), 3, (1, -1), None), 1, 0)
    assert (count.tokens, count.rounds, count.drafted, count.accepted) == (3, 1, 3, 2)


def test_formulas():
    stats = Stats(generation_tokens=13, rounds=4, drafted=16, accepted=8)
    assert stats.tokens_per_round == 3.0  # the first token is the prefill's
    assert stats.draft_acceptance_rate == 0.5
    for nothing in (Stats(), Stats(generation_tokens=1)):
        assert nothing.tokens_per_round == 0.0 and nothing.draft_acceptance_rate == 0.0


def check(stats: Stats, tokens: list[int]) -> None:
    """What holds for any run."""
    assert stats.generation_tokens == len(tokens)
    # A cut in the last round may fall on a draft, and then its own token is missing.
    assert stats.generation_tokens - 1 in (stats.accepted + stats.rounds, stats.accepted + stats.rounds - 1)
    assert sum(stats.accepted_by_position) == stats.accepted <= stats.drafted
    assert list(stats.accepted_by_position) == sorted(stats.accepted_by_position, reverse=True)
    assert len(stats.num_draft_tokens) == stats.rounds
    assert sum(stats.num_draft_tokens) == stats.drafted
    assert stats.ttft_s > 0 and stats.prompt_tps > 0 and stats.peak_memory_bytes > 0


@pytest.mark.parametrize("k", [0, 4, "auto"])
def test_a_real_run(k):
    ids, _ = golden_text("e2b", "long")
    out = generate(pair_of("e2b"), ids, max_tokens=40, num_draft_tokens=k)
    check(out.stats, out.tokens)
    assert (out.stats.prompt_tokens, out.stats.reused_tokens) == (len(ids), 0)
    assert out.stats.generation_tps > 0
    if k == 0:
        assert (out.stats.rounds, out.stats.drafted, out.stats.tokens_per_round) == (39, 0, 1.0)
    if k == 4:
        assert set(out.stats.num_draft_tokens[1:]) == {4}
        assert 2.0 < out.stats.tokens_per_round <= 5.0


def test_every_end_leaves_figures_that_fit():
    ids, text = golden_text("31b", "short")
    pair = with_characters(pair_of("31b"))
    for end in range(2, 12):
        out = generate(pair, ids, max_tokens=end, num_draft_tokens=4)
        check(out.stats, out.tokens)
        stop = "".join(chr(256 + token) for token in text[end - 2 : end])
        check((out := generate(pair, ids, max_tokens=40, num_draft_tokens=4, stop=stop)).stats, out.tokens)
        check((out := generate(with_eos(pair, text[end]), ids, num_draft_tokens=4)).stats, out.tokens)


def test_chunks_carry_the_figures_so_far():
    ids, _ = golden_text("e4b", "long")
    seen = []
    for chunk in stream_generate(pair_of("e4b"), ids, max_tokens=20, num_draft_tokens=3):
        seen += chunk.tokens
        check(chunk.stats, seen)


def test_a_batch():
    prompts = [golden_text("e2b", "long")[0], golden_text("e2b", "short")[0]]
    for out in generate_batch(pair_of("e2b"), prompts, max_tokens=17, num_draft_tokens=3):
        check(out.stats, out.tokens)


def test_reuse_and_the_seed_are_on_record():
    ids, text = golden_text("12b", "long")
    conversation = Conversation(pair_of("12b"))
    conversation.generate(ids, max_tokens=6, num_draft_tokens=2)
    stats = conversation.generate(ids + text[:6] + [9, 9], max_tokens=3, num_draft_tokens=2).stats
    assert (stats.prompt_tokens, stats.reused_tokens) == (len(ids) + 8, len(ids) + 5)
    drawn = generate(pair_of("12b"), ids, max_tokens=12, sampling=Sampling(), num_draft_tokens=2)
    assert drawn.stats.seed is not None
    again = Sampling(seed=drawn.stats.seed)
    assert generate(pair_of("12b"), ids, max_tokens=12, sampling=again).tokens == drawn.tokens
