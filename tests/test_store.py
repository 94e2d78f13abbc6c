"""Our own files: whole or not at all, the owner's alone, and never a reason to stop (faults 67, 72 and 75)."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from mlx_mtp import store
from mlx_mtp.errors import StorageError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, and a program that has not warned of anything yet."""
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(store, "_spoken_of", set())
    return tmp_path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_written_is_read_again_by_its_owner_alone(home: Path) -> None:
    path = store.data_folder() / "deep" / "record.json"
    value = {"words": ["ä", "\ud800"], "none": None, "number": 1.5}
    old = os.umask(0)
    try:
        assert store.write_json_file(path, value, key=("model", 4)) is None
    finally:
        os.umask(old)
    assert store.read_json_file(path, key=("model", 4)) == (value, None)
    assert mode(path) == 0o600 and mode(path.parent) == mode(store.data_folder()) == 0o700
    assert os.listdir(path.parent) == ["record.json"]
    assert home in path.parents


def test_a_file_that_is_not_there_is_nothing() -> None:
    assert store.read_json_file(store.data_folder() / "none.json") == (None, None)
    assert store.last_model() == (None, None) and store.everything_kept() == []


def envelope(**changes: object) -> bytes:
    return json.dumps({"mlx_mtp": store.VERSION, "key": None, "value": 1, **changes}).encode()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not JSON"),
        (envelope()[:-1], "cut short"),
        (b"\x00\xff\xfe", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b"[]", "not a file of this program"),
        (b'{"mlx_mtp": 1}', "not a file of this program"),
        (envelope(more=1), "not a file of this program"),
        (envelope(mlx_mtp=store.VERSION + 1), "of another version"),
        (envelope(mlx_mtp=True), "of another version"),
        (envelope(mlx_mtp="1"), "of another version"),
    ],
)
def test_damaged_and_foreign_files_are_kept_aside(content: bytes, why: str) -> None:
    """Fault 75."""
    path = store.make_folder(store.data_folder()) / "record.json"
    path.write_bytes(content)
    value, warning = store.read_json_file(path)
    assert value is None and warning is not None and why in warning and "\n" not in warning
    assert not path.exists() and path.with_name("record.json.corrupt").read_bytes() == content
    assert store.read_json_file(path) == (None, None)
    assert store.write_json_file(path, 2) is None and store.read_json_file(path).value == 2


def test_a_file_too_large_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    path = store.make_folder(store.data_folder()) / "record.json"
    monkeypatch.setattr(store, "LARGEST_BYTES", 10)
    path.write_bytes(envelope())
    assert "larger than" in str(store.read_json_file(path).warning)


@pytest.mark.parametrize("key", [None, "other", ["model", 8], {"model": 4}])
def test_a_record_of_another_model_is_not_used_and_stays(key: object) -> None:
    """Fault 75: refused by key."""
    path = store.data_folder() / "record.json"
    store.write_json_file(path, "theirs", key=("model", 4))
    value, warning = store.read_json_file(path, key=key)
    assert value is None and "something else" in str(warning)
    assert store.read_json_file(path, key=("model", 4)).value == "theirs"


def test_what_was_there_stays_until_the_new_file_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 67: the disk fills up in the middle."""
    path = store.data_folder() / "record.json"
    store.write_json_file(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert "free some disk space" in str(store.write_json_file(path, "new"))
    monkeypatch.undo()
    assert store.read_json_file(path).value == "old" and os.listdir(path.parent) == ["record.json"]


def test_the_file_is_on_disk_before_it_takes_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (steps.append("sync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *names: (steps.append("rename"), replace(*names)))
    store.write_json_file(store.data_folder() / "record.json", 1)
    assert steps == ["sync", "rename", "sync"]


@pytest.mark.parametrize("place", ["a file", "a link to nothing", "/proc"])
def test_a_home_that_cannot_be_written_is_said_once(
    home: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 72; works for root too, who may write where others may not."""
    if place == "a file":
        (home / ".local").write_text("")
    elif place == "a link to nothing":
        (home / ".local").symlink_to(home / "gone" / "gone")
    else:
        monkeypatch.setattr(store.platformdirs, "user_data_path", lambda *_, **__: Path("/proc/none/mlx-mtp"))
    first, second = store.remember_model("demo"), store.remember_model("demo")
    assert first is not None and first.startswith("not kept for the next run: ") and "; " in first
    assert second is None
    assert store.last_model().value is None and store.everything_kept() == []


@pytest.mark.parametrize("of_old_platformdirs", [False, True])
def test_no_home_at_all(of_old_platformdirs: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fault 72: neither HOME nor an entry for the user; no folder named ~ appears here."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    if of_old_platformdirs:
        for name in ("user_data_path", "user_cache_path"):
            monkeypatch.setattr(store.platformdirs, name, lambda *_, **__: Path("~/.local/share/mlx-mtp"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match="set HOME to a folder"):
        store.data_folder()
    assert "set HOME" in str(store.remember_model("demo")) and store.remember_model("demo") is None
    assert store.last_model() == (None, None) and store.everything_kept() == []
    assert os.listdir(tmp_path) == []


def test_the_model_used_last() -> None:
    assert store.remember_model("e4b:4bit") is None and store.last_model() == ("e4b:4bit", None)
    assert store.remember_model("./folder") is None and store.last_model() == ("./folder", None)
    for foreign in (7, "", ["demo"], "x" * 1000):
        store.write_json_file(store.data_folder() / store.LAST_MODEL, foreign)
        name, warning = store.last_model()
        assert name is None and "not the name of a model" in str(warning)


def test_everything_kept_is_listed_with_its_size(tmp_path: Path) -> None:
    store.remember_model("demo")
    store.write_bytes(store.cache_folder() / "quantized" / "a" / "model.safetensors", bytes(1000))
    store.write_bytes(store.cache_folder() / "quantized" / "b", bytes(24))
    (store.data_folder() / "other.json.corrupt").write_bytes(b"123")
    (store.cache_folder() / "quantized" / "link").symlink_to("/dev/zero")
    kept = {item.path.name: item for item in store.everything_kept()}
    assert set(kept) == {"last-model.json", "quantized", "other.json.corrupt"}
    assert kept["quantized"].bytes == 1024 + len("/dev/zero")
    assert kept["other.json.corrupt"].bytes == 3 and "kept aside" in kept["other.json.corrupt"].what
    assert kept["last-model.json"].what == "the model used last"
