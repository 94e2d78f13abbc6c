"""A run: arms in turn, repeats until it is sure, marked samples that count for nothing, text that is judged."""

from dataclasses import replace

import pytest

from bench_runs import ARMS, CALM, CLOCK, FINGERPRINT, SETTINGS, Looks, Scripted, played, tiny_pair
from mlx_mtp.errors import MemoryRefusal
from mlx_mtp.flips import Flip
from mlx_mtp.measure.arms import counted, make_arms, sampling_of
from mlx_mtp.measure.clock import Played, Prompt, timed
from mlx_mtp.measure.plan import Case, Settings
from mlx_mtp.measure.results import new_document
from mlx_mtp.measure.run import Run
from mlx_mtp.measure.summary import rows_of, skipped_of
from mlx_mtp.measure.verdict import verdict_on
from mlx_mtp.measure.workloads import workload_prompts

KEY = "chat/greedy/0/1"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pair(tmp_path_factory.mktemp("pair"))


def players(**changes) -> list[Scripted]:
    return [Scripted(name, **changes.get(name.replace("=", ""), {})) for name in ARMS]


def rows(document) -> dict:
    return {row.arm: row for row in rows_of(document)}


def test_arms_are_played_in_turn_and_each_begins_in_turn(pair):
    order: list[str] = []

    class Noted(Scripted):
        def play(self, group, watch):
            order.append(self.name)
            return super().play(group, watch)

    played(pair, [Noted(name) for name in ARMS])
    warm_up, turns = order[:3], [order[i : i + 3] for i in range(3, len(order), 3)]
    assert warm_up == list(ARMS)
    assert all(sorted(turn) == sorted(ARMS) for turn in turns)
    assert {turn[0] for turn in turns} == set(ARMS)
    assert len(turns) == 5


def test_what_is_told_of_the_work_done_never_goes_back(pair):
    steps = []
    settings = replace(SETTINGS, workloads=("chat", "prose"), max_repeats=6)
    noisy = players(auto={"seconds": lambda turn: 0.002 + 0.002 * (turn % 2)})
    played(pair, noisy, settings, on_step=steps.append)
    shares = [step.share for step in steps]
    assert shares == sorted(shares)
    assert shares[0] == 0.0 and 0.9 < shares[-1] < 1.0


def test_the_first_pass_is_discarded_and_told(pair):
    found = rows(played(pair, players(plain={"seconds": lambda turn: 0.05 if turn == 0 else 0.002})))
    assert found["plain"].warm_up_s == pytest.approx(0.3)
    assert found["plain"].ms_per_token.most == pytest.approx(2.0)


def test_a_quiet_arm_is_played_five_times_and_a_noisy_one_to_the_end(pair):
    settings = replace(SETTINGS, max_repeats=9)
    calm = played(pair, players(), settings)
    noisy = played(pair, players(auto={"seconds": lambda turn: 0.002 + 0.002 * (turn % 2)}), settings)
    assert len(noisy["cases"][KEY]["arms"]["auto"]["samples"]) == 9
    assert len(calm["cases"][KEY]["arms"]["auto"]["samples"]) == 5
    found = rows(noisy)
    assert found["auto"].is_noisy
    assert found["auto"].samples == 9


def test_the_time_that_is_there_is_kept_to(pair):
    noisy = players(auto={"seconds": lambda turn: 0.002 + 0.002 * (turn % 2)})
    document = played(pair, noisy, replace(SETTINGS, max_repeats=50, budget_s=0.05))
    assert len(document["cases"][KEY]["arms"]["auto"]["samples"]) == 5


def test_a_sample_taken_under_another_load_counts_for_nothing(pair):
    """Two looks a sample; another program is busy, and all is slower, in the third turn."""
    busy = range(2 * 3 * 2, 2 * 3 * 3)
    slow = {"seconds": lambda turn: 0.006 if turn == 3 else 0.002}

    def change(number: int) -> dict:
        # Seconds of processors, as of the look's end: a whole one more in each sample of that turn.
        return {"busy_s": 1000.0 * sum(1 for n in busy if n <= number and n % 2)}

    document = played(pair, players(plain=slow, auto=slow, k2=slow), look=Looks(change))
    arm = document["cases"][KEY]["arms"]["auto"]
    assert [s["turn"] for s in arm["samples"] if "loaded" in s["marks"]] == [3]
    found = rows(document)["auto"]
    assert found.marked == {"loaded": 1}
    assert found.samples == len(arm["samples"]) - 1 >= 5
    assert found.ms_per_token.most == pytest.approx(2.0)


def test_where_all_samples_are_marked_their_figures_pass_nothing(pair):
    document = played(pair, players(), look=Looks(lambda number: {"thermal": "heavy"}))
    found = rows(document)["auto"]
    assert found.marked == {"throttled": 8}, "it went on for clean ones"
    assert found.is_noisy and not found.is_clean
    assert found.ms_per_token is not None


def test_power_that_is_not_that_of_the_run_is_marked(pair):
    document = played(pair, players(), look=Looks(lambda number: {"power": "battery"}))
    assert rows(document)["auto"].marked == {"power changed": 8}


@pytest.mark.parametrize("text", [(5, 6, 7, 8, 9), (5, 6, 7, 8, 9, 10, 11)])
def test_an_arm_with_another_number_of_tokens_has_no_figures(pair, text):
    found = rows(played(pair, players(k2={"text": text})))
    assert f"{len(text)} were written where 6 were asked for" in found["k=2"].trouble
    assert found["k=2"].speedup is None
    assert found["auto"].speedup is not None


def test_an_arm_that_leaves_work_behind_has_no_figures(pair):
    """The clock is broken: it does not compute what is left."""
    from bench_runs import lazy_work

    class Lazy(Scripted):
        def play(self, group, watch):
            played = super().play(group, watch)
            return Played(played.texts, played.stats, [lazy_work()])

    document = played(pair, [Scripted("plain"), Lazy("auto"), Scripted("k=2")], settle=lambda kept: None)
    assert "work were left when the clock stopped" in rows(document)["auto"].trouble
    document = played(
        pair, [Scripted("plain"), Lazy("auto"), Scripted("k=2")], replace(SETTINGS, max_repeats=5)
    )
    assert rows(document)["auto"].trouble is None


def test_plain_decoding_that_cannot_be_measured_ends_the_case_only(pair):
    settings = replace(SETTINGS, workloads=("chat", "prose"))
    document = played(pair, players(plain={"text": (5, 6)}), settings)
    assert [case.workload for case, _ in skipped_of(document)] == ["chat", "prose"]
    assert "2 were written where 6" in skipped_of(document)[0][1]
    assert document["complete"]


def test_speedups_and_costs_are_those_of_the_times(pair):
    found = rows(
        played(
            pair, players(auto={"seconds": 0.004}, k2={"seconds": 0.001}), replace(SETTINGS, max_repeats=5)
        )
    )
    assert found["plain"].speedup.value == pytest.approx(1.0)
    assert found["auto"].speedup.value == pytest.approx(0.5)
    assert found["k=2"].speedup.value == pytest.approx(2.0)
    assert found["auto"].round_cost == pytest.approx(2.0)
    assert found["auto"].total.value == pytest.approx(2.0)
    assert found["auto"].faster_plain == "plain"
    assert found["auto"].parked_share == 1.0
    assert found["auto"].reason == "parked: a test"


def test_a_text_that_changes_between_repeats_is_told(pair):
    class Moody(Scripted):
        def play(self, group, watch):
            played = super().play(group, watch)
            other = [*played.texts[0][:-1], 99] if self.turns == 4 else played.texts[0]
            return Played([other], played.stats, ())

    found = rows(played(pair, [Scripted("plain"), Moody("auto"), Scripted("k=2")]))
    assert found["auto"].unsteady == 1
    assert found["auto"].same_text is False
    assert found["k=2"].same_text is True


class Stop(Exception):
    """Stands for Ctrl-C."""


def test_an_interrupted_run_is_kept_and_goes_on_where_it_was(pair):
    kept: list[int] = []

    def interrupted(step):
        if step.turn == 3 and step.arm == "auto" and step.number == 2:
            raise Stop

    settings = replace(SETTINGS, workloads=("chat", "prose"), arms=ARMS)
    document = new_document(settings, {"name": "test"}, dict(FINGERPRINT))
    options = {"look": Looks(), "meter": CALM, "now": CLOCK}
    with pytest.raises(Stop):
        Run(
            pair,
            settings,
            document,
            arms=lambda *given: players(),
            on_step=interrupted,
            keep=lambda document, at_once: kept.append(at_once),
            **options,
        ).play()
    assert kept[-1] is True
    assert not document["complete"]
    first, second = document["cases"].values()
    assert first["done"] and not second["done"]
    before = [list(arm["samples"]) for arm in first["arms"].values()]
    had = {name: len(arm["samples"]) for name, arm in second["arms"].items()}
    assert set(had.values()) <= {2, 3} and min(had.values()) == 2

    steps = []
    Run(pair, settings, document, arms=lambda *given: players(), on_step=steps.append, **options).play()
    assert document["complete"]
    assert [arm["samples"] for arm in first["arms"].values()] == before, "what was done is not done again"
    assert {step.number for step in steps} == {2}
    assert all(5 <= len(arm["samples"]) <= 8 for arm in second["arms"].values())
    turns = [s["turn"] for s in second["arms"]["auto"]["samples"]]
    assert turns == sorted(set(turns))


def test_a_case_that_does_not_fit_is_skipped_with_the_reason(pair):
    settings = replace(SETTINGS, contexts=(0, 100_000))
    document = played(pair, players(), settings)
    [(case, why)] = skipped_of(document)
    assert case.context == 100_000
    assert "needs a context of" in why and "512" in why
    assert document["complete"]
    assert document["cases"][KEY]["skipped"] is None


def test_memory_that_runs_out_ends_the_case_only(pair):
    class Greedy(Scripted):
        def play(self, group, watch):
            raise MemoryRefusal("this prompt with its reply needs 99.0 GB more; close other programs")

    document = played(pair, [Greedy("plain"), Scripted("auto"), Scripted("k=2")])
    assert "99.0 GB" in skipped_of(document)[0][1]


# With the model


def prompt(pair, tokens: int = 12) -> Prompt:
    [ids] = workload_prompts(pair, "chat", 1, 0)
    return Prompt(ids, 0, tokens)


def test_all_our_arms_write_the_same_full_text_alone_and_together(pair):
    counted_pair, _ = counted(pair)
    for sampling in ("greedy", "default"):
        arms = make_arms(counted_pair, ("plain", "auto", "k=3"), sampling_of(pair, sampling))
        alone = [timed(arm, [prompt(pair)]) for arm in arms]
        assert all(not one.faults for one in alone)
        assert len({tuple(one.texts[0]) for one in alone}) == 1
        group = [prompt(pair)._replace(seed=seed) for seed in (0, 1)]
        together = [timed(arm, group) for arm in arms]
        assert all(not one.faults for one in together)
        assert {tuple(one.texts[0]) for one in together} == {tuple(alone[0].texts[0])}
        assert all(one.tokens == 2 * 11 for one in together)


def test_mlx_lm_writes_as_many_tokens_and_greedy_the_same_text(pair):
    from mlx_mtp.against_mlx_lm import load_mlx_lm

    model = load_mlx_lm(pair, pair.folder)
    sampling = sampling_of(pair, "greedy")
    plain, peer = make_arms(pair, ("plain", "mlx-lm"), sampling, model)
    for group in ([prompt(pair)], [prompt(pair)] * 4):
        ours, theirs = timed(plain, group), timed(peer, group)
        assert ours.faults == theirs.faults == ()
        assert theirs.texts == ours.texts
    [drawn] = make_arms(pair, ("mlx-lm",), sampling_of(pair, "default"), model)
    ends = set(pair.prompt_format.eos_ids)
    assert not ends & set(timed(drawn, [prompt(pair, 60)]).texts[0])


def test_a_sample_in_which_something_was_compiled_is_marked(pair):
    document = new_document(
        replace(SETTINGS, arms=("plain", "k=2"), max_repeats=5), {"name": "test"}, dict(FINGERPRINT)
    )
    settings = replace(SETTINGS, arms=("plain", "k=2"), max_repeats=5)
    run = Run(pair, settings, document, look=Looks(), meter=CALM)
    honest = run.rounds.is_new
    calls = 0

    def sometimes(*given, **named) -> bool:
        nonlocal calls
        calls += 1
        run.rounds.traced += calls == 40
        return honest(*given, **named)

    run.rounds.is_new = sometimes  # a kind of round that first comes up in the middle of the run
    run.play()
    marks = [s["marks"] for arm in document["cases"][KEY]["arms"].values() for s in arm["samples"]]
    assert marks.count(["compiling"]) == 1


def test_a_wrong_token_of_mtp_is_found_and_diagnosed(pair, monkeypatch):
    from mlx_mtp.conversation import Conversation

    honest = Conversation.stream

    def spoiled(self, ids, *, num_draft_tokens, **options):
        for i, chunk in enumerate(honest(self, ids, num_draft_tokens=num_draft_tokens, **options)):
            if num_draft_tokens == 2 and i == 2:
                chunk = replace(chunk, tokens=((chunk.tokens[0] + 1) % 500 or 1, *chunk.tokens[1:]))
            yield chunk

    monkeypatch.setattr(Conversation, "stream", spoiled)
    settings = replace(SETTINGS, arms=("plain", "k=1", "k=2"), tokens=10, max_repeats=5)
    document = new_document(settings, {"name": "test"}, dict(FINGERPRINT))
    Run(pair, settings, document, look=Looks(), meter=CALM).play()
    found = rows(document)
    assert found["k=1"].same_text is True
    assert found["k=2"].same_text is False
    verdict = found["k=2"].verdict
    first = verdict["first"][0]
    assert verdict["parted"] == 1
    assert verdict["per_1000"] == pytest.approx(1000 / (first["index"] + 1))
    assert first["difference"] == 0.0 and first["gap"] > 0
    assert "NOT explained by rounding" in first["why"]


def test_a_parting_is_looked_into_with_passes_as_wide_as_those_played(pair, monkeypatch):
    seen = []

    def noted(pair, ids, off, on, sampling, rows):
        seen.append(rows)
        return Flip(1, off[1], on[1], gap=0.1, difference=0.2)

    monkeypatch.setattr("mlx_mtp.measure.verdict.first_flip", noted)
    prompts = [prompt(pair)] * 5
    plain, drafted = [[1, 2, 3]] * 5, [[1, 2, 3], *[[1, 9, 3]] * 4]
    found = verdict_on(pair, prompts, plain, drafted, sampling_of(pair, "greedy"), {0: 50, 2: 3, 4: 7})
    assert seen == [5] * 3, "four drafts were the commonest; three partings are looked into"
    assert (found["texts"], found["parted"], found["tokens"]) == (5, 4, 3 + 4 * 2)
    assert found["per_1000"] == pytest.approx(4000 / 11)
    assert found["is_rounding"] is True
    shorter = verdict_on(pair, prompts[:1], [[1, 2, 3]], [[1, 2]], sampling_of(pair, "greedy"), {})
    assert shorter["parted"] == 1 and not shorter["is_rounding"]


def test_settings_make_every_case_once():
    settings = Settings(contexts=(512, 4096), batches=(1, 4))
    cases = settings.cases()
    assert len(cases) == len(set(cases)) == 9 * 2 * 2 * 2
    assert settings.rows(Case("code", "greedy", 512, 1)) == 5
    assert settings.rows(Case("code", "greedy", 512, 4)) == 8
    assert replace(settings, prompts=8).rows(Case("code", "greedy", 512, 4)) == 8
    assert settings.rows(Case("code", "greedy", 512, 16)) == 16
