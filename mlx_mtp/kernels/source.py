"""The text of `metal/*.metal`: inside the package in a wheel, beside it in a checkout."""

import functools
from pathlib import Path

from mlx_mtp.errors import KernelError

PACKAGE = Path(__file__).parent.parent
FOLDERS = (PACKAGE / "metal", PACKAGE.parent / "metal")


@functools.cache
def metal_source(file: str) -> str:
    """One file's text, e.g. "verify_qmm.metal"; KernelError where the installation lacks it."""
    for folder in FOLDERS:
        if (folder / file).is_file():
            return (folder / file).read_text(encoding="utf-8")
    raise KernelError(f"{file} must be in {FOLDERS[0]}, and is not; install mlx-mtp again")
