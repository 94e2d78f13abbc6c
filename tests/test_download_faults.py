"""Downloads that go wrong: each fault has its message, and nothing broken is ever taken for a model."""

import errno
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub_stand_in import PAGE, TOKEN, HubStandIn
from mlx_mtp import download as downloads
from mlx_mtp import transfer
from mlx_mtp.download import cached_snapshot, fetch, list_cached, plan_download, remove_cached, verify
from mlx_mtp.errors import CheckpointError, HubError, MtpError, ParameterError, StorageError
from mlx_mtp.progress import Progress
from mlx_mtp.repo_ids import check_file_name, check_repo_id, check_revision

REPO = "org/model"
WEIGHTS = "model.safetensors"
CONFIG = b'{"model_type": "gemma4"}'
SIZE = 500_000
INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PAUSES", (0.0,) * len(transfer.PAUSES))
    monkeypatch.setattr(downloads, "ASK_PAUSES", (0.0,) * len(downloads.ASK_PAUSES))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubStandIn]:
    with HubStandIn({REPO: {"config.json": CONFIG, WEIGHTS: bytes(range(250)) * (SIZE // 250)}}) as hub:
        with hub.in_process(tmp_path):
            yield hub


def refusal(kind: type[MtpError] = HubError, **options: Any) -> str:
    """The message with which planning or fetching REPO is refused; nothing of it counts as cached afterwards."""
    with pytest.raises(kind) as refused:
        fetch(plan_download(REPO, **options), token=options.get("token"))
    assert type(refused.value) is kind
    assert cached_snapshot(REPO) is None
    return str(refused.value)


def partials(home: Path) -> list[int]:
    """The sizes of the files in blobs/ that are unfinished."""
    return [path.stat().st_size for path in home.glob("hub/models--*/blobs/*.incomplete")]


def sharded(names: list[str]) -> dict[str, bytes]:
    index = {"weight_map": {f"layer.{number}": name for number, name in enumerate(SHARDS)}}
    files = {"config.json": CONFIG, INDEX: json.dumps(index).encode()}
    return files | {name: name.encode() * 400 for name in names}


def test_a_connection_that_never_holds_is_given_up(hub: HubStandIn, tmp_path: Path) -> None:
    hub.faults.cut_after, hub.faults.cuts = 1000, 1000
    message = refusal()
    attempts = len(transfer.PAUSES) + 1
    assert len([request for request in hub.downloads(WEIGHTS) if "/cdn/" in request.path]) == attempts
    assert f"stopped at {1000 * attempts} of {SIZE} bytes" in message
    assert message.endswith("try again: the next attempt goes on from there")
    assert partials(tmp_path) == [1000 * attempts]
    hub.faults.cuts = 0
    hub.requests.clear()
    assert verify(fetch(plan_download(REPO))) == 2
    assert hub.downloads(WEIGHTS)[0].range == f"bytes={1000 * attempts}-"


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    with HubStandIn() as closed:
        pass
    with closed.in_process(tmp_path):
        message = refusal()
    assert f"cannot reach {closed.endpoint}" in message and "models in the cache work without it" in message


def test_a_hub_that_vanishes_before_the_weights(hub: HubStandIn, tmp_path: Path) -> None:
    plan = plan_download(REPO)
    hub.faults.statuses = [503] * 50
    with pytest.raises(HubError, match="503"):
        fetch(plan)
    hub.faults.statuses = [503, 429, 500]
    assert verify(fetch(plan)) == 2


def test_busy_answers_are_tried_again_and_then_refused(hub: HubStandIn) -> None:
    hub.faults.statuses = [503, 429]
    assert plan_download(REPO).total_bytes == SIZE + len(CONFIG)
    hub.faults.statuses = [503] * 50
    assert "cannot reach" in refusal()
    hub.faults.statuses = [418]
    assert "the hub answered" in refusal()


def test_offline_mode_is_explained(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refusal()
    assert "HF_HUB_OFFLINE" in message and "unset it to download" in message
    assert hub.requests == []


@pytest.mark.parametrize("token", [None, "hf_not_accepted"])
def test_gated_links_to_the_licence_page(hub: HubStandIn, token: str | None, tmp_path: Path) -> None:
    hub.repos[REPO].is_gated = True
    message = refusal(token=token)
    assert f"{hub.endpoint}/{REPO}" in message and "hf auth login" in message and "licence" in message
    assert hub.sent == 0
    assert verify(fetch(plan_download(REPO, token=TOKEN), token=TOKEN)) == 2


def test_a_wrong_token(hub: HubStandIn) -> None:
    message = refusal(token="hf_expired")
    assert "refused the access token" in message and "hf_expired" not in message


def test_a_token_that_cannot_be_sent(hub: HubStandIn) -> None:
    message = refusal(token="hf_schlüssel")
    assert "access token" in message and "schl" not in message


@pytest.mark.parametrize("token", [None, TOKEN])
def test_a_missing_repository(hub: HubStandIn, token: str | None) -> None:
    del hub.repos[REPO]
    message = refusal(token=token)
    assert f"{REPO}: there is no such model" in message and "check the spelling" in message


def test_a_wrong_revision(hub: HubStandIn) -> None:
    message = refusal(revision="v2")
    assert "no revision 'v2'" in message and f"{hub.endpoint}/{REPO}/tree/main" in message
    assert "no revision" in refusal(revision="0" * 40)


def test_web_pages_instead_of_the_hub(hub: HubStandIn, tmp_path: Path) -> None:
    hub.faults.web_pages = {"api"}
    assert "log in to the network" in refusal()
    hub.faults.web_pages = {"config.json"}
    assert "config.json came as a web page" in refusal()
    hub.faults.web_pages = {WEIGHTS}
    assert f"{WEIGHTS} came as a web page" in refusal()
    hub.faults.web_pages = set()
    hub.faults.replaced = {WEIGHTS: PAGE.ljust(SIZE)}  # of the right size and type
    assert f"{WEIGHTS} came as a web page" in refusal()
    assert sum(partials(tmp_path)) == 0
    hub.faults.replaced = {}
    assert verify(fetch(plan_download(REPO))) == 2


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_wrong_content_is_removed_and_refused(hub: HubStandIn, tmp_path: Path, name: str) -> None:
    content = bytearray(hub.repos[REPO].commits[hub.repos[REPO].refs["main"]][name].content)
    content[len(content) // 2] ^= 1
    hub.faults.replaced = {name: bytes(content)}
    assert f"{name} does not match the checksum" in refusal()
    assert partials(tmp_path) == []
    hub.faults.replaced = {}
    assert verify(fetch(plan_download(REPO))) == 2


def test_more_bytes_than_listed_are_not_stored(hub: HubStandIn, tmp_path: Path) -> None:
    hub.faults.replaced = {WEIGHTS: b"w" * (4 * SIZE)}
    assert f"must have {SIZE} bytes" in refusal()
    assert all(size <= SIZE for size in partials(tmp_path))


def test_fewer_bytes_than_listed(hub: HubStandIn, tmp_path: Path) -> None:
    hub.faults.replaced = {WEIGHTS: b"w" * (SIZE // 2)}
    assert f"of {SIZE} bytes" in refusal()


@pytest.mark.parametrize("damage", ["garbled", "too long", "whole"])
def test_an_unfinished_file_that_is_damaged_is_fetched_anew(
    hub: HubStandIn, tmp_path: Path, damage: str
) -> None:
    hub.faults.cut_after, hub.faults.cuts = 10_000, 1000
    refusal()
    (partial,) = tmp_path.glob("hub/models--*/blobs/*.incomplete")
    size = {"garbled": 60_000, "too long": SIZE + 1, "whole": SIZE}[damage]
    partial.write_bytes(b"\0" * size)
    hub.faults.cuts = 0
    reports: list[Progress] = []
    assert verify(fetch(plan_download(REPO), reports.append)) == 2
    assert reports[-1].done == reports[-1].total == SIZE + len(CONFIG)


def test_a_shard_that_the_repository_lacks(hub: HubStandIn) -> None:
    hub.push(REPO, sharded(SHARDS[:2]))
    message = refusal(CheckpointError)
    assert SHARDS[2] in message and "lacks 1 of them" in message
    assert not [request for request in hub.requests if "/cdn/" in request.path], "no weights were fetched"


def test_a_shard_that_is_listed_and_not_there(hub: HubStandIn) -> None:
    hub.push(REPO, sharded(SHARDS))
    hub.faults.unlisted_404 = {SHARDS[1]}
    assert "lists a file and does not have it" in refusal()
    hub.faults.unlisted_404 = set()
    assert verify(fetch(plan_download(REPO))) == 5


def test_repositories_without_usable_weights(hub: HubStandIn) -> None:
    hub.push(REPO, {"config.json": CONFIG, "pytorch_model.bin": b"pickle"})
    assert "got only pytorch_model.bin" in refusal(CheckpointError)
    hub.push(REPO, {"config.json": CONFIG})
    assert "got none" in refusal(CheckpointError)
    hub.push(REPO, {WEIGHTS: b"w"})
    assert "no config.json" in refusal(CheckpointError)
    assert hub.sent == 0


def test_a_full_disk_is_refused_before_the_first_byte(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(10**9, 10**9 - 1000, 1000))
    hub.push(REPO, {"config.json": CONFIG, WEIGHTS: b"w" * 12_000_000})
    message = refusal(StorageError)
    assert "12.0 MB are to be downloaded" in message and "0.0 MB free" in message and "HF_HOME" in message
    assert not hub.downloads() and not (tmp_path / "hub").exists()


def test_what_is_there_already_needs_no_room(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch(plan_download(REPO))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, 0))
    assert fetch(plan_download(REPO)) == folder


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_becomes_full_keeps_no_part(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)  # where a file system that allocates late tells
        message = refusal(StorageError)
    assert "the disk became full" in message and "HF_HOME" in message
    assert partials(tmp_path) == []
    assert verify(fetch(plan_download(REPO))) == 2


def test_a_cache_that_cannot_be_written(hub: HubStandIn, tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("a file where the folder should be")
    message = refusal(StorageError)
    assert "cannot be read or written" in message and "HF_HOME" in message


def test_a_cache_of_another_user(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch(plan_download(REPO))
    is_file = Path.is_file

    def forbidden(path: Path, **options: Any) -> bool:
        if REPO.split("/")[1] in str(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return is_file(path, **options)

    monkeypatch.setattr(
        Path, "is_file", forbidden
    )  # as root, which tests may be, no real folder is forbidden
    for call in (cached_snapshot, plan_download, remove_cached):
        with pytest.raises(StorageError, match=r"Permission denied.*check who owns it"):
            call(REPO)
    with pytest.raises(StorageError, match="Permission denied"):
        list_cached()
    assert folder.is_dir()


def test_a_read_only_cache_still_serves(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch(plan_download(REPO))

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("mkdir", "replace", "symlink", "unlink"):
        monkeypatch.setattr(os, name, refuse)
    assert cached_snapshot(REPO) == folder
    assert fetch(plan_download(REPO)) == folder
    hub.push(REPO, {"config.json": CONFIG, WEIGHTS: b"newer"})
    with pytest.raises(StorageError, match="Read-only file system"):
        fetch(plan_download(REPO))


def test_a_caller_that_stops_keeps_what_came(hub: HubStandIn, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if (progress.done or 0) > len(CONFIG):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(plan_download(REPO), stop)
    assert cached_snapshot(REPO) is None
    (kept,) = partials(tmp_path)
    assert 0 < kept <= SIZE
    assert plan_download(REPO).missing_bytes == SIZE - kept
    assert verify(fetch(plan_download(REPO))) == 2


def test_an_error_of_the_callers_own_comes_through(hub: HubStandIn) -> None:
    def closed(progress: Progress) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        fetch(plan_download(REPO), closed)
    with pytest.raises(BrokenPipeError):
        fetch(plan_download(REPO), before_weights=closed)  # type: ignore[arg-type]
    assert not [request for request in hub.requests if "/cdn/" in request.path], "no weights were asked for"


HOSTILE_NAMES = [
    "../model.safetensors",
    "/etc/model.safetensors",
    "a/../../x.safetensors",
    "..\\x.safetensors",
    "C:x.json",
]
HOSTILE_NAMES += [
    "a\0b.safetensors",
    "\x1b[2J.safetensors",
    "",
    ".",
    "a//b.json",
    "\u202egnp.json",
    "x" * 300 + ".json",
]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_names_that_leave_the_folder_are_refused(hub: HubStandIn, tmp_path: Path, name: str) -> None:
    entry = {"rfilename": name, "size": 5, "blobId": "0" * 40}
    config = {"rfilename": "config.json", "size": 2, "blobId": "1" * 40}
    hub.faults.listing = {"siblings": [config, entry]}
    message = refusal()
    assert "every file must lie inside the model's folder" in message
    assert message.isprintable()
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize(
    "change",
    [
        {"size": -1},
        {"size": None},
        {"size": "9"},
        {"size": True},
        {"blobId": "../../../../etc/passwd"},
        {"blobId": None},
        {"lfs": {"sha256": "../x", "size": 5, "pointerSize": 134}},
        {"lfs": {"sha256": 5, "size": 5, "pointerSize": 134}},
    ],
)
def test_sizes_and_hashes_that_make_no_sense_are_refused(hub: HubStandIn, change: dict[str, Any]) -> None:
    entry = {"rfilename": WEIGHTS, "size": 5, "blobId": "0" * 40}
    config = {"rfilename": "config.json", "size": 2, "blobId": "1" * 40}
    hub.faults.listing = {"siblings": [config, entry | change]}
    assert "no valid size and hash" in refusal()


@pytest.mark.parametrize(
    "listing",
    [
        {"sha": "../../x"},
        {"sha": None},
        {"siblings": None},
        {"siblings": 5},
        {"siblings": [5]},
        {"siblings": [{}]},
    ],
)
def test_descriptions_that_are_none_are_refused(hub: HubStandIn, listing: dict[str, Any]) -> None:
    hub.faults.listing = listing
    with pytest.raises((HubError, CheckpointError)):
        plan_download(REPO)


def test_another_commit_than_the_pinned_one_is_refused(hub: HubStandIn) -> None:
    commit = hub.repos[REPO].refs["main"]
    hub.faults.listing = {"sha": "a" * 40}
    with pytest.raises(HubError, match="answered with aaaa"):
        plan_download(REPO, commit)


def test_a_link_that_leaves_the_cache_is_refused(hub: HubStandIn, tmp_path: Path) -> None:
    folder = fetch(plan_download(REPO))
    outside = tmp_path / "key"
    outside.write_bytes(b"w" * SIZE)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(outside)
    with pytest.raises(CheckpointError, match="must lie in its folder"):
        cached_snapshot(REPO)
    assert [model.is_complete for model in list_cached()] == [False]
    assert remove_cached(REPO) > 0
    assert outside.stat().st_size == SIZE


@pytest.mark.parametrize("keeps_listing", [True, False])
@pytest.mark.parametrize("name", ["config.json", SHARDS[1]])
@pytest.mark.parametrize("damage", ["link", "blob", "empty"])
def test_an_incomplete_snapshot_is_never_complete(
    hub: HubStandIn, damage: str, name: str, keeps_listing: bool
) -> None:
    hub.push(REPO, sharded(SHARDS))
    folder = fetch(plan_download(REPO))
    if not keeps_listing:
        shutil.rmtree(folder.parent.parent / "trees")
    assert cached_snapshot(REPO) == folder
    if damage == "link":
        (folder / name).unlink()
    elif damage == "blob":
        (folder / name).resolve().unlink()
    else:
        (folder / name).resolve().write_bytes(b"")
    if damage == "empty" and name == "config.json" and not keeps_listing:
        return  # found when it is read: nothing says what size it should have
    assert cached_snapshot(REPO) is None
    assert not list_cached()[0].is_complete
    repaired = fetch(plan_download(REPO))
    assert verify(repaired) == 5
    assert cached_snapshot(REPO) == repaired


def test_verify_finds_one_changed_bit(hub: HubStandIn) -> None:
    folder = fetch(plan_download(REPO))
    blob = (folder / WEIGHTS).resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        verify(folder)
    blob.unlink()
    assert verify(fetch(plan_download(REPO))) == 2


def test_verify_says_when_it_knows_no_checksums(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(CONFIG)
    with pytest.raises(CheckpointError, match="no files with known checksums"):
        verify(tmp_path)


def test_a_damaged_listing_or_ref_is_not_trusted(hub: HubStandIn) -> None:
    folder = fetch(plan_download(REPO))
    tree = folder.parent.parent / "trees" / f"{folder.name}.json"
    for text in ("", "[]", '{"format_version": 1, "files": {"x": 5}}', '{"format_version": 99}', "\udcff"):
        tree.write_bytes(text.encode(errors="surrogateescape"))
        assert cached_snapshot(REPO) == folder
    for text in ("../../elsewhere", "", "A" * 40, "\udcff"):
        (folder.parent.parent / "refs" / "main").write_bytes(text.encode(errors="surrogateescape"))
        assert cached_snapshot(REPO) is None
    assert list_cached()[0].commit == folder.name


def test_removing_what_is_not_there(hub: HubStandIn) -> None:
    with pytest.raises(CheckpointError, match="models list"):
        remove_cached(REPO)


def test_an_unfinished_download_can_be_listed_and_removed(hub: HubStandIn, tmp_path: Path) -> None:
    hub.faults.cut_after, hub.faults.cuts = 50_000, 1000
    refusal()
    (kept,) = partials(tmp_path)
    (model,) = list_cached()
    assert not model.is_complete and model.bytes >= kept
    assert remove_cached(REPO) == model.bytes
    assert list_cached() == () and partials(tmp_path) == []


BAD_IDS = [
    "",
    "model",
    "a/b/c",
    "/abs/path",
    "../x",
    "a/..",
    "org/na me",
    " org/name",
    "org/name ",
    "org\\name",
    "./x",
]
BAD_IDS += [
    "org//name",
    "org/",
    "/name",
    "org/name\n",
    "org/na\0me",
    "~/name",
    "org/.name",
    "org/-n",
    "org/n--m",
    "org/x.git",
]
BAD_IDS += [
    "https://huggingface.co/org/name",
    "org/ｎame",
    "org/" + "n" * 100,
    "org/a..b",
    "C:\\models",
    "org/name?x=1",
    "%2e/x",
]


@pytest.mark.parametrize("repo_id", BAD_IDS)
def test_ids_are_checked_before_anything_is_asked(hub: HubStandIn, repo_id: str) -> None:
    for call in (plan_download, cached_snapshot, remove_cached):
        with pytest.raises(CheckpointError, match="organisation/name"):
            call(repo_id)
    assert hub.requests == []


@pytest.mark.parametrize(
    "revision", ["../x", "a..b", "/x", "x/", "a b", "a\\b", "-x", "x\n", "x" * 300, "@{1}", "a//b", "x.lock"]
)
def test_revisions_are_checked_before_anything_is_asked(hub: HubStandIn, revision: str) -> None:
    for call in (plan_download, cached_snapshot):
        with pytest.raises(ParameterError, match="a branch, a tag or a commit"):
            call(REPO, revision)
    assert hub.requests == []


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(st.sampled_from("ab./\\-~:%\0 \n"), max_size=12) | st.text(max_size=12))
def test_what_passes_the_checks_stays_below_its_folder(text: str) -> None:
    for check in (check_repo_id, check_revision, lambda name: check_file_name(name, REPO)):
        try:
            check(text)
        except MtpError:
            continue
        place = Path(os.path.normpath(Path("/cache/folder") / text))
        assert place.is_relative_to("/cache/folder") and place != Path("/cache/folder")
        assert text.isprintable() and "\\" not in text
