"""One bench at a time: two would slow each other, and neither would measure anything."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mlx_mtp.errors import MachineError, StorageError


def lock_path() -> Path:
    """In the system's temporary folder: it needs no home, and goes with the machine's start."""
    return Path(tempfile.gettempdir()) / f"mlx-mtp-bench-{os.getuid()}.lock"


@contextmanager
def alone() -> Iterator[None]:
    """Raises MachineError where another bench of this user runs; a lock dies with its process."""
    path = lock_path()
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise MachineError(
            f"another bench runs on this machine, and two would slow each other; wait for it ({path} is its lock)"
        ) from None
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be made ({error.strerror or error}); make the folder writable, or set TMPDIR"
        ) from None
    try:
        yield
    finally:
        lock.release()
