"""A run: every case in turn, its arms alternated, repeated until the intervals are narrow, its text judged."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlx_mtp.errors import GenerationError, MemoryRefusal
from mlx_mtp.machine import footprint_bytes
from mlx_mtp.measure import clock
from mlx_mtp.measure.arms import counted, make_arms, sampling_of
from mlx_mtp.measure.clock import Player, Prompt, Timed, timed
from mlx_mtp.measure.conditions import POWER, Moment, between, look
from mlx_mtp.measure.energy import Meter, find_meter, joules_between
from mlx_mtp.measure.intervals import NARROW, spread
from mlx_mtp.measure.plan import PEER, PLAIN, Case, Settings
from mlx_mtp.measure.results import Document
from mlx_mtp.measure.sample import figures_of, process_peak
from mlx_mtp.measure.verdict import mlx_lm_agrees, verdict_on
from mlx_mtp.measure.workloads import PROMPTS_EACH, workload_prompts
from mlx_mtp.pair import Pair

COMPILING, LATE = "compiling", "late"
CONTEXT_COSTS = 1 / 20  # of a written token, for each token read: only the time left is guessed from it

MakeArms = Callable[..., list[Player]]


@dataclass(frozen=True, slots=True)
class Step:
    """Where a run is: `share` of all its work that is done, as far as can be told."""

    case: Case
    number: int
    cases: int
    turn: int  # 0: warming up
    turns: int  # expected
    arm: str
    share: float


class Run:
    """Plays what `settings` ask for that `document` does not hold yet, and puts it there.

    peer: mlx-lm's model, for its arm. bytes_of: what the model of "plain" and that of "mlx-lm" take; an arm's peak is
    told without the other's.
    """

    def __init__(
        self,
        pair: Pair,
        settings: Settings,
        document: Document,
        *,
        peer: Any = None,
        bytes_of: Mapping[str, int] | None = None,
        on_step: Callable[[Step], None] = lambda step: None,
        keep: Callable[[Document, bool], None] = lambda document, at_once: None,
        arms: MakeArms = make_arms,
        look: Callable[[], Moment] = look,
        meter: Meter | None = None,
        settle: clock.Settle = clock.settle,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.pair, self.rounds = counted(pair)
        self.settings, self.document, self.peer = settings, document, peer
        self._bytes_of = bytes_of or {}
        self._on_step, self._keep, self._make_arms = on_step, keep, arms
        self._look, self._meter, self._settle, self._now = look, meter or find_meter(), settle, now
        self._power = document["fingerprint"]["power"]
        document["energy"] = self._meter.scope

    def play(self) -> None:
        """All cases; what was measured is kept also where something ends the run."""
        cases, done = self.settings.cases(), 0.0
        weights = [self._weight(case) for case in cases]
        started = self._now()
        try:
            for number, case in enumerate(cases):
                entry = self._entry(case)
                if not entry["done"]:
                    share = (done, weights[number], sum(weights), number)
                    self._case(case, entry, share, self._deadline(started, number + 1, len(cases)))
                done += weights[number]
            self.document["complete"] = True
        finally:
            self.document["process_peak_bytes"] = process_peak()
            self._keep(self.document, True)

    def _weight(self, case: Case) -> float:
        return self.settings.rows(case) * (self.settings.tokens + CONTEXT_COSTS * (case.context or 100))

    def _deadline(self, started: float, number: int, cases: int) -> float:
        """Until when a case may go on beyond the fewest repeats."""
        budget = self.settings.budget_s
        return float("inf") if budget is None else started + budget * number / cases

    def _entry(self, case: Case) -> dict[str, Any]:
        empty: dict[str, Any] = {
            "warm_up_s": None,
            "texts": None,
            "unsteady": 0,
            "was_late": False,
            "fault": None,
            "missing": None,
        }
        new = {
            "case": asdict(case),
            "prompt_tokens": [],
            "done": False,
            "skipped": None,
            "arms": {name: {**empty, "samples": []} for name in self.settings.arms},
            "verdicts": {},
            "mlx_lm": None,
        }
        entry: dict[str, Any] = self.document["cases"].setdefault(case.key, new)
        return entry

    # One case

    def _case(
        self, case: Case, entry: dict[str, Any], share: tuple[float, float, float, int], deadline: float
    ) -> None:
        try:
            prompts = self._prompts(case)
            entry["prompt_tokens"] = [len(prompt.ids) for prompt in prompts]
            self._refuse_long(prompts)
            self._turns(case, entry, prompts, share, deadline)
            self._judge(case, entry, prompts)
        except (MemoryRefusal, GenerationError) as error:
            entry["skipped"] = str(error)
        entry["done"] = True
        self._keep(self.document, True)

    def _prompts(self, case: Case) -> list[Prompt]:
        rows = self.settings.rows(case)
        own = workload_prompts(self.pair, case.workload, min(rows, PROMPTS_EACH), case.context)
        return [Prompt(own[i % len(own)], i, self.settings.tokens) for i in range(rows)]

    def _refuse_long(self, prompts: Sequence[Prompt]) -> None:
        needed = max(len(prompt.ids) + prompt.tokens for prompt in prompts)
        if needed > self.pair.max_context:
            raise MemoryRefusal(
                f"needs a context of {needed:,} tokens, and the model was opened for {self.pair.max_context:,}"
            )

    def _turns(
        self,
        case: Case,
        entry: dict[str, Any],
        prompts: list[Prompt],
        share: tuple[float, float, float, int],
        deadline: float,
    ) -> None:
        """Warm up, then play all arms in each turn, beginning with another one each time."""
        names = [name for name in self.settings.arms if name != PEER or self.peer is not None]
        for name in set(self.settings.arms) - set(names):
            entry["arms"][name]["missing"] = (
                self.document.get("peer_missing") or "mlx-lm's model is not loaded"
            )
        players = self._make_arms(self.pair, names, sampling_of(self.pair, case.sampling), self.peer)
        first = max((len(arm["samples"]) for arm in entry["arms"].values()), default=0)
        expected = self.settings.min_repeats

        def tell(turn: int, place: int, played: int) -> None:
            done, weight, whole, number = share
            part = _part(turn + played / len(players), expected)
            cases = len(self.settings.cases())
            name = players[place].name
            self._on_step(Step(case, number + 1, cases, turn, expected, name, (done + weight * part) / whole))

        for place, player in enumerate(players):
            tell(0, place, place)
            self._warm_up(player, entry["arms"][player.name], prompts, case.batch)
        turn = first
        while turn < self.settings.max_repeats and not self._is_enough(entry, turn, deadline):
            turn += 1
            for i in range(len(players)):
                place = (turn + i) % len(players)
                arm = entry["arms"][players[place].name]
                if arm["fault"] is None:
                    tell(turn, place, i)
                    arm["samples"].append(self._sample(players[place], arm, prompts, case.batch, turn))
            if entry["arms"][PLAIN]["fault"] is not None:
                raise GenerationError(f"plain decoding cannot be measured: {entry['arms'][PLAIN]['fault']}")
            self._keep(self.document, False)

    def _is_enough(self, entry: dict[str, Any], turns: int, deadline: float) -> bool:
        """Whether every arm has the fewest clean samples and a narrow interval, or the time is over."""
        if turns < self.settings.min_repeats:
            return False
        if self._now() > deadline:
            return True
        for arm in entry["arms"].values():
            if arm["fault"] or arm["missing"]:
                continue
            clean = [sample["decode_s"] for sample in arm["samples"] if not sample["marks"]]
            if len(clean) < self.settings.min_repeats or spread(clean).half_width > NARROW:
                return False
        return True

    def _warm_up(self, player: Player, arm: dict[str, Any], prompts: list[Prompt], batch: int) -> None:
        """One pass that is discarded; its time is told, with what was compiled in it."""
        started = self._now()
        groups = self._play(player, prompts, batch)
        if arm["warm_up_s"] is None:
            arm["warm_up_s"] = self._now() - started
        self._note_fault(arm, groups)
        if arm["texts"] is None:
            arm["texts"] = [text for group in groups for text in group.texts]
        if arm["fault"] is not None and player.name == PLAIN:
            raise GenerationError(f"plain decoding cannot be measured: {arm['fault']}")

    def _play(self, player: Player, prompts: list[Prompt], batch: int) -> list[Timed]:
        return [
            timed(player, prompts[i : i + batch], self._settle, self._now)
            for i in range(0, len(prompts), batch)
        ]

    def _sample(
        self, player: Player, arm: dict[str, Any], prompts: list[Prompt], batch: int, turn: int
    ) -> dict[str, Any]:
        traced, read = self.rounds.traced, self._meter.read
        before = self._look()
        charged = None if read is None else read()
        groups = self._play(player, prompts, batch)
        used = None if read is None or charged is None else joules_between(charged, read())
        seen = between(before, self._look())
        marks = list(seen.marks)
        if self.rounds.traced != traced:
            marks.append(COMPILING)
        if (seen.power, seen.low_power) != (self._power["source"], self._power["low_power"]):
            marks += [POWER] if POWER not in marks else []
        fault = self._note_fault(arm, groups)
        if [text for group in groups for text in group.texts] != arm["texts"]:
            arm["unsteady"] += 1
        figures = figures_of(groups)
        figures["peak_bytes"] -= self._bytes_of.get(PLAIN if player.name == PEER else PEER, 0)
        conditions = {name: value for name, value in asdict(seen).items() if name != "marks"}
        return {
            "turn": turn,
            **figures,
            "footprint_bytes": footprint_bytes(),
            "joules": used,
            "conditions": conditions,
            "marks": marks + ([fault.partition(":")[0]] if fault else []),
        }

    def _note_fault(self, arm: dict[str, Any], groups: list[Timed]) -> str | None:
        """What is wrong with these groups; it is the arm's own fault, or, of late work, if it comes a second time."""
        fault = next((fault for group in groups for fault in group.faults), None)
        if fault is not None and (not fault.startswith(LATE) or arm["was_late"]):
            arm["fault"] = fault
        arm["was_late"] = arm["was_late"] or (fault is not None and fault.startswith(LATE))
        return fault

    def _judge(self, case: Case, entry: dict[str, Any], prompts: list[Prompt]) -> None:
        """Compare all texts with plain decoding's, and for greedy ones our model with mlx-lm's."""
        arms, sampling = entry["arms"], sampling_of(self.pair, case.sampling)
        plain = arms[PLAIN]["texts"]
        for name, arm in arms.items():
            if name in (PLAIN, PEER) or arm["texts"] is None:
                continue
            rounds = {
                int(k): n for sample in arm["samples"][:1] for k, n in sample["counts"]["by_drafts"].items()
            }
            entry["verdicts"][name] = verdict_on(self.pair, prompts, plain, arm["texts"], sampling, rounds)
        if self.peer is not None and case.sampling == "greedy" and case.batch == 1:
            entry["mlx_lm"] = mlx_lm_agrees(self.peer, self.pair, prompts, plain)


def _part(passes: float, expected: int) -> float:
    """Share of a case that is done after so many passes, the warm-up among them: never 1 while more may follow."""
    last = 1 / (1 + expected)
    return passes * last if passes < expected else 1 - last * expected / passes
