"""Repositories as the hub knows them: commits of files, their hashes, and what its JSON says of each."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LFS = (".safetensors", ".bin", ".model", "tokenizer.json")  # what real repositories keep in LFS


@dataclass(frozen=True)
class Blob:
    """One file at one commit."""

    name: str
    content: bytes

    @property
    def is_lfs(self) -> bool:
        return self.name.endswith(LFS)

    @property
    def git_id(self) -> str:
        """The git hash of the content, or of the LFS pointer that stands for it."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        body = pointer.encode() if self.is_lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_id


@dataclass
class Repo:
    """A repository: commits of files, and the branches and tags that name them."""

    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    is_gated: bool = False

    def push(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """A new commit that holds these files -> its hash."""
        blobs = {name: Blob(name, content) for name, content in sorted(files.items())}
        listing = "".join(f"{name} {blob.git_id}\n" for name, blob in blobs.items())
        commit = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[commit] = blobs
        self.refs[branch] = commit
        return commit


def folder_content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its path in the repository."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def file_entry(blob: Blob, id_name: str) -> dict[str, Any]:
    """Size and hashes as the hub's JSON gives them: the LFS hash is `sha256` in information and `oid` in the tree."""
    entry: dict[str, Any] = {id_name: blob.git_id, "size": len(blob.content)}
    if blob.is_lfs:
        name = "oid" if id_name == "oid" else "sha256"
        entry["lfs"] = {name: blob.sha256, "size": len(blob.content), "pointerSize": 134}
    return entry
