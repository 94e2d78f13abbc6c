"""A model on the hub -> its files in the Hugging Face cache: sizes first, then only what is needed, checked.

plan = plan_download("org/name")        # asks the hub; nothing is written
folder = fetch(plan, on_progress)       # disk checked, locked, resumed, compared with the hub's hashes
folder = cached_snapshot("org/name")    # later: opens no socket
"""

import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mtp.cache import (
    CachedModel,
    HubFile,
    cached_snapshot,
    has_size,
    is_complete,
    is_needed,
    list_cached,
    read_ref,
    remove_cached,
    repo_folder,
    verify,
    write_tree,
    write_whole,
)
from mlx_mtp.errors import CheckpointError, HubError, StorageError
from mlx_mtp.hub_errors import bad_token, may_pass, refusal, storage, unreachable, web_page
from mlx_mtp.model_files import read_json
from mlx_mtp.progress import OnProgress, silent
from mlx_mtp.repo_ids import COMMIT, SHA256, check_file_name, check_revision
from mlx_mtp.transfer import CallersError, Meter, Source, call, download_file, size_of

__all__ = [
    "CachedModel",
    "DownloadPlan",
    "PlannedFile",
    "cached_snapshot",
    "fetch",
    "list_cached",
    "plan_download",
    "remove_cached",
    "verify",
]

INDEX_ENDING = ".safetensors.index.json"
SPARE = 64 << 20  # bytes left free on the disk, for what else is being written
ASK_PAUSES = (1.0, 3.0)  # seconds before asking the hub again
LIBRARY = "mlx-mtp"


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One file to have; `begun` bytes of it are there from an interrupted download."""

    name: str
    size: int
    sha256: str | None
    is_cached: bool
    blob_id: str
    begun: int = 0


@dataclass(frozen=True, slots=True)
class DownloadPlan:
    """What `fetch` will do; `revision` is as asked, `commit` what it is now, `listing` the whole repository."""

    repo_id: str
    revision: str
    commit: str
    files: tuple[PlannedFile, ...]
    folder: Path  # the repository's in the cache
    endpoint: str | None
    listing: tuple[HubFile, ...]

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def missing_bytes(self) -> int:
        """What is still to come over the network."""
        return sum(file.size - file.begun for file in self.files if not file.is_cached)

    @property
    def snapshot(self) -> Path:
        return self.folder / "snapshots" / self.commit


def plan_download(
    repo_id: str,
    revision: str | None = None,
    *,
    endpoint: str | None = None,
    cache_dir: Path | None = None,
    token: str | None = None,
) -> DownloadPlan:
    """Ask the hub what a model consists of and compare with the cache; writes nothing.

    revision: a branch, tag or commit, None for the default branch. Raises HubError where the hub cannot be reached or
    has no such model, CheckpointError where it has none that can be used here.
    """
    folder = repo_folder(repo_id, cache_dir)
    revision = check_revision(revision or "main")
    endpoint = endpoint.rstrip("/") if endpoint else None
    info = ask_hub(repo_id, revision, endpoint, token)
    commit = info.sha
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise web_page(repo_id, "its description")
    if COMMIT.fullmatch(revision) and commit != revision:
        raise HubError(
            f"{repo_id}: revision {revision} was asked for and the hub answered with {commit}; try again later"
        )
    listing = tuple(listed_file(sibling, repo_id) for sibling in info.siblings or ())
    needed = [file for file in listing if is_needed(file.name)]
    check_usable(repo_id, needed, listing)
    with storage(folder):
        files = tuple(planned(file, folder, commit) for file in needed)
    return DownloadPlan(repo_id, revision, commit, files, folder, endpoint, listing)


def ask_hub(repo_id: str, revision: str, endpoint: str | None, token: str | None) -> Any:
    """huggingface_hub's ModelInfo with sizes and hashes, tried a few times."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    from mlx_mtp import __version__

    api = HfApi(endpoint=endpoint, token=token, library_name=LIBRARY, library_version=__version__)
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    for pause in (*ASK_PAUSES, None):
        try:
            return api.model_info(repo_id, revision=revision, files_metadata=True, timeout=timeout)
        except (HTTPError, OfflineModeIsEnabled) as error:
            if not may_pass(error):
                raise refusal(error, repo_id, revision) from None
            if pause is None:
                raise unreachable(error, repo_id) from None
            time.sleep(pause)
        except UnicodeEncodeError:
            raise bad_token(repo_id) from None
        except (ValueError, TypeError, KeyError, AttributeError):  # not JSON, or not a model's description
            raise web_page(repo_id, "its description") from None
    raise AssertionError("the last attempt returns or raises")


def listed_file(sibling: Any, repo_id: str) -> HubFile:
    """One entry of the hub's listing, each field checked, since names and hashes become paths."""
    name = check_file_name(str(sibling.rfilename), repo_id)
    sha256 = sibling.lfs.sha256 if sibling.lfs is not None else None
    is_valid = (
        type(sibling.size) is int
        and sibling.size >= 0
        and isinstance(sibling.blob_id, str)
        and COMMIT.fullmatch(sibling.blob_id)
        and (sha256 is None or (isinstance(sha256, str) and SHA256.fullmatch(sha256)))
    )
    if not is_valid:
        raise HubError(f"{repo_id}: the hub gives no valid size and hash for {name}; try again later")
    return HubFile(name, sibling.size, sibling.blob_id, sha256)


def check_usable(repo_id: str, needed: Iterable[HubFile], listing: Iterable[HubFile]) -> None:
    """Refuse what could not be loaded before anything is fetched."""
    names = {file.name for file in needed}
    if "config.json" not in names:
        raise CheckpointError(
            f"{repo_id}: has no config.json, so it is no model that can be loaded here; "
            "give one in safetensors or MLX format"
        )
    if not any(name.endswith(".safetensors") for name in names):
        others = [
            file.name for file in listing if file.name.endswith((".bin", ".gguf", ".pt", ".pth", ".npz"))
        ]
        got = f"got only {', '.join(others[:3])}" if others else "got none"
        raise CheckpointError(
            f"{repo_id}: weights must be .safetensors files, {got}; choose a version with safetensors"
        )


def planned(file: HubFile, folder: Path, commit: str) -> PlannedFile:
    is_cached = has_size(folder / "snapshots" / commit / file.name, file.size)
    is_cached = is_cached or has_size(folder / "blobs" / file.blob, file.size)
    begun = 0 if is_cached else min(size_of(folder / "blobs" / f"{file.blob}.incomplete"), file.size)
    return PlannedFile(file.name, file.size, file.sha256, is_cached, file.blob_id, begun)


def fetch(
    plan: DownloadPlan,
    on_progress: OnProgress = silent,
    *,
    token: str | None = None,
    before_weights: Callable[[Path], None] = lambda snapshot: None,
) -> Path:
    """Carry out a plan -> the snapshot's folder, complete and compared with the hub's hashes.

    Progress counts bytes of all the model's files, those already there included. Interrupted, it goes on from the same
    byte next time; another process that fetches the same file is waited for. `before_weights` sees the folder once
    the configuration is there, and may raise to spare the rest. Raises HubError, StorageError.
    """
    needed = [HubFile(file.name, file.size, file.blob_id, file.sha256) for file in plan.files]
    try:
        with storage(plan.folder):
            missing = [file for file in needed if not has_size(plan.snapshot / file.name, file.size)]
            if missing:
                check_disk(plan, missing)
                fetch_missing(plan, missing, on_progress, token, before_weights)
            if not COMMIT.fullmatch(plan.revision) and read_ref(plan.folder, plan.revision) != plan.commit:
                write_whole(plan.folder / "refs" / plan.revision, plan.commit)
    except CallersError as callers:
        raise callers.error from None
    if not is_complete(plan.folder, plan.commit):
        raise HubError(f"{plan.repo_id}: files vanished from {plan.snapshot} during the download; try again")
    return plan.snapshot


def check_disk(plan: DownloadPlan, missing: Iterable[HubFile]) -> None:
    """Refuse a download that the disk has no room for, before its first byte."""
    blobs = plan.folder / "blobs"
    coming = sum(
        max(0, file.size - size_of(blobs / f"{file.blob}.incomplete"))
        for file in missing
        if not has_size(blobs / file.blob, file.size)
    )
    disk = next(folder for folder in (plan.folder, *plan.folder.parents) if folder.is_dir())
    free = shutil.disk_usage(disk).free
    if coming + SPARE > free:
        raise StorageError(
            f"{plan.repo_id}: {size_text(coming)} are to be downloaded, and {disk} has {size_text(free)} free, "
            f"of which {size_text(SPARE)} should stay free; free some space "
            "(`mlx-mtp models list` and `rm`), or set HF_HOME to a folder on another disk"
        )


def size_text(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def fetch_missing(
    plan: DownloadPlan,
    missing: list[HubFile],
    on_progress: OnProgress,
    token: str | None,
    before_weights: Callable[[Path], None],
) -> None:
    """Small files first: licences, network pages and incomplete indexes show before gigabytes are spent."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, not in __all__

    from mlx_mtp import __version__

    blobs = plan.folder / "blobs"
    locks = plan.folder.parent / ".locks" / plan.folder.name
    for folder in (plan.snapshot, blobs, locks):
        folder.mkdir(parents=True, exist_ok=True)
    write_tree(plan.folder, plan.commit, plan.listing)
    headers = build_hf_headers(token=token, library_name=LIBRARY, library_version=__version__)
    absent = {file.name for file in missing}
    meter = Meter(
        sum(file.size for file in plan.files if file.name not in absent), plan.total_bytes, on_progress
    )
    is_told = False
    for file in sorted(missing, key=lambda file: (is_weights(file), file.name)):
        if is_weights(file) and not is_told:
            call(before_weights, plan.snapshot)
            is_told = True
        url = hf_hub_url(plan.repo_id, file.name, revision=plan.commit, endpoint=plan.endpoint)
        source = Source(plan.repo_id, plan.revision, url, file, headers)
        download_file(source, blobs, locks, plan.snapshot / file.name, meter)
        if file.name.endswith(INDEX_ENDING):
            check_shards(plan, file.name)


def is_weights(file: HubFile) -> bool:
    return file.name.endswith(".safetensors")


def check_shards(plan: DownloadPlan, index_name: str) -> None:
    """Refuse a repository that lacks a shard, or names one elsewhere, before the others are fetched."""
    index = read_json(plan.snapshot / index_name)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    named = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    listed = {file.name for file in plan.files}
    lacking = [name for name in named if name not in listed]
    if lacking:
        raise CheckpointError(
            f"{plan.repo_id}: {index_name} names {len(named)} files of weights and the repository lacks "
            f"{len(lacking)} of them ({', '.join(map(repr, lacking[:3]))}); use another revision or model"
        )
