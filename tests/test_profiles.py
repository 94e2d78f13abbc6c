"""Profiles of round times: kept for the same pair here only; damaged and foreign ones are set aside, said once."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_mtp import load
from mlx_mtp.errors import ParameterError
from mlx_mtp.profiles import Found, ProfileKey, export, import_profile, key_of, profile_path, restore, save
from mlx_mtp.round_times import RoundTimes
from mlx_mtp.store import everything_kept

KEY = ProfileKey("Apple M4 Pro", 20, "0.32.4", "ab12", "4-bit affine, groups of 64, bfloat16", "stock")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def known() -> RoundTimes:
    times = RoundTimes()
    for k, seconds in ((0, 0.02), (0, 0.02), (2, 0.03), (2, 0.03)):
        times.observe(k, seconds)
    return times


def test_kept_for_the_next_run(home: Path) -> None:
    assert save(known(), KEY) is None
    times = RoundTimes()
    assert restore(times, KEY) == Found(True, None)
    assert times.ratio(2) == pytest.approx(1.5, rel=1e-3)
    assert any(kept.path.name == "profiles" and "rounds" in kept.what for kept in everything_kept())


def test_nothing_known_nothing_kept(home: Path) -> None:
    assert save(RoundTimes(), KEY) is None
    assert not profile_path(KEY).exists() and restore(RoundTimes(), KEY) == Found(False, None)


@pytest.mark.parametrize("field", ["chip", "gpu_cores", "mlx", "checkpoint", "quantisation", "kernels"])
def test_another_place_has_another_profile(home: Path, field: str) -> None:
    save(known(), KEY)
    other = replace(KEY, **{field: 10 if field == "gpu_cores" else "other"})
    assert restore(RoundTimes(), other) == Found(False, None)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff\x00", b'{"mlx_mtp": 1}', b'{"mlx_mtp": 99, "key": 1, "value": 2}']
)
def test_a_damaged_profile_is_set_aside_with_one_warning(home: Path, content: bytes) -> None:
    save(known(), KEY)
    path, times = profile_path(KEY), RoundTimes()
    path.write_bytes(content)
    is_known, warning = restore(times, KEY)
    assert not is_known and "kept aside as" in str(warning) and not times.is_known()
    assert not path.exists() and path.with_name(path.name + ".corrupt").read_bytes() == content
    assert restore(times, KEY) == Found(False, None)


def test_a_foreign_profile_is_set_aside(home: Path) -> None:
    """Another machine's file copied over ours."""
    other = replace(KEY, chip="Apple M1")
    save(known(), other)
    profile_path(KEY).write_bytes(profile_path(other).read_bytes())
    times = RoundTimes()
    is_known, warning = restore(times, KEY)
    assert not is_known and "written for something else" in str(warning) and not times.is_known()
    assert restore(times, KEY) == Found(False, None)


def test_impossible_times_are_set_aside(home: Path) -> None:
    save(known(), KEY)
    path = profile_path(KEY)
    content = json.loads(path.read_bytes())
    content["value"]["widths"]["1"]["ratios"]["2"] = -4
    path.write_text(json.dumps(content))
    times = RoundTimes()
    is_known, warning = restore(times, KEY)
    assert not is_known and "kept aside" in str(warning) and not times.is_known() and not path.exists()


def test_shared_as_json() -> None:
    text, times = export(known(), KEY), RoundTimes()
    import_profile(text, times, KEY)
    assert times.ratio(2) == pytest.approx(1.5, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.update(schema="other 2"), "the schema must be"),
        (lambda content: content.pop("times"), "has the fields schema, key and times"),
        (
            lambda content: content["key"].update(chip="Apple M1", mlx="0.31"),
            "another chip .Apple M1, here Apple M4 Pro., mlx .0.31, here 0.32.4.;",
        ),
        (lambda content: content.update(key=[]), "another place"),
        (
            lambda content: content["times"].update(
                widths={"1": {"plain_seconds": None, "ratios": {"2": "fast"}}}
            ),
            "cannot be used",
        ),
    ],
)
def test_what_is_no_profile_of_ours_is_refused(change, words: str) -> None:
    content = json.loads(export(known(), KEY))
    change(content)
    times = RoundTimes()
    with pytest.raises(ParameterError, match=words) as refused:
        import_profile(json.dumps(content), times, KEY)
    assert "tune --export" in str(refused.value) and not times.is_known()
    with pytest.raises(ParameterError, match="JSON"):
        import_profile("not json", times, KEY)
    with pytest.raises(ParameterError, match="at most 1 MB"):
        import_profile(" " * (2 << 20), times, KEY)


def test_the_key_of_a_pair() -> None:
    pair = load("demo")
    key = key_of(pair)
    assert key == key_of(pair) and key.kernels == "stock" and len(key.checkpoint) == 16
    assert key.quantisation.count(",") == 2 and key.mlx != "unknown"
    assert key_of(load("demo", drafter=None)).checkpoint != key.checkpoint
