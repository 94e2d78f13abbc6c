"""Matrix products in float32, bfloat16 and float16, dense and 4-bit: which type this chip computes fast."""

import time
from typing import Any

import mlx.core as mx

from mlx_mtp.report.activations import dtype_name, in_dtype
from mlx_mtp.report.costs import Passes, Run, in_turns
from mlx_mtp.report.protocol import Deadline, Found
from mlx_mtp.report.setting import Setting, with_target

DTYPES = (mx.float32, mx.bfloat16, mx.float16)
PRODUCT_ROWS = (1, 4, 8, 512)
COPIES_BYTES = 128 << 20  # of weights walked in turn: more than any chip keeps in its caches
MOST_COPIES, LARGEST_SIDE = 16, 2048
TOO_SLOW_MS = 2000.0
GROUP = 64  # values that share a scale


def dtype_times(setting: Setting, found: Found, deadline: Deadline) -> None:
    """Products of the model's width by rows and type, then a target pass of 1 and 4 rows in each type."""
    side = min(LARGEST_SIDE, -(-setting.the_pair.target.text.hidden_size // GROUP) * GROUP)
    found["side"] = side
    for kind in ("dense", "4-bit"):
        found[kind] = {}
        slowest = 0.0  # milliseconds of one chain and row
        for rows in PRODUCT_ROWS:
            if slowest * rows > TOO_SLOW_MS:
                found[kind][str(rows)] = {
                    "left_out": f"would take about {slowest * rows / 1e3:.0f} s each time"
                }
                continue
            runs = {
                dtype_name(dtype): chain(side, rows, dtype, quantized=kind == "4-bit") for dtype in DTYPES
            }
            times = in_turns(runs, setting.repeats, deadline)
            found[kind][str(rows)] = {"chain_ms": times, "fastest": _fastest(times)}
            slowest = max(own["median"] for own in times.values()) / rows
            del runs
            mx.clear_cache()
    ids = next(iter(setting.prompt_tokens().values()))
    found["target_pass"] = {}
    seconds: dict[str, dict[str, Any]] = {str(m): {} for m in (1, 4)}
    for dtype in DTYPES:
        deadline.check()
        pair = with_target(setting.the_pair, in_dtype(setting.the_pair.target, dtype))
        try:
            passes = Passes(pair, ids)
            times = in_turns({m: passes.of_rows(int(m)) for m in seconds}, setting.repeats, deadline)
        except (
            RuntimeError
        ) as error:  # not every operation knows every type: MLX has no 16-bit experts on a CPU
            found.setdefault("not_computed", {})[dtype_name(dtype)] = str(error)[:200]
            continue
        for m, own in times.items():
            seconds[m][dtype_name(dtype)] = own
            found["target_pass"][m] = {"ms": seconds[m], "fastest": _fastest(seconds[m])}


def chain(side: int, rows: int, dtype: mx.Dtype, *, quantized: bool) -> Run:
    """Seconds of `copies` dependent products x @ W.T with weights [side, side], one after another, no W twice."""
    copies = max(4, min(MOST_COPIES, COPIES_BYTES // (side * side * dtype.size)))
    weights = [
        (mx.random.normal((side, side), key=mx.random.key(i)) * side**-0.5).astype(dtype)
        for i in range(copies)
    ]
    x = mx.random.normal((rows, side), key=mx.random.key(99)).astype(dtype)
    packed = [mx.quantize(weight, group_size=GROUP, bits=4) for weight in weights] if quantized else []
    mx.eval(x, packed or weights)
    if quantized:
        weights = []

    def run() -> float:
        started = time.perf_counter()
        y = x
        for weight in weights:
            y = y @ weight.T
        for weight, scales, biases in packed:
            y = mx.quantized_matmul(y, weight, scales, biases, transpose=True, group_size=GROUP, bits=4)
        mx.eval(y)
        return time.perf_counter() - started

    return run


def _fastest(times: dict[str, dict[str, float]]) -> str | None:
    """The type with the shortest median, None where there is nothing to compare."""
    if len(times) < 2:
        return None
    return min(times, key=lambda name: times[name]["median"])
