"""One file of a hub repository -> its blob in the cache: resumed where an earlier attempt stopped, then checked.

huggingface_hub throws an unfinished file away when its process ends and compares sizes only, so the bytes are
fetched here, with its session, headers and addresses.
"""

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, SoftFileLock, Timeout

from mlx_mtp.cache import HubFile, content_hash, file_size, has_size
from mlx_mtp.errors import HubError
from mlx_mtp.hub_errors import (
    AGAIN,
    FULL,
    RANGE_REFUSED,
    bad_token,
    may_pass,
    refusal,
    short,
    storage_refusal,
    web_page,
)
from mlx_mtp.progress import OnProgress, Progress, Stage

Value = TypeVar("Value")
PAUSES = (1.0, 2.0, 4.0, 8.0, 8.0)  # seconds before further attempts; their number bounds those in a row
WORTH = 1 << 20  # bytes gained by an attempt that count as getting on
POLL = 0.2  # seconds between looks at a lock that another process holds
SAY_EVERY = 5.0  # seconds between messages about that
SLOW_TO_CHECK = 256 << 20  # bytes whose hash takes long enough to say so
REPORT_EVERY = 0.1  # seconds
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # exFAT, some network disks
PAGE_STARTS = (b"<!doctype", b"<html", b"<?xml")


@dataclass(frozen=True, slots=True)
class Source:
    """Where one file comes from; `headers` name this library and may hold an access token."""

    repo_id: str
    revision: str
    url: str
    file: HubFile
    headers: dict[str, str] = field(repr=False)


class CallersError(Exception):
    """Carries an OSError of the caller's own function, such as a closed stdout, past what handles ours."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


def call(function: Callable[[Value], None], value: Value) -> None:
    """Call what the caller gave; OSErrors come out as CallersError."""
    try:
        function(value)
    except OSError as error:
        raise CallersError(error) from None


class Meter:
    """Bytes of the whole download so far, reported at most ten times a second."""

    def __init__(self, done: int, total: int, on_progress: OnProgress) -> None:
        self.done = done
        self.total = total
        self.on_progress = on_progress
        self.reported = float("-inf")

    def add(self, count: int, name: str) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.reported >= REPORT_EVERY or self.done == self.total:
            self.reported = now
            self.say("download", f"downloading {name}")

    def say(self, stage: Stage, message: str) -> None:
        call(self.on_progress, Progress(stage, message, self.done, self.total))


def download_file(source: Source, blobs: Path, locks: Path, pointer: Path, meter: Meter) -> None:
    """Fetch a file into `blobs` unless it is there, one process at a time, and link it as `pointer`.

    Raises HubError where the hub cannot or will not give it, and where the content does not match its hash; and
    StorageError. An unfinished file stays as HASH.incomplete, except on a full disk.
    """
    file = source.file
    blob, partial = blobs / file.blob, blobs / f"{file.blob}.incomplete"
    with locked(locks / f"{file.blob}.lock", file.name, meter):
        if has_size(pointer, file.size) or has_size(blob, file.size):  # another process fetched it meanwhile
            meter.add(file.size, file.name)
        else:
            fetch_checked(source, partial, meter)
            os.replace(partial, blob)
        if not has_size(pointer, file.size):
            place(blob, pointer)


def fetch_checked(source: Source, partial: Path, meter: Meter) -> None:
    """The whole file in `partial`, its content compared with its hash."""
    was_begun = partial.is_file()
    partial.touch()
    meter.add(size_of(partial), source.file.name)
    fetch_all(source, partial, meter)
    if source.file.size >= SLOW_TO_CHECK:
        meter.say("download", f"checking {source.file.name}")
    if was_begun and content_hash(partial, source.file.blob) != source.file.blob:
        # The older part may be damaged, as after a power cut: once more, from the start.
        restart(partial, meter)
        fetch_all(source, partial, meter)
    check_content(partial, source)


def place(blob: Path, pointer: Path) -> None:
    """Link the blob into the snapshot; where the disk knows no links, move it there."""
    pointer.unlink(missing_ok=True)
    try:
        os.symlink(os.path.relpath(blob, pointer.parent), pointer)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LINKS:
            raise
        os.replace(blob, pointer)


def check_content(partial: Path, source: Source) -> None:
    """Remove and refuse a file whose bytes are not those whose hash the hub published."""
    if content_hash(partial, source.file.blob) == source.file.blob:
        return
    with partial.open("rb") as stream:
        start = stream.read(64).lstrip().lower()
    partial.unlink()
    if start.startswith(PAGE_STARTS):
        raise web_page(source.repo_id, source.file.name)
    raise HubError(
        f"{source.repo_id}: {source.file.name} does not match the checksum that the hub gives for it, so it was "
        "removed; try again, and if it happens again, check the disk and any proxy in between"
    )


def fetch_all(source: Source, partial: Path, meter: Meter) -> None:
    """Append to `partial` until it has its full size, over as many connections as it takes."""
    failures, name, size = 0, source.file.name, source.file.size
    furthest = size_of(partial)  # a hub that knows no ranges sends the same bytes again, which is no progress
    while True:
        problem = attempt(source, partial, meter)
        if problem is None:
            return
        if size_of(partial) >= furthest + WORTH:
            failures, furthest = 0, size_of(partial)
        if failures == len(PAUSES):
            raise HubError(
                f"{source.repo_id}: {name} stopped at {size_of(partial)} of {size} bytes ({problem}); "
                f"check the connection and try again: {AGAIN}"
            )
        meter.say("wait", f"connection lost; {name} goes on in {PAUSES[failures]:.0f} s")
        time.sleep(PAUSES[failures])
        failures += 1


def attempt(source: Source, partial: Path, meter: Meter) -> str | None:
    """One connection's worth of the file -> None once it is whole, or what went wrong and may pass."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # the base of httpx's own errors

    if size_of(partial) == source.file.size:
        return None
    try:
        fetch_some(source, partial, meter)
    except HTTPError as error:
        if not may_pass(error):
            raise refusal(error, source.repo_id, source.revision) from None
        if status_of(error) == RANGE_REFUSED:
            restart(partial, meter)
        return short(error)
    except UnicodeEncodeError:
        raise bad_token(source.repo_id) from None
    except OSError as error:
        raise full_or_forbidden(error, partial, source) from None
    return None if size_of(partial) == source.file.size else "the connection was closed too early"


def fetch_some(source: Source, partial: Path, meter: Meter) -> None:
    """One request for the bytes that are missing; raises httpx's errors and OSError."""
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but not in __all__
        hf_raise_for_status,
        http_stream_backoff,
    )

    have, file = size_of(partial), source.file
    headers = source.headers | {
        "Accept-Encoding": "identity"
    }  # ranges and sizes are those of the content itself
    if have:
        headers["Range"] = f"bytes={have}-"
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with http_stream_backoff(
        "GET", source.url, headers=headers, timeout=timeout, retry_on_exceptions=(), retry_on_status_codes=()
    ) as response:
        hf_raise_for_status(response)
        if "text/html" in response.headers.get("Content-Type", ""):
            raise web_page(source.repo_id, file.name)
        with partial.open("ab") as stream:
            if have and response.status_code != 206:  # the whole file, though only a part was asked for
                stream.truncate(0)
                meter.done -= have
                have = 0
            for piece in response.iter_bytes():
                have += len(piece)
                if have > file.size:
                    raise HubError(
                        f"{source.repo_id}: {file.name} must have {file.size} bytes as the hub lists it, got more; "
                        "try again later"
                    )
                stream.write(piece)
                meter.add(len(piece), file.name)
            stream.flush()
            os.fsync(stream.fileno())


def full_or_forbidden(error: OSError, partial: Path, source: Source) -> Exception:
    """What to raise for an OSError: huggingface_hub's own are some, too. On a full disk the part is removed."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return refusal(error, source.repo_id, source.revision)
    if error.errno in FULL:
        partial.unlink(missing_ok=True)
    return storage_refusal(error, partial.parent)


def status_of(error: Exception) -> int | None:
    from huggingface_hub.errors import HfHubHTTPError

    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def restart(partial: Path, meter: Meter) -> None:
    meter.done -= size_of(partial)
    partial.write_bytes(b"")


def size_of(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    return file_size(path) or 0


@contextmanager
def locked(path: Path, name: str, meter: Meter) -> Iterator[None]:
    """Hold the lock that huggingface_hub, too, takes for this blob; says so while another process has it."""
    lock: FileLock | SoftFileLock = FileLock(path, mode=0o664)
    told = float("-inf")
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except NotImplementedError:  # a file system without locks
            lock = SoftFileLock(path)
        except Timeout:
            if time.monotonic() - told >= SAY_EVERY:
                told = time.monotonic()
                meter.say("wait", f"another process is downloading {name}; waiting for it")
            time.sleep(POLL)
    try:
        yield
    finally:
        lock.release()
