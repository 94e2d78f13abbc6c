"""Conversations on the disk: versioned JSON, written whole or not at all, for their owner alone."""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mtp.clean import clean_for_terminal
from mlx_mtp.errors import ParameterError, StorageError
from mlx_mtp.store import data_folder, write_bytes

FOLDER = "conversations"
KIND = "mlx_mtp_conversation"  # names the version; no other file has it
VERSION = 1
LARGEST_BYTES = 64 << 20
ROLES = ("system", "user", "assistant")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Transcript:
    """A conversation as it was: the model's name, messages with role and content, and which K/V belong to it."""

    model: str
    messages: tuple[dict[str, str], ...]
    kv: str | None = None  # SHA-256 of the file beside it, None for no such file

    @property
    def title(self) -> str:
        """The first question, cut short."""
        asked = next((one["content"] for one in self.messages if one["role"] == "user"), "")
        line = " ".join(clean_for_terminal(asked).split())
        return line if len(line) <= 60 else f"{line[:59]}…"


def conversation_path(name: str) -> Path:
    """A name, or a path with a slash in it -> the file. Raises ParameterError for what is neither."""
    if "/" in name:
        return Path(name).expanduser()
    if not _NAME.fullmatch(name):
        raise ParameterError(
            f"a conversation's name has letters, digits, dots, dashes and underscores, got {name!r}; "
            "or give a path such as ./talk.json"
        )
    return data_folder() / FOLDER / f"{name}.json"


def save_conversation(path: Path, transcript: Transcript) -> None:
    """Write it in one step, readable by its owner alone. Raises StorageError."""
    value: dict[str, Any] = {KIND: VERSION, "model": transcript.model}
    if transcript.kv is not None:
        value["kv_sha256"] = transcript.kv
    value["messages"] = list(transcript.messages)
    write_bytes(path, json.dumps(value, ensure_ascii=False, indent=1).encode() + b"\n")


def load_conversation(path: Path) -> Transcript:
    """Read what `save_conversation` wrote; any other file stays as it is. Raises StorageError."""
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise StorageError(f"{path}: is larger than {LARGEST_BYTES >> 20} MB; choose another file")
        value = json.loads(path.read_bytes())
        version, model = value[KIND], value["model"]
        if version != VERSION or isinstance(version, bool):
            raise StorageError(
                f"{path}: holds a conversation of version {str(version)[:20]}, and this program reads {VERSION}; "
                "update mlx-mtp"
            )
        if not isinstance(model, str):
            raise ValueError("a model without a name")
        kv = value.get("kv_sha256")
        return Transcript(
            model,
            tuple(_checked(message) for message in value["messages"]),
            kv if isinstance(kv, str) else None,
        )
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be read ({error.strerror}); /resume lists what was kept"
        ) from None
    except (KeyError, TypeError, ValueError, RecursionError):
        raise StorageError(
            f"{path}: is no conversation that was saved by this program; choose another file"
        ) from None


def kv_path(path: Path) -> Path:
    """Where a conversation's K/V lies: beside it, whatever its file says."""
    return path.with_name(f"{path.name}.kv.safetensors")


def kept_conversations() -> list[tuple[Path, float]]:
    """Those kept by this program with the time they were written, the newest first."""
    folder = data_folder() / FOLDER
    if not folder.is_dir():
        return []
    found = [(path, path.stat().st_mtime) for path in folder.glob("*.json")]
    return sorted(found, key=lambda one: one[1], reverse=True)


def new_name(now: float | None = None) -> str:
    """A name for a conversation that begins now."""
    return time.strftime("%Y-%m-%d-%H%M%S", time.localtime(now))


def listing(kept: Sequence[tuple[Path, float]], most: int = 20) -> str:
    """Numbered lines: number, when, model, first question."""
    lines = []
    for number, (path, at) in enumerate(kept[:most], 1):
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
        try:
            transcript = load_conversation(path)
            lines.append(f"{number:>3}  {when}  {transcript.model}  {transcript.title}")
        except StorageError as error:
            lines.append(f"{number:>3}  {when}  ({error})")
    return "\n".join(lines)


def _checked(message: Any) -> dict[str, str]:
    role, content = message["role"], message["content"]
    if role not in ROLES or not isinstance(content, str) or set(message) != {"role", "content"}:
        raise ValueError("a message without role and content")
    return {"role": role, "content": content}
