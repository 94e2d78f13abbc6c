"""The cache of prefixes itself: what is kept, shared, forked and dropped within its budget."""

import mlx_mtp.prefix_cache
from engines import pair_of, words
from kv_rows import TOLERANCE, largest_gap, prefilled_rows
from mlx_mtp.prefix_cache import LEAST_MARKED, Lease, PrefixCache
from mlx_mtp.state import capacity_of
from mlx_mtp.turns import History


class Kept:
    """A cache that is used as a batch uses it, with its rows checked against a fresh prefill."""

    def __init__(self, budget: int, **options):
        self.target = pair_of("e2b", 2048).target
        self.cache = PrefixCache(self.target, budget=budget, **options)

    def read(self, ids: list[int]) -> tuple[Lease, int]:
        lease = self.cache.take(ids)
        kv, _, reused = lease.history.extend(ids, room=8, marks=lease.marks)
        self.cache.prefilled(lease, ids, kv)
        self.kv = kv
        return lease, reused

    def answer(self, ids: list[int]) -> int:
        """Read `ids`; a reply of one token ends at once."""
        lease, reused = self.read(ids)
        self.cache.ended(lease, [*ids, 1], self.kv)
        del self.kv
        self.check()
        return reused

    def check(self) -> None:
        for entry in self.cache._entries:
            history = entry.history
            if history.nbytes:
                expected = prefilled_rows(self.target, [*history.tokens[: history.rows], 0])
                gap = largest_gap(self.target, history._kv, expected, history.rows, written=history._written)
                assert gap < TOLERANCE


def one_entry_bytes() -> int:
    kept = Kept(2**30)
    kept.answer(words(0, 40))
    return kept.cache.nbytes


def test_the_longest_unused_are_dropped_first():
    one = one_entry_bytes()
    kept = Kept(int(3.5 * one))
    for i in range(3):
        assert kept.answer(words(i, 40)) == 0
    assert kept.answer([*words(0, 40), 9]) == 40, "used again, so that it is the newest"
    kept.answer(words(3, 40))
    assert len(kept.cache) == 3 and kept.cache.nbytes <= kept.cache.budget
    assert kept.answer([*words(1, 40), 9]) == 0
    assert kept.answer([*words(3, 40), 9]) == 40


def test_there_are_never_too_many_to_look_at(monkeypatch):
    monkeypatch.setattr(mlx_mtp.prefix_cache, "MOST_ENTRIES", 3)
    kept = Kept(2**30)
    lease, _ = kept.read(words(9, 20))
    for i in range(5):
        kept.cache.ended(kept.cache.take(words(i, 20)), [*words(i, 20), 1], kept.kv)
    assert len(kept.cache) == 4 and lease in kept.cache._entries
    assert [kept.cache.take([*words(i, 20), 5]).history.rows for i in range(5)] == [0, 0, 20, 20, 20]


def test_what_goes_on_is_taken_over_and_what_parts_is_forked():
    kept = Kept(2**30)
    ids = words(0, 9)  # so few that no ring has come round
    kept.answer(ids)
    assert kept.answer([*ids, *words(1, 3)]) == 9 and len(kept.cache) == 1
    assert kept.answer([*ids, *words(2, 3)]) == 9 and len(kept.cache) == 2
    assert kept.answer([*ids, *words(1, 3), 7]) == 12, "the first branch is still there"


def test_a_running_row_lends_its_prompt_and_is_not_disturbed():
    kept = Kept(2**30)
    ids = words(0, 60)
    lease, _ = kept.read(ids)
    kv = kept.kv
    assert kept.answer([*ids, *words(1, 9)]) == 60
    assert len(kept.cache) == 2
    kept.cache.ended(lease, [*ids, 5], kv)
    kept.check()
    assert kept.answer([*ids, 5, 6]) == 60


def test_a_running_row_over_the_budget_keeps_no_second_copy():
    one = one_entry_bytes()
    kept = Kept(int(1.2 * one))
    lease, _ = kept.read(words(0, 40))
    kv = kept.kv
    other, _ = kept.read(words(1, 40))
    assert kept.cache.nbytes <= kept.cache.budget
    kept.cache.ended(lease, [*words(0, 40), 5], kv)
    kept.cache.dropped(other)
    assert kept.cache.nbytes <= kept.cache.budget
    assert kept.answer([*words(0, 40), 5, 6]) == 40


def test_a_fork_that_would_not_fit_takes_the_entry_over():
    one = one_entry_bytes()
    kept = Kept(int(1.5 * one))
    kept.answer([*words(0, 40), *words(1, 20)])
    assert kept.answer([*words(0, 40), *words(2, 20)]) >= 0
    assert len(kept.cache) == 1 and kept.cache.nbytes <= kept.cache.budget


def test_buffers_that_several_share_count_once():
    kept = Kept(2**30)
    kept.answer(words(0, 14))
    before = kept.cache.nbytes
    lease = kept.cache.take([*words(0, 9), 3])
    kept.cache.interrupted(lease)
    assert len(kept.cache) == 2
    assert kept.cache.nbytes == before


def test_a_mark_is_only_set_where_it_saves_something():
    kept = Kept(2**30)
    kept.answer(words(0, LEAST_MARKED - 1))
    assert kept.cache.take([*words(0, LEAST_MARKED - 1), *words(1, 9)]).marks == ()
    kept = Kept(2**30)
    kept.answer([*words(0, 200), *words(1, 100)])
    assert kept.cache.take([*words(0, 200), *words(2, 100)]).marks == (200,)


def test_unused_room_is_given_back():
    kept = Kept(2**30)
    ids = words(0, 40)
    lease = kept.cache.take(ids)
    kv, _, _ = lease.history.extend(ids, room=1500)
    text = kept.target.text
    assert capacity_of(text, kv) >= 1536
    kept.cache.prefilled(lease, ids, kv)
    kept.cache.ended(lease, [*ids, 1], kv)
    assert capacity_of(text, tuple(lease.history._kv)) == 256
    kept.check()


def test_shrinking_drops_half_and_says_when_there_is_nothing_left():
    kept = Kept(2**30)
    for i in range(4):
        kept.answer(words(i, 40))
    before = kept.cache.nbytes
    assert kept.cache.shrink() and kept.cache.nbytes <= before // 2
    assert kept.answer([*words(3, 40), 5]) == 40, "the newest stays"
    for _ in range(10):
        kept.cache.shrink()
    assert kept.cache.nbytes == 0 and not kept.cache.shrink()


def test_long_prompts_are_compared_quickly():
    history = History(pair_of().target)
    history.tokens, history.rows = list(range(100_000)), 100_000
    for at in (0, 1, 511, 512, 513, 70_000, 99_998):
        other = list(range(100_000))
        other[at] = -1
        assert history.common(other) == at
    assert history.common(list(range(100_000))) == 99_999
    assert history.common(list(range(50))) == 49
    assert history.common([*range(100_000), 3]) == 100_000
