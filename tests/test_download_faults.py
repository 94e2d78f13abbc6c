"""Networks, hubs and disks that fail in a download: each fault has its message, and nothing broken counts as cached."""

import errno
import os
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hub_cases import CONFIG, REPO, SHARDS, SIZE, WEIGHTS, partials, refusal, sharded, small_hub
from hub_stand_in import PAGE, TOKEN, HubStandIn
from mlx_mtp import transfer
from mlx_mtp.download import cached_snapshot, fetch, list_cached, plan_download, remove_cached, verify
from mlx_mtp.errors import CheckpointError, HubError, StorageError
from mlx_mtp.progress import Progress

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubStandIn]:
    with small_hub(tmp_path) as hub:
        yield hub


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


@pytest.mark.parametrize("fault", ["refuse_range", "ignore_range"])
def test_a_hub_without_ranges_that_always_cuts_is_given_up(hub: HubStandIn, fault: str) -> None:
    hub.push(REPO, {"config.json": CONFIG, WEIGHTS: b"w" * (3 << 20)})
    hub.faults.cut_after, hub.faults.cuts = 2 << 20, 1000
    setattr(hub.faults, fault, True)
    assert "check the connection and try again" in refusal()
    assert hub.sent < 20 << 20
    hub.faults.cuts = 0
    assert verify(fetch(plan_download(REPO))) == 2


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
    is_file, stat = Path.is_file, Path.stat

    def check(path: Path) -> None:
        if REPO.split("/")[1] in str(path):
            raise PermissionError(errno.EACCES, "Permission denied")

    def forbidden_is_file(path: Path, **options: Any) -> bool:
        check(path)
        return is_file(path, **options)

    def forbidden_stat(path: Path, **options: Any) -> os.stat_result:
        check(path)
        return stat(path, **options)

    for name, forbidden, calls in (  # as root, which tests may be, no real folder is forbidden
        ("is_file", forbidden_is_file, (cached_snapshot, remove_cached)),
        ("stat", forbidden_stat, (plan_download,)),
    ):
        with monkeypatch.context() as disk:
            disk.setattr(Path, name, forbidden)
            for call in calls:
                with pytest.raises(StorageError, match=r"Permission denied.*check who owns it"):
                    call(REPO)
    with monkeypatch.context() as disk:
        disk.setattr(Path, "is_file", forbidden_is_file)
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
