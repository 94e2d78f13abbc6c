"""Names that come from outside, checked before they become part of an address or a path."""

import re

from mlx_mtp.errors import CheckpointError, HubError, ParameterError

COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
REPO_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?")
REVISION_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
LONGEST_ID = 96  # the hub's own limit, in characters


def check_repo_id(text: str) -> str:
    """`text` if it is an id as the hub writes it, organisation/name; CheckpointError otherwise."""
    parts = text.split("/")
    is_valid = (
        len(text) <= LONGEST_ID
        and len(parts) == 2
        and all(REPO_PART.fullmatch(part) for part in parts)
        and "--" not in text
        and ".." not in text
        and not text.endswith(".git")
    )
    if not is_valid:
        raise CheckpointError(
            f"a model id on the hub must be organisation/name in letters, digits, '-', '_' and '.', "
            f"got {text[: LONGEST_ID + 4]!r}; copy it from the model's page, or write ./ before a local folder"
        )
    return text


def check_revision(text: str) -> str:
    """`text` if it can name a branch, tag or commit; ParameterError otherwise."""
    is_valid = len(text) <= 200 and ".." not in text and not text.endswith((".lock", "."))
    if not is_valid or not all(REVISION_PART.fullmatch(part) for part in text.split("/")):
        raise ParameterError(
            f"a revision must be a branch, a tag or a commit hash, got {text[:80]!r}; "
            "copy it from the model's page under 'Files and versions'"
        )
    return text


def check_file_name(name: str, repo_id: str) -> str:
    """A file's path in a repository as the hub lists it; HubError where it would leave the model's folder."""
    parts = name.split("/")
    is_safe = (
        all(part not in ("", ".", "..") for part in parts)
        and name.isprintable()
        and not set(name) & set("\\:")
        and all(len(part.encode()) <= 255 for part in parts)
    )
    if not is_safe:
        raise HubError(
            f"{repo_id}: every file must lie inside the model's folder, but the hub lists {name[:120]!r}; "
            "do not use this model unless you trust whoever made it"
        )
    return name
