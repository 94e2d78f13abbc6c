"""Names, listings and cached files that must not be trusted: ids, hostile repositories, damaged caches."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub_cases import CONFIG, REPO, SHARDS, SIZE, WEIGHTS, partials, refusal, sharded, small_hub
from hub_stand_in import HubStandIn
from mlx_mtp.download import cached_snapshot, fetch, list_cached, plan_download, remove_cached, verify
from mlx_mtp.errors import CheckpointError, HubError, MtpError, ParameterError
from mlx_mtp.repo_ids import check_file_name, check_repo_id, check_revision


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubStandIn]:
    with small_hub(tmp_path) as hub:
        yield hub


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
