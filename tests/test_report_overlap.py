"""doctor --report: what building ahead hides, on a tiny pair and on devices that are made up."""

import time

import pytest

from mlx_mtp.report import donation, overlap
from report_settings import found_by, long, setting_of

BUILD, COMPUTE = 0.004, 0.012  # seconds


class MadeUpLoop(overlap.Loop):
    """Rounds that take BUILD to describe and COMPUTE on a device that runs beside the host, or makes it wait."""

    def __init__(self, *, dispatch_blocks: bool) -> None:
        self._blocks, self._done_at = dispatch_blocks, 0.0
        self._current = None

    def _build(self, state):
        time.sleep(BUILD)
        return (None, None, None)

    def _dispatch(self, built):
        self._done_at = time.perf_counter() + COMPUTE
        if self._blocks:
            time.sleep(COMPUTE)

    def _read(self, running):
        time.sleep(max(0.0, self._done_at - time.perf_counter()))

    def _wait(self, running):
        pass

    def play(self, *, ahead):
        self._current = self._current or (None, None, None)
        return super().play(ahead=ahead)


@pytest.mark.parametrize("dispatch_blocks, hidden", [(False, 1.0), (True, 0.0)])
def test_what_is_hidden_depends_on_whether_dispatching_blocks(dispatch_blocks, hidden):
    found = overlap.in_both_orders(MadeUpLoop(dispatch_blocks=dispatch_blocks), 4, long())
    assert found["hidden_share_of_build"] == pytest.approx(hidden, abs=0.35)
    assert found["ahead"]["build_ms"] >= 1e3 * BUILD and found["after"]["build_ms"] >= 1e3 * BUILD
    assert (found["ahead"]["dispatch_ms"] > 1e3 * COMPUTE / 2) == dispatch_blocks


def test_the_parts_of_a_round_on_a_tiny_pair():
    found = found_by(overlap.overlap, setting_of("31b"))
    assert set(found) == {"plain", f"k={overlap.K}"}
    for own in found.values():
        for order in ("ahead", "after"):
            parts = [own[order][f"{part}_ms"] for part in overlap.PARTS]
            assert all(part >= 0 for part in parts)
            assert sum(parts) == pytest.approx(own[order]["round_ms"], rel=0.5)
        assert own["round_ratio"] == pytest.approx(
            own["ahead"]["round_ms"] / own["after"]["round_ms"], rel=0.01
        )


@pytest.mark.parametrize("ahead", [True, False])
def test_both_orders_write_in_place_and_commit(ahead):
    """As decoding does: what is timed is what is played."""
    setting = setting_of("e2b")
    loop = overlap.Loop(setting.the_pair, next(iter(setting.prompts.values())), k=overlap.K, rounds=12)
    before, length = donation.addresses(loop._current[0]), loop._current[0].length.item()
    for _ in range(4):
        loop.play(ahead=ahead)
    assert donation.addresses(loop._current[0]) == before
    assert loop._current[0].length.item() >= length + 4
