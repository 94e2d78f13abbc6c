"""A folder that appears complete or not at all: built beside its place, under a lock, then renamed.

The lock is the system's own on the partial folder, so it ends with the process that held it; what such a process
left behind is emptied by the next that builds the same folder.
"""

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_mtp.errors import StorageError

FULL = (errno.ENOSPC, errno.EDQUOT)
PARTIAL = ".partial"
WAIT_SECONDS = 0.2
RESERVE_BYTES = 64 << 20  # left free for everything else that writes


@contextmanager
def building(out: Path, on_wait: Callable[[], None] | None = None) -> Iterator[Path]:
    """An empty partial folder beside `out`, ours alone; removed at the end unless it was published.

    Another process at work on the same folder is waited for, `on_wait` being called about five times a second,
    or refused where that is None. Raises StorageError where the folder cannot be made or written.
    """
    partial = out.parent / f".{out.name}{PARTIAL}"
    with storage_errors(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    descriptor = lock_folder(partial, on_wait)
    try:
        with storage_errors(out.parent):
            empty(partial)
        yield partial
    finally:
        if is_same(partial, descriptor):
            shutil.rmtree(partial, ignore_errors=True)
        os.close(descriptor)


def publish(partial: Path, out: Path) -> None:
    """Make the finished folder durable, then let it appear under its name."""
    with storage_errors(out.parent):
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        os.rename(partial, out)
        sync(out.parent)


def lock_folder(partial: Path, on_wait: Callable[[], None] | None) -> int:
    """-> an open, locked descriptor of the folder that is at `partial` now."""
    while True:
        with storage_errors(partial.parent):
            descriptor = open_locked(partial)
        if descriptor is not None:
            return descriptor
        if on_wait is None:
            raise StorageError(
                f"{partial}: another process is writing here; wait for it to end, then try again"
            )
        on_wait()
        time.sleep(WAIT_SECONDS)


def open_locked(partial: Path) -> int | None:
    """The folder's descriptor, None while another process has it or has just published or removed it."""
    partial.mkdir(exist_ok=True)
    try:
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    is_ours = False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = is_same(partial, descriptor)
    except BlockingIOError:
        return None
    finally:
        if not is_ours:
            os.close(descriptor)
    return descriptor if is_ours else None


def is_at_work(partial: Path) -> bool:
    """Whether a process is building in this partial folder; one that was killed is not."""
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def is_same(folder: Path, descriptor: int) -> bool:
    """Whether the path still leads to the folder that was opened."""
    try:
        there = folder.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))


def empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_free(folder: Path, nbytes: int, what: str) -> None:
    """Refuse with StorageError unless `nbytes` and a reserve fit on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < nbytes + RESERVE_BYTES:
        raise StorageError(
            f"{what} needs {nbytes / 1e9:.1f} GB on the disk of {folder}, which has {free / 1e9:.1f} GB free; "
            "free some space, or write to another disk"
        )


@contextmanager
def storage_errors(place: Path) -> Iterator[None]:
    """The system's refusals to write in the folder `place`, as StorageError."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StorageError(
                f"{place}: the disk became full and nothing was kept; free some space and try again"
            ) from error
        raise StorageError(
            f"{place}: cannot be written ({error.strerror or error}) and nothing was kept; "
            "check the folder's permissions, or choose another"
        ) from error
