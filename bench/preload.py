"""Running a measurement again with another BLAS in front of the one in MLX's wheel."""

import os
import sys
import time
from pathlib import Path

import mlx.core as mx

MARK = "--preloaded"


def rerun_with(library: Path) -> None:
    """Replace this process by itself with `library` preloaded, one thread; it comes back with MARK in argv."""
    if not library.is_file():
        sys.exit(f"{library}: no such library; on Debian: apt install libopenblas0-pthread")
    environment = {**os.environ, "LD_PRELOAD": str(library.resolve()), "OPENBLAS_NUM_THREADS": "1"}
    os.execve(sys.executable, [sys.executable, *sys.argv, MARK], environment)


def cost_of_rows(rows: int, *, size: int = 512, repeats: int = 200) -> float:
    """Seconds for [rows, 4 * size] @ [4 * size, size] over those for one row, medians of alternated products."""
    weight = mx.random.normal((size, 4 * size), key=mx.random.key(0)).T
    inputs = {n: mx.random.normal((n, 4 * size), key=mx.random.key(n)) for n in (1, rows)}
    mx.eval(weight, inputs)
    seconds: dict[int, list[float]] = {n: [] for n in inputs}
    for _ in range(repeats):
        for n, x in inputs.items():
            started = time.perf_counter()
            mx.eval(x @ weight)
            seconds[n].append(time.perf_counter() - started)
    middle = {n: sorted(own)[repeats // 2] for n, own in seconds.items()}
    return middle[rows] / middle[1]


def check_preloaded() -> float:
    """Exit unless a product of four rows costs less than three of one: the wheel's own BLAS is linear in rows."""
    ratio = cost_of_rows(4)
    if ratio >= 3:
        sys.exit(
            f"four rows cost {ratio:.1f} times one row, so the preloaded BLAS is not in use: nothing is reported"
        )
    return ratio
