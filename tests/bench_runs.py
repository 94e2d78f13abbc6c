"""Runs of the bench on players that do as they are told, and a tiny pair for what needs a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from cli_runs import write_chat_pair
from mlx_mtp import load
from mlx_mtp.measure.clock import Played, Prompt, Watch
from mlx_mtp.measure.conditions import Machine, Moment
from mlx_mtp.measure.energy import Meter
from mlx_mtp.measure.plan import Settings
from mlx_mtp.measure.results import Document, new_document
from mlx_mtp.measure.run import Run
from mlx_mtp.pair import Pair
from mlx_mtp.round import Rounds
from mlx_mtp.stats import Stats

# Seconds of an arm's samples.
STEADY = [1.0, 1.001, 0.999, 1.002, 1.0, 0.998]
FAST = [0.5 * s for s in STEADY]
SLOW = [1.1 * s for s in STEADY]
WIDE = [0.7, 1.3, 0.8, 1.2, 1.0, 1.05]

IDLE = Machine(
    busy_s=None, thermal=None, throttled=None, power=None, low_power=None, load=0.0, waited_s=None, hertz=None
)
FINGERPRINT: dict[str, Any] = {
    "machine": {
        "system": "Linux",
        "arch": "x86_64",
        "os_version": "6.1",
        "chip": "Test chip",
        "gpu_cores": None,
        "memory_bytes": 8 << 30,
        "gpu_budget_bytes": None,
        "has_metal": False,
        "is_translated": False,
        "is_virtual": False,
        "processors": 2,
    },
    "device": "cpu",
    "power": {"source": None, "low_power": None},
    "versions": {"mlx-mtp": "0.1.0", "python": "3.12.0", "mlx": "0.32.4", "mlx-lm": "0.32.2", "numpy": "2.0"},
    "target": {"revision": None, "files": {"model.safetensors": "aa"}, "format": "float32"},
    "drafter": {"revision": None, "files": {"model.safetensors": "bb"}, "format": "float32"},
    "dtype": "float32",
    "kernels": {"ours": [], "stock": []},
    "preloaded": None,
    "promise": "a",
    "prompts": {"version": 1, "hash": "cc"},
}
ARMS = ("plain", "auto", "k=2")
SETTINGS = Settings(
    workloads=("chat",), samplings=("greedy",), contexts=(0,), arms=ARMS, prompts=1, tokens=6, max_repeats=8
)
CALM = Meter("not readable: a test", None)


def tiny_pair(folder: Path) -> Pair:
    """A random pair that can chat, not compiled: its rounds cost no C++."""
    pair = load(write_chat_pair(folder))
    return replace(pair, rounds=Rounds(pair.target, pair.drafter, compiled=False))


class Clock:
    """Time that passes only where a player says so: other programs here cannot make a test fail."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self) -> float:
        return self.at


CLOCK = Clock()


@dataclass
class Scripted:
    """Writes `text`, one token an arrival, each after `seconds` (a number, or by turn from 0, the warm-up) of CLOCK."""

    name: str
    seconds: float | Callable[[int], float] = 0.002
    text: tuple[int, ...] = (5, 6, 7, 8, 9, 10)
    turns: int = field(default=0, init=False)

    def play(self, group: Sequence[Prompt], watch: Watch) -> Played:
        seconds = self.seconds(self.turns) if callable(self.seconds) else self.seconds
        self.turns += 1
        for _ in self.text:
            CLOCK.at += seconds
            watch.arrived(1)
        rounds = len(self.text) - 1
        stats = Stats(
            generation_tokens=len(self.text),
            rounds=rounds,
            num_draft_tokens=(0,) * rounds,
            reason="parked: a test",
        )
        return Played([list(self.text)] * len(group), [stats] * len(group), ())


class Looks:
    """Conditions as a script has them: what `change` makes of an idle machine at each look."""

    def __init__(self, change: Callable[[int], dict[str, Any]] = lambda number: {}) -> None:
        self._change = change
        self.number = 0

    def __call__(self) -> Moment:
        machine = replace(IDLE, **self._change(self.number))
        self.number += 1
        return Moment(machine, 0.0, CLOCK.at, CLOCK.at)


def played(
    pair: Pair,
    players: Sequence[Any],
    settings: Settings = SETTINGS,
    *,
    document: Document | None = None,
    **options: Any,
) -> Document:
    """The document of a run of `players` over `settings`."""
    names = tuple(player.name for player in players)
    document = document or new_document(replace(settings, arms=names), {"name": "test"}, dict(FINGERPRINT))
    options = {"look": Looks(), "meter": CALM, "now": CLOCK, **options}
    Run(pair, replace(settings, arms=names), document, arms=lambda *given: list(players), **options).play()
    return document


def made_document(
    times: dict[str, Sequence[float]],
    *,
    texts: dict[str, Sequence[int]] | None = None,
    marks: Sequence[str] = (),
) -> Document:
    """A complete run of one case in which an arm's samples took so many seconds each; no model is asked."""
    arms = {}
    for name, seconds in times.items():
        samples = [sample_of(turn, value, marks=marks) for turn, value in enumerate(seconds, 1)]
        own = list((texts or {}).get(name, (5, 6, 7)))
        arms[name] = {
            "warm_up_s": 1.0,
            "samples": samples,
            "texts": [own],
            "unsteady": 0,
            "fault": None,
            "missing": None,
        }
    settings = replace(SETTINGS, arms=tuple(times))
    document = new_document(settings, {"name": "test"}, dict(FINGERPRINT))
    verdict = {"texts": 1, "tokens": 100, "parted": 0, "per_1000": 0.0, "first": [], "is_rounding": True}
    document["cases"]["chat/greedy/0/1"] = {
        "case": {"workload": "chat", "sampling": "greedy", "context": 0, "batch": 1},
        "prompt_tokens": [40],
        "done": True,
        "skipped": None,
        "arms": arms,
        "verdicts": {name: dict(verdict) for name in times if name not in ("plain", "mlx-lm")},
        "mlx_lm": None,
    }
    document["complete"] = True
    document["energy"] = "not readable: a test"
    return document


def sample_of(turn: int, seconds: float, *, marks: Sequence[str] = ()) -> dict[str, Any]:
    counts = {
        "passes": 50,
        "rounds": 50,
        "drafted": 100,
        "accepted": 50,
        "accepted_by_position": [30, 20],
        "drafted_by_position": [50, 50],
        "by_drafts": {"2": 50},
        "reason": None,
    }
    return {
        "turn": turn,
        "prefill_s": seconds / 10,
        "decode_s": seconds,
        "total_s": 1.1 * seconds,
        "prompt_tokens": 40,
        "tokens": 100,
        "ttft_s": [seconds / 10],
        "round_ms": {"p50": 20 * seconds, "p95": 25 * seconds},
        "gap_ms": {"p50": 0.0, "p95": 25 * seconds},
        "counts": counts,
        "peak_bytes": 10_000_000,
        "footprint_bytes": 20_000_000,
        "joules": None,
        "conditions": {"others": 0.0},
        "marks": list(marks),
    }


def lazy_work(size: int = 256) -> mx.array:
    """A product that is described and not computed: tens of milliseconds on a processor."""
    x = mx.random.normal((size, size), key=mx.random.key(0))
    mx.eval(x)
    for _ in range(8):
        x = (x @ x) / size
    return x


def timed_run(**times: list[float]) -> dict[str, Any]:
    """A made run whose arms took these times; mlx_lm and k2 stand for mlx-lm and k=2."""
    return made_document({name.replace("_", "-").replace("k2", "k=2"): list(t) for name, t in times.items()})
