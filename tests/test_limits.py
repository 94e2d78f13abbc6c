"""MLX's process-wide limits: with a reserve, put back afterwards, and never touched by library functions."""

from pathlib import Path

import mlx.core as mx
import pytest

import mlx_mtp
import mlx_mtp.limits
from mlx_mtp.admission import GIB, budget_bytes
from mlx_mtp.limits import cache_bytes, memory_limits, wired_bytes
from mlx_mtp.machine import Machine, read_machine

MACHINES = [read_machine(path) for path in sorted((Path(__file__).parent / "machines").glob("*.json"))]
MACS = [machine for machine in MACHINES if machine.has_metal]
WITHOUT_METAL = [machine for machine in MACHINES if not machine.has_metal]
SETTERS = ("set_memory_limit", "set_cache_limit", "set_wired_limit")


class Limits:
    """Stands in for MLX's limits: what they are, and every change."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, refuses: str | None = None):
        self.now = {"set_memory_limit": 101, "set_cache_limit": 102, "set_wired_limit": 103}
        self.calls = 0
        for name in SETTERS:
            monkeypatch.setattr(mx, name, self._setter(name, refuses=name == refuses))

    def _setter(self, name: str, *, refuses: bool):
        def set_limit(limit: int) -> int:
            self.calls += 1
            if refuses and limit != 103:
                raise ValueError(
                    "Setting a wired limit larger than the maximum working set size is not allowed."
                )
            previous, self.now[name] = self.now[name], limit
            return previous

        return set_limit


@pytest.mark.parametrize("mac", MACS, ids=lambda mac: f"{mac.chip} {mac.memory_bytes // GIB}")
def test_a_reserve_is_left_and_never_all_is_wired(mac: Machine, monkeypatch):
    limits = Limits(monkeypatch)
    with memory_limits(mac):
        inside = dict(limits.now)
    assert inside == {
        "set_memory_limit": budget_bytes(mac),
        "set_cache_limit": cache_bytes(mac),
        "set_wired_limit": wired_bytes(mac),
    }
    assert mac.gpu_budget_bytes is not None
    assert 0 < wired_bytes(mac) <= 0.9 * mac.gpu_budget_bytes
    assert mac.memory_bytes - wired_bytes(mac) >= min(8 * GIB, mac.memory_bytes // 2)
    assert mac.memory_bytes // 32 <= cache_bytes(mac) <= 2 * GIB or mac.memory_bytes > 64 * GIB


def test_limits_are_put_back(monkeypatch):
    limits = Limits(monkeypatch)
    before = dict(limits.now)
    with memory_limits(MACS[0]):
        assert limits.now != before
    assert limits.now == before
    with pytest.raises(KeyboardInterrupt), memory_limits(MACS[0]):
        raise KeyboardInterrupt
    assert limits.now == before


def test_limits_are_put_back_where_one_is_refused(monkeypatch):
    limits = Limits(monkeypatch, refuses="set_wired_limit")
    before = dict(limits.now)
    with pytest.raises(ValueError, match="wired limit"), memory_limits(MACS[0]):
        raise AssertionError("not reached")
    assert limits.now == before and limits.calls > 3


def test_limits_of_the_real_mlx():
    """Its CPU backend has the memory and the cache limit; the cache's can only be read by setting it."""
    memory = mx.get_memory_limit()
    cache = mx.set_cache_limit(32 * 2**20)
    try:
        with memory_limits(MACS[0]):
            assert mx.get_memory_limit() == budget_bytes(MACS[0])
            assert mx.set_cache_limit(cache_bytes(MACS[0])) == cache_bytes(MACS[0])
        assert mx.get_memory_limit() == memory
        assert mx.set_cache_limit(32 * 2**20) == 32 * 2**20
    finally:
        mx.set_cache_limit(cache)


@pytest.mark.parametrize("machine", WITHOUT_METAL, ids=lambda machine: machine.chip)
def test_nothing_is_set_without_metal(machine: Machine, monkeypatch):
    limits = Limits(monkeypatch)
    with memory_limits(machine):
        pass
    assert limits.calls == 0


def test_the_library_leaves_limits_alone(monkeypatch):
    limits = Limits(monkeypatch)
    monkeypatch.setattr(mlx_mtp.limits, "memory_limits", None)
    pair = mlx_mtp.load("demo")
    assert mlx_mtp.generate(pair, "def f", max_tokens=6).tokens
    assert mlx_mtp.generate_batch(pair, ["def f", "class A"], max_tokens=4)
    assert limits.calls == 0
