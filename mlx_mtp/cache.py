"""The Hugging Face cache on disk, read without a socket: which models are there, whole, and where they lie.

Layout (shared with every tool built on huggingface_hub), below models--ORGANISATION--NAME:
blobs/HASH holds a file's bytes, snapshots/COMMIT/NAME links to its blob, refs/BRANCH holds a commit, and
trees/COMMIT.json lists all files of a commit with their sizes and hashes.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import stat
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlx_mtp.errors import CheckpointError, MtpError
from mlx_mtp.hub_errors import storage
from mlx_mtp.model_files import own_file
from mlx_mtp.repo_ids import COMMIT, SHA256, check_repo_id, check_revision

NEEDED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    # Not read here, but mlx-lm takes a cached model without them for incomplete when offline; at most 5 MB.
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "processor_config.json",
    "preprocessor_config.json",
)
NEEDED_ENDINGS = (".safetensors", ".safetensors.index.json")
TREE_FORMAT = 1  # huggingface_hub's own number for the format of trees/COMMIT.json
READ_AT_ONCE = 1 << 20  # bytes


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a commit: `blob_id` is git's hash, `sha256` the content's where it is stored in LFS."""

    name: str
    size: int
    blob_id: str
    sha256: str | None

    @property
    def blob(self) -> str:
        """What its file in blobs/ is called, which is the hash of its content."""
        return self.sha256 or self.blob_id


@dataclass(frozen=True, slots=True)
class CachedModel:
    """One model in the cache; `bytes` is what removing it frees, `last_used` is in seconds since 1970."""

    repo_id: str
    commit: str
    bytes: int
    path: Path
    kind: Literal["target", "drafter", "other"]
    last_used: float
    is_complete: bool


def is_needed(name: str) -> bool:
    """Whether a file in a repository is used here: weights, configuration and tokenizer; never code or pickles."""
    return "/" not in name and (name in NEEDED or name.endswith(NEEDED_ENDINGS))


def hub_cache(cache_dir: Path | None = None) -> Path:
    """The cache's folder: as given, or as HF_HUB_CACHE and HF_HOME say."""
    if cache_dir is not None:
        return cache_dir
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def repo_folder(repo_id: str, cache_dir: Path | None = None) -> Path:
    return hub_cache(cache_dir) / f"models--{check_repo_id(repo_id).replace('/', '--')}"


def cached_snapshot(
    repo_id: str, revision: str | None = None, *, cache_dir: Path | None = None
) -> Path | None:
    """The folder of a model that is completely in the cache, or None; opens no socket.

    Raises CheckpointError where a file of it is a link that leaves the cache, StorageError where it cannot be read.
    """
    folder = repo_folder(repo_id, cache_dir)
    revision = check_revision(revision or "main")
    with storage(folder):
        commit = revision if COMMIT.fullmatch(revision) else read_ref(folder, revision)
        if commit is None or not is_complete(folder, commit):
            return None
    return folder / "snapshots" / commit


def read_ref(folder: Path, revision: str) -> str | None:
    """The commit that a branch or tag had when it was downloaded."""
    path = folder / "refs" / revision
    if not path.is_file():
        return None
    commit = path.read_text(encoding="ascii", errors="replace").strip()
    return commit if COMMIT.fullmatch(commit) else None


def is_complete(folder: Path, commit: str) -> bool:
    """Whether every needed file of a commit is in the cache at its full size; refuses links that leave the cache."""
    snapshot = folder / "snapshots" / commit
    if not (snapshot / "config.json").is_file():
        return False
    for path in snapshot.iterdir():
        if not path.is_dir():  # other tools fetch whole repositories
            own_file(snapshot, path.name)
    listed = read_tree(folder, commit)
    if listed is None:  # downloaded by something that keeps no listing
        return has_all_shards(snapshot)
    return all(has_size(snapshot / file.name, file.size) for file in listed if is_needed(file.name))


def file_size(path: Path) -> int | None:
    """Bytes of a file, None where there is none, asked once: another download may be moving it into place."""
    try:
        seen = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return seen.st_size if stat.S_ISREG(seen.st_mode) else None


def has_size(path: Path, size: int) -> bool:
    """Whether a file is there and that long."""
    return file_size(path) == size


def has_all_shards(snapshot: Path) -> bool:
    from mlx_mtp.headers import weight_files

    try:
        files, _ = weight_files(snapshot)
    except CheckpointError:
        return False
    return all(file.stat().st_size > 0 for file in files)


def read_tree(folder: Path, commit: str) -> list[HubFile] | None:
    """All files of a commit as listed when it was downloaded; None without a listing that can be read."""
    path = folder / "trees" / f"{commit}.json"
    try:
        tree = json.loads(path.read_bytes())
        if tree["format_version"] != TREE_FORMAT:
            return None
        return [
            HubFile(str(name), int(entry["size"]), str(entry["blob_id"]), entry.get("lfs_sha256"))
            for name, entry in tree["files"].items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_tree(folder: Path, commit: str, files: Iterable[HubFile]) -> None:
    entries: dict[str, dict[str, Any]] = {}
    for file in files:
        entries[file.name] = {"size": file.size, "blob_id": file.blob_id}
        if file.sha256 is not None:
            entries[file.name] |= {"lfs_sha256": file.sha256, "lfs_size": file.size}
    write_whole(
        folder / "trees" / f"{commit}.json", json.dumps({"format_version": TREE_FORMAT, "files": entries})
    )


def write_whole(path: Path, text: str) -> None:
    """The file with this text, or as it was before: never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def content_hash(path: Path, blob: str) -> str:
    """A file's hash of the kind that `blob` is: sha256 (64 digits), or git's (40 digits)."""
    if SHA256.fullmatch(blob):
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as stream:
        while piece := stream.read(READ_AT_ONCE):
            digest.update(piece)
    return digest.hexdigest()


def verify(snapshot: Path) -> int:
    """Read every file of a cached snapshot and compare its content with its hash -> how many were compared.

    Needs no network: the hashes are those that the hub gave when the files were downloaded. Raises
    CheckpointError naming the first file that differs, and where the folder is no snapshot.
    """
    folder, commit = snapshot.parent.parent, snapshot.name
    listed = {file.name: file.blob for file in read_tree(folder, commit) or ()}
    compared = 0
    for path in sorted(file for file in snapshot.iterdir() if file.is_file()):
        own_file(snapshot, path.name)
        blob = listed.get(path.name) or path.resolve().name
        if COMMIT.fullmatch(blob) or SHA256.fullmatch(blob):
            compared += 1
            if content_hash(path, blob) != blob:
                raise CheckpointError(
                    f"{path}: its content does not match its checksum, so it was damaged or changed after the "
                    f"download; remove {path.resolve()} and download the model again"
                )
    if not compared:
        raise CheckpointError(
            f"{snapshot}: has no files with known checksums; give the folder of a model in the hub's cache"
        )
    return compared


def list_cached(*, cache_dir: Path | None = None) -> tuple[CachedModel, ...]:
    """Every model in the cache, by id; opens no socket."""
    found = []
    with storage(hub_cache(cache_dir)):
        for folder in sorted(hub_cache(cache_dir).glob("models--*--*")):
            organisation, _, name = folder.name.removeprefix("models--").partition("--")
            commit = newest_commit(folder)
            if commit is not None:
                found.append(describe(f"{organisation}/{name}", folder, commit))
    return tuple(found)


def newest_commit(folder: Path) -> str | None:
    """What refs/main names if that is there, else the snapshot changed last."""
    commits = [path for path in folder.glob("snapshots/*") if path.is_dir() and COMMIT.fullmatch(path.name)]
    main = read_ref(folder, "main")
    if main is not None and main in {path.name for path in commits}:
        return main
    return max(commits, key=lambda path: path.stat().st_mtime).name if commits else None


def describe(repo_id: str, folder: Path, commit: str) -> CachedModel:
    snapshot = folder / "snapshots" / commit
    try:
        complete = is_complete(folder, commit)
    except MtpError:  # a link that leaves the cache: listed so that it can be removed
        complete = False
    stats = [path.stat() for path in snapshot.iterdir() if path.is_file()]
    used = max((one.st_atime for one in stats), default=snapshot.stat().st_mtime)
    return CachedModel(repo_id, commit, bytes_of(folder), snapshot, model_kind(snapshot), used, complete)


def bytes_of(folder: Path) -> int:
    """Bytes that a repository takes in the cache: its files, and the blobs that it links to in the shared store."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files if not path.is_symlink() or path.parent.name == "blobs")


def model_kind(snapshot: Path) -> Literal["target", "drafter", "other"]:
    """What a model is by the type that its config.json states."""
    try:
        config = json.loads((snapshot / "config.json").read_bytes())
        model_type = str(config["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return "other"
    if not model_type.startswith("gemma4"):
        return "other"
    return "drafter" if model_type.endswith("assistant") else "target"


def remove_cached(repo_id: str, *, cache_dir: Path | None = None) -> int:
    """Remove a model with all its revisions and unfinished files from the cache -> bytes freed."""
    folder = repo_folder(repo_id, cache_dir)
    if not folder.is_dir():
        raise CheckpointError(f"{repo_id}: is not in the cache; `mlx-mtp models list` shows what is")
    from huggingface_hub import scan_cache_dir

    with storage(folder):
        freed = bytes_of(folder)
        cache = scan_cache_dir(folder.parent)
        known = [repo for repo in cache.repos if repo.repo_path.resolve() == folder.resolve()]
        for repo in known:  # the library knows which blobs of the shared store other repositories use
            # It deletes a commit wherever it finds it, and a duplicated repository has the commits of its original.
            alone = dataclasses.replace(cache, repos=frozenset({repo}))
            alone.delete_revisions(*(revision.commit_hash for revision in repo.revisions)).execute()
        if folder.exists():  # too damaged for the library, or unfinished
            shutil.rmtree(folder)
    return freed
