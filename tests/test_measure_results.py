"""Files of runs: kept whole, read back, refused where unusable; guarantees and comparisons."""

import copy
import errno
import json
import os
from dataclasses import replace

import pytest

from bench_runs import FAST, FINGERPRINT, SLOW, STEADY, WIDE, made_document, timed_run
from cli_runs import one_line, run_main
from mlx_mtp.cli.bench_text import comparison_text
from mlx_mtp.errors import ParameterError
from mlx_mtp.measure.compare import compare_runs, unlike
from mlx_mtp.measure.guarantee import check_guarantee, keeps_its_word
from mlx_mtp.measure.results import Keeper, as_json, read_document, write_document
from mlx_mtp.measure.summary import rows_of
from mlx_mtp.measure.tables import record_of


def only_case(document) -> dict:
    return next(iter(document["cases"].values()))


# Files


def test_a_run_is_read_back_as_it_was_kept(tmp_path):
    document, path = timed_run(plain=STEADY, auto=FAST), tmp_path / "run.json"
    write_document(path, document)
    assert read_document(path) == json.loads(as_json(document))
    document = read_document(path)
    write_document(path, document)
    assert read_document(path) == document
    assert [record_of(row) for row in rows_of(read_document(path))] == [
        record_of(row) for row in rows_of(document)
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        (b"", "is not JSON"),
        (b"\x00\xff", "is not JSON"),
        (b"[1, 2]", "holds no results"),
        (b'{"kind": "something else", "schema": 1}', "holds no results"),
        (b'{"kind": "mlx-mtp bench", "schema": 99}', "update mlx-mtp"),
        (b'{"kind": "mlx-mtp bench", "schema": true}', "damaged"),
        (b'{"kind": "mlx-mtp bench", "schema": 1}', "damaged"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_line(tmp_path, content, said):
    path = tmp_path / "run.json"
    if content is not None:
        path.write_bytes(content)
    good = tmp_path / "good.json"
    write_document(good, timed_run(plain=STEADY, auto=FAST))
    for words in (("--compare", path, good), ("--compare", good, path), ("--resume", path)):
        done = run_main("bench", *words)
        assert done.returncode == 2
        assert said in one_line(done.stderr)
        assert not done.stdout


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("settings"),
        lambda d: d["settings"].update(unheard_of=1),
        lambda d: d["settings"].update(tokens="many"),
        lambda d: d["settings"].update(workloads=["haiku"]),
        lambda d: d.update(cases=[]),
        lambda d: only_case(d).pop("arms"),
        lambda d: only_case(d)["arms"]["plain"].pop("samples"),
        lambda d: only_case(d)["arms"]["plain"]["samples"][2].update(decode_s=-1.0),
        lambda d: only_case(d)["arms"]["plain"]["samples"][2].update(decode_s=None),
        lambda d: only_case(d)["arms"]["plain"]["samples"][2].pop("counts"),
        lambda d: only_case(d)["arms"].update(plain=3),
        lambda d: only_case(d).update(case=None),
    ],
)
def test_damage_inside_is_found(tmp_path, damage):
    document = timed_run(plain=STEADY, auto=FAST)
    damage(document)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ParameterError, match="is damaged"):
        read_document(path)


def test_a_full_disk_is_spoken_of_once_and_what_was_kept_stays(tmp_path, monkeypatch):
    document, path = timed_run(plain=STEADY, auto=FAST), tmp_path / "run.json"
    keeper = Keeper(path, every_s=0.0)
    assert keeper.keep(document) is None
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    document["notes"].append("more")
    said = keeper.keep(document)
    assert said is not None and "No space left" in said and "free some disk space" in said
    assert keeper.keep(document) is None
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["run.json"]
    monkeypatch.undo()
    assert keeper.keep(document) is None and keeper.trouble is None
    assert read_document(path)["notes"] == ["more"]


# Figures


def test_figures_of_a_made_run():
    plain, auto = rows_of(timed_run(plain=STEADY, auto=FAST))
    assert plain.ms_per_token.median == pytest.approx(10.0)
    assert plain.tokens_per_s == pytest.approx(100.0)
    assert auto.speedup.value == pytest.approx(2.0) and auto.speedup.low > 1.99
    assert auto.total.value == pytest.approx(0.5)
    assert auto.tokens_per_round == 2.0
    assert auto.acceptance == 0.5 and auto.acceptance_by_position == (0.6, 0.4)
    assert auto.round_cost == auto.break_even == pytest.approx(0.5)
    assert auto.parked_share == 0.0
    assert plain.prompt_tokens_per_s == pytest.approx(400.0)
    assert auto.same_text is True and plain.same_text is None


def test_the_faster_plain_arm_is_what_total_is_over():
    found = {
        row.arm: row for row in rows_of(timed_run(plain=STEADY, mlx_lm=[0.8 * s for s in STEADY], auto=FAST))
    }
    assert found["auto"].faster_plain == "mlx-lm"
    assert found["auto"].total.value == pytest.approx(0.5 / 0.8)
    assert found["auto"].speedup.value == pytest.approx(2.0), "a speed-up is over our own plain decoding"


# The guarantee


def findings(document) -> dict:
    return {(f.arm, f.check): f for f in check_guarantee(document)}


def test_the_guarantee_holds_for_what_is_faster_or_as_fast():
    for auto in (FAST, STEADY, [1.01 * s for s in STEADY]):
        document = timed_run(plain=STEADY, mlx_lm=SLOW, auto=auto, k2=SLOW)
        assert keeps_its_word(check_guarantee(document), document)


def test_a_slow_auto_breaks_it_and_a_slow_fixed_number_does_not():
    document = timed_run(plain=STEADY, mlx_lm=SLOW, auto=SLOW, k2=FAST)
    found = findings(document)[("auto", "time")]
    assert not found.holds and found.said.startswith("SLOWER: 1.100 x the time of plain")
    assert not keeps_its_word(check_guarantee(document), document)
    assert ("k=2", "time") not in findings(document)


def test_slower_than_mlx_lm_alone_breaks_it():
    found = findings(timed_run(plain=SLOW, mlx_lm=STEADY, auto=SLOW))[("auto", "time")]
    assert not found.holds and "of mlx-lm" in found.said


def test_what_is_too_noisy_to_tell_is_not_shown():
    for plain, auto in ((WIDE, STEADY), (STEADY, WIDE)):
        document = timed_run(plain=plain, auto=auto)
        found = findings(document)[("auto", "time")]
        assert not found.holds and "too noisy" in found.said
        assert not keeps_its_word(check_guarantee(document), document)


def test_a_machine_that_was_not_at_rest_shows_nothing():
    document = made_document({"plain": STEADY, "auto": FAST}, marks=("loaded",))
    found = findings(document)[("auto", "time")]
    assert not found.holds and "6 loaded" in found.said


def test_another_text_breaks_it_also_where_rounding_explains_it():
    document = timed_run(plain=STEADY, auto=FAST, k2=FAST)
    first = {"text": 0, "index": 7, "is_rounding": True, "why": "rounding: gap 0.1, the paths differ by 0.2"}
    only_case(document)["verdicts"]["k=2"] |= {"parted": 1, "per_1000": 10.0, "first": [first]}
    found = findings(document)
    assert found[("auto", "text")].holds
    assert not found[("k=2", "text")].holds and "token 7" in found[("k=2", "text")].said
    document = timed_run(plain=STEADY, auto=FAST)
    only_case(document)["arms"]["auto"]["unsteady"] = 2
    assert not findings(document)[("auto", "text")].holds


def test_nothing_measured_is_no_yes():
    document = timed_run(plain=STEADY, auto=FAST)
    assert not keeps_its_word(check_guarantee({**document, "cases": {}}), document)
    assert not keeps_its_word(check_guarantee(document), {**document, "complete": False})
    only_case(document)["skipped"] = "it does not fit"
    assert [f.said for f in check_guarantee(document)] == ["not played: it does not fit"]
    document = timed_run(plain=STEADY, k2=FAST)
    assert not keeps_its_word(check_guarantee(document), document), "auto is what the word is about"


# Comparisons


def test_two_runs_are_compared_with_intervals():
    before, after = timed_run(plain=STEADY, auto=FAST), timed_run(plain=STEADY, auto=[0.9 * s for s in FAST])
    plain, auto = compare_runs(before, after)
    assert plain.word == "no difference shown" and plain.ratio.low < 1 < plain.ratio.high
    assert auto.word == "faster"
    assert auto.ratio.value == pytest.approx(0.9) and auto.ratio.high < 0.92
    assert compare_runs(after, before)[1].word == "slower"
    noisy = compare_runs(
        timed_run(plain=WIDE, auto=WIDE), timed_run(plain=WIDE, auto=[0.95 * s for s in WIDE])
    )
    assert [c.word for c in noisy] == ["no difference shown"] * 2
    text = comparison_text(compare_runs(before, after), 100)
    assert "0.900" in text
    assert text.splitlines()[-1] == "2 rows: 1 faster, 0 slower, 1 without a difference shown"


def test_a_long_comparison_says_what_chance_would_show():
    many = compare_runs(timed_run(plain=STEADY, auto=FAST), timed_run(plain=STEADY, auto=FAST)) * 15
    assert comparison_text(many, 100).endswith("; by chance alone about 2 would be faster or slower")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("fingerprint", "machine", "chip"), "Apple M9"),
        (("fingerprint", "target", "files", "model.safetensors"), "other"),
        (("fingerprint", "drafter"), None),
        (("fingerprint", "versions", "mlx"), "0.40.0"),
        (("fingerprint", "power", "source"), "battery"),
        (("fingerprint", "prompts", "hash"), "dd"),
        (("settings", "tokens"), 7),
    ],
)
def test_unlike_runs_are_refused_unless_forced(tmp_path, place, value):
    one, other = timed_run(plain=STEADY, auto=FAST), timed_run(plain=STEADY, auto=FAST)
    *path, last = place
    inner = other = copy.deepcopy(other)
    for name in path:
        inner = inner[name]
    inner[last] = value
    with pytest.raises(ParameterError, match=last.replace(".", r"\.")):
        compare_runs(one, other)
    assert len(compare_runs(one, other, force=True)) == 2
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, document in zip(files, (one, other), strict=True):
        write_document(file, document)
    refused = run_main("bench", "--compare", *files)
    assert refused.returncode == 2 and "--force" in one_line(refused.stderr)
    forced = run_main("bench", "--compare", *files, "--force")
    assert forced.returncode == 0 and b"warning: compared by force" in forced.stderr
    assert b"after/before" in forced.stdout


def test_another_version_of_this_program_may_be_compared():
    other = timed_run(plain=STEADY, auto=FAST)
    other["fingerprint"] = copy.deepcopy(FINGERPRINT)
    other["fingerprint"]["versions"]["mlx-mtp"] = "9.9"
    assert unlike(timed_run(plain=STEADY, auto=FAST), other) == []


def test_a_busy_machine_shows_no_difference():
    busy = made_document({"plain": STEADY, "auto": FAST}, marks=("loaded",))
    found = compare_runs(timed_run(plain=SLOW, auto=SLOW), busy)
    assert {c.word for c in found} == {"unknown: a machine was not at rest"}
    assert comparison_text(found, 100).endswith("2 rows, and none says anything: a machine was not at rest")
    half = [*found, *compare_runs(timed_run(plain=STEADY), timed_run(plain=STEADY))]
    assert comparison_text(half, 100).endswith(
        "3 rows: 0 faster, 0 slower, 1 without a difference shown, 2 unknown"
    )


def test_runs_with_nothing_in_common_are_refused():
    one, other = timed_run(plain=STEADY, auto=FAST), timed_run(plain=STEADY, auto=FAST)
    other["cases"] = {}
    with pytest.raises(ParameterError, match="in common"):
        compare_runs(one, other)


def test_rows_know_nothing_of_arms_that_are_missing():
    document = timed_run(plain=STEADY, mlx_lm=STEADY, auto=FAST)
    only_case(document)["arms"]["mlx-lm"] |= {"samples": [], "missing": "not measured: no room"}
    found = {row.arm: row for row in rows_of(document)}
    assert found["mlx-lm"].trouble == "not measured: no room"
    assert found["auto"].faster_plain == "plain"
    assert replace(found["auto"], unsteady=1).same_text is False
