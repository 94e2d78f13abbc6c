"""Every figure that is shown, from the samples of a run; the formulas are those of docs/measuring.md."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_mtp.measure.intervals import Ratio, Spread, paired_ratio, percentile, spread
from mlx_mtp.measure.plan import PEER, PLAIN, Case
from mlx_mtp.measure.results import Document

FEWEST = 2  # samples for any figure
USELESS = {"compiling", "late", "lazy", "tokens"}  # marks of samples whose times say nothing at all


@dataclass(frozen=True, slots=True)
class Row:
    """One arm of one case; None where there is nothing to say."""

    case: Case
    arm: str
    samples: int  # that the figures are of
    marked: dict[str, int]  # how many were marked, by what for
    trouble: str | None  # why there are no figures
    is_clean: bool = True  # no sample of the figures is marked; False where too few were clean
    ms_per_token: Spread | None = None
    tokens_per_s: float | None = None
    prompt_tokens_per_s: float | None = None
    warm_up_s: float | None = None
    ttft_ms: tuple[float, float] | None = None  # p50, p95
    round_ms: tuple[float, float] | None = None
    gap_ms: tuple[float, float] | None = None
    speedup: Ratio | None = None  # over our plain decoding, decode time
    faster_plain: str | None = None  # the arm that `total` is over
    total: Ratio | None = None  # whole time over that of the faster plain arm: below 1 is faster
    tokens_per_round: float | None = None
    acceptance: float | None = None
    acceptance_by_position: tuple[float, ...] = ()
    round_cost: float | None = None  # a round's time over a plain one's; as many tokens a round break even
    parked_share: float | None = None  # of the rounds, without drafts
    reason: str | None = None
    peak_bytes: int | None = None
    footprint_bytes: int | None = None
    joules_per_token: float | None = None
    verdict: dict[str, Any] | None = None
    unsteady: int = 0
    mlx_lm: dict[str, Any] | None = None

    @property
    def is_noisy(self) -> bool:
        """Too wide an interval, or samples that met other conditions: such figures pass no check."""
        return self.ms_per_token is None or self.ms_per_token.is_noisy or not self.is_clean

    @property
    def same_text(self) -> bool | None:
        """Whether every text was plain decoding's, in every repeat; None for arms that are not compared."""
        return None if self.verdict is None else self.verdict["parted"] == 0 and not self.unsteady

    @property
    def break_even(self) -> float | None:
        """Tokens a round from which drafting gains; what a plain round gives is 1."""
        return self.round_cost


def rows_of(document: Document) -> list[Row]:
    """All arms of all cases that were begun."""
    return [
        _row(Case(**entry["case"]), name, entry)
        for entry in document["cases"].values()
        for name in entry["arms"]
    ]


def skipped_of(document: Document) -> list[tuple[Case, str]]:
    """Cases that could not be played, and why."""
    return [(Case(**e["case"]), e["skipped"]) for e in document["cases"].values() if e["skipped"]]


def _row(case: Case, name: str, entry: dict[str, Any]) -> Row:
    arm = entry["arms"][name]
    chosen = chosen_samples(entry, name)
    marked: dict[str, int] = {}
    for sample in arm["samples"]:
        for mark in sample["marks"]:
            marked[mark] = marked.get(mark, 0) + 1
    trouble = arm["missing"] or arm["fault"] or entry["skipped"]
    if trouble is None and not chosen:
        trouble = "too few samples" if arm["samples"] else "not measured yet"
    if trouble is not None:
        return Row(
            case,
            name,
            len(chosen),
            marked,
            trouble,
            warm_up_s=arm["warm_up_s"],
            verdict=entry["verdicts"].get(name),
            unsteady=arm["unsteady"],
        )
    return _measured(case, name, entry, chosen, marked)


def _measured(
    case: Case, name: str, entry: dict[str, Any], clean: list[dict[str, Any]], marked: dict[str, int]
) -> Row:
    arm = entry["arms"][name]
    time = spread([1e3 * s["decode_s"] / s["tokens"] for s in clean])
    counts = [s["counts"] for s in clean]
    rounds, drafted = sum(c["rounds"] for c in counts), sum(c["drafted"] for c in counts)
    tokens = sum(s["tokens"] for s in clean)
    faster = faster_plain(entry)
    return Row(
        case=case,
        arm=name,
        samples=len(clean),
        marked=marked,
        trouble=None,
        is_clean=not any(s["marks"] for s in clean),
        ms_per_token=time,
        tokens_per_s=1e3 / time.median,
        prompt_tokens_per_s=statistics.median(s["prompt_tokens"] / s["prefill_s"] for s in clean),
        warm_up_s=arm["warm_up_s"],
        ttft_ms=_both([1e3 * seconds for s in clean for seconds in s["ttft_s"]]),
        round_ms=_middle(clean, "round_ms"),
        gap_ms=_middle(clean, "gap_ms"),
        speedup=_over(entry, PLAIN, name, "decode_s"),
        faster_plain=faster,
        total=None if faster is None else _over(entry, name, faster, "total_s"),
        tokens_per_round=tokens / rounds if rounds else (1.0 if name == PEER else None),
        acceptance=sum(c["accepted"] for c in counts) / drafted if drafted else None,
        acceptance_by_position=_by_position(counts),
        round_cost=_round_cost(entry, name),
        parked_share=_parked(counts) if drafted or name not in (PLAIN, PEER) else None,
        reason=counts[-1]["reason"],
        peak_bytes=max(s["peak_bytes"] for s in clean),
        footprint_bytes=max(s["footprint_bytes"] for s in clean),
        joules_per_token=_joules(clean),
        verdict=entry["verdicts"].get(name),
        unsteady=arm["unsteady"],
        mlx_lm=entry["mlx_lm"] if name == PLAIN else None,
    )


def faster_plain(entry: dict[str, Any]) -> str | None:
    """Of our plain decoding and mlx-lm's the one with the shorter whole time; None before there is one."""
    medians = {}
    for name in (PLAIN, PEER):
        arm = entry["arms"].get(name)
        if arm is None or arm["fault"] or arm["missing"]:
            continue
        times = [s["total_s"] for s in chosen_samples(entry, name)]
        if times:
            medians[name] = statistics.median(times)
    return min(medians, key=lambda name: medians[name]) if medians else None


def _over(entry: dict[str, Any], above: str, below: str, what: str) -> Ratio | None:
    """One arm's time over another's, by turns that both have."""
    values = [
        {s["turn"]: s[what] / (s["tokens"] if what == "decode_s" else 1) for s in chosen_samples(entry, name)}
        for name in (above, below)
    ]
    turns = sorted(values[0].keys() & values[1].keys())
    if len(turns) < FEWEST:
        return None
    return paired_ratio([values[0][t] for t in turns], [values[1][t] for t in turns])


def chosen_samples(entry: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """An arm's clean samples; where there are too few, those that met other conditions; [] where figures need more."""
    arm = entry["arms"].get(name)
    samples = [] if arm is None else [s for s in arm["samples"] if not USELESS & set(s["marks"])]
    clean = [s for s in samples if not s["marks"]]
    for some in (clean, samples):
        if len(some) >= FEWEST:
            return some
    return []


def _round_cost(entry: dict[str, Any], name: str) -> float | None:
    def seconds(arm: str) -> float | None:
        own = [
            s["decode_s"] / s["counts"]["passes"] for s in chosen_samples(entry, arm) if s["counts"]["passes"]
        ]
        return statistics.median(own) if own else None

    mine, plain = seconds(name), seconds(PLAIN)
    return None if mine is None or plain is None else mine / plain


def _by_position(counts: Sequence[dict[str, Any]]) -> tuple[float, ...]:
    """Share of the drafts at each position that were kept, of those that were made."""
    most = max((len(c["drafted_by_position"]) for c in counts), default=0)
    kept, made = [0] * most, [0] * most
    for c in counts:
        for i, (a, b) in enumerate(zip(c["accepted_by_position"], c["drafted_by_position"], strict=True)):
            kept[i] += a
            made[i] += b
    return tuple(a / b for a, b in zip(kept, made, strict=True))


def _parked(counts: Sequence[dict[str, Any]]) -> float | None:
    without = sum(c["by_drafts"].get("0", 0) for c in counts)
    played = sum(sum(c["by_drafts"].values()) for c in counts)
    return without / played if played else None


def _joules(clean: Iterable[dict[str, Any]]) -> float | None:
    own = [s["joules"] / (s["tokens"] + len(s["ttft_s"])) for s in clean if s["joules"] is not None]
    return statistics.median(own) if own else None


def _middle(clean: Sequence[dict[str, Any]], what: str) -> tuple[float, float] | None:
    own = [s[what] for s in clean if s[what] is not None]
    if not own:
        return None
    return statistics.median(o["p50"] for o in own), statistics.median(o["p95"] for o in own)


def _both(values: list[float]) -> tuple[float, float]:
    return percentile(values, 0.5), percentile(values, 0.95)
