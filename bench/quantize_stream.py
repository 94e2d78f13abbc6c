"""Peak memory of quantising a 10 GB checkpoint: made-up bf16 weights in published shapes, in a process of its own.

    python bench/quantize_stream.py --scratch /tmp --json bench/results/quantize_stream.json

`e2b` is E2B whole (its per-layer table alone is 4.7 GB); `26b-a4b` is the first six layers of 26B-A4B, whose
expert stacks are 1.5 GB a layer. Needs 25 GB of disk, which it frees again.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from report import record, rounded, save

from mlx_mtp.config_parse import parse_target_config
from mlx_mtp.headers import INDEX
from mlx_mtp.published_configs import published_target
from mlx_mtp.tensor_names import expected_tensors

LAYERS = {"e2b": None, "26b-a4b": 6}
PREFIX = "model.language_model."
SHARD_BYTES = 2 * 10**9
BLOCK = 8 << 20  # numbers
FIELDS = ("VmHWM", "VmRSS", "RssAnon", "RssFile")


def config_of(size: str) -> dict[str, Any]:
    """The published config.json, with fewer layers where the whole model would be too large."""
    raw = published_target(size)
    layers = LAYERS[size]
    if layers is not None:
        text = raw["text_config"]
        text |= {"layer_types": text["layer_types"][:layers], "num_hidden_layers": layers}
    raw["text_config"]["dtype"] = "bfloat16"
    return raw


def published_shapes(raw: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names as transformers publishes them: gate and up experts in one tensor; and a bit of a vision tower."""
    plain = ("layer_scalar", "router.scale", "router.per_expert_scale")
    for path, shape in expected_tensors(parse_target_config(raw, "synthetic")).items():
        if path.endswith("experts.gate_proj"):
            experts, rows, width = shape
            yield PREFIX + path.replace("gate_proj", "gate_up_proj"), (experts, 2 * rows, width)
        elif path.endswith("experts.down_proj"):
            yield PREFIX + path, shape
        elif not path.endswith("experts.up_proj"):
            yield PREFIX + path + ("" if path.endswith(plain) else ".weight"), shape
    yield "model.vision_tower.patch_embedder.input_proj.weight", (1152, 768)


def write_source(folder: Path, raw: dict[str, Any]) -> int:
    """A sharded checkpoint with an index; -> its bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in published_shapes(raw):
        nbytes = 2 * math.prod(shape)
        if groups[-1] and size + nbytes > SHARD_BYTES:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += nbytes
    numbers = np.random.default_rng(5).normal(0, 0.02, BLOCK).astype(np.float32)
    block = (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes()  # bfloat16, rounded towards zero
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = folder / f"model-{number:05}-of-{len(groups):05}.safetensors"
        write_shard(file, group, block)
        weight_map |= dict.fromkeys(group, file.name)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def write_shard(file: Path, shapes: dict[str, tuple[int, ...]], block: bytes) -> None:
    header, at = {}, 0
    for name, shape in shapes.items():
        nbytes = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        while at:
            at -= stream.write(block[:at])


class Watch:
    """Samples a process's memory until it ends; peaks in bytes."""

    def __init__(self, pid: int) -> None:
        self.peaks = dict.fromkeys(FIELDS, 0)
        self.samples = 0
        self._status = Path(f"/proc/{pid}/status")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            lines = self._status.read_text().splitlines()
            now = {
                line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(FIELDS)
            }
            if not now:
                return  # ended, not yet waited for
            self.samples += 1
            self.peaks = {name: max(self.peaks[name], now[name]) for name in FIELDS}

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def convert(source: Path, out: Path, bits: int) -> dict[str, Any]:
    """Run the conversion in another process and watch it."""
    command = [sys.executable, __file__, "--convert", str(source), str(out), "--bits", str(bits)]
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watch = Watch(child.pid)
    assert child.stdout is not None
    told = [json.loads(line) for line in child.stdout]
    watch.stop()
    if child.wait() != 0:
        sys.exit(f"the conversion ended with {child.returncode}: nothing is reported")
    seconds = time.perf_counter() - started
    result = sum(file.stat().st_size for file in out.iterdir())
    peak = watch.peaks["VmHWM"]
    return {
        "result GB": rounded(result / 1e9),
        "peak resident GB (VmHWM)": rounded(peak / 1e9),
        "peak anonymous GB (RssAnon, sampled)": rounded(watch.peaks["RssAnon"] / 1e9),
        "resident GB after importing": rounded(told[0]["VmRSS"] / 1e9),
        "anonymous GB after importing": rounded(told[0]["RssAnon"] / 1e9),
        "peak resident minus result GB": rounded((peak - result) / 1e9),
        "samples": watch.samples,
        "seconds": rounded(seconds),
        "source MB/s": rounded(told[1]["source_bytes"] / 1e6 / seconds),
    }


def own_status() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(FIELDS)}


def run_conversion(source: Path, out: Path, bits: int) -> None:
    """In the watched process: what it holds after importing, then the conversion."""
    import mlx.core as mx

    from mlx_mtp.progress import Progress
    from mlx_mtp.quantize import quantize_checkpoint

    mx.eval(mx.quantize(mx.ones((64, 64))))
    print(json.dumps(own_status()), flush=True)
    last: list[Progress] = []

    def keep(progress: Progress) -> None:
        last[:] = [progress]

    quantize_checkpoint(source, out, bits=bits, on_progress=keep)
    print(json.dumps({**own_status(), "source_bytes": last[0].total}), flush=True)


def measure(size: str, bits: tuple[int, ...], scratch: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="quantize_stream_", dir=scratch) as place:
        raw = config_of(size)
        print(f"writing {size}", file=sys.stderr, flush=True)
        source = Path(place) / "source"
        report: dict[str, Any] = {"source GB": rounded(write_source(source, raw) / 1e9)}
        for number in bits:
            print(f"quantising {size} to {number} bits", file=sys.stderr, flush=True)
            out = Path(place) / f"{number}bit"
            report[f"{number} bits"] = convert(source, out, number)
            for file in out.iterdir():
                file.unlink()
        return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="*", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 8])
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="needs 25 GB free")
    parser.add_argument("--convert", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="also write the record here")
    args = parser.parse_args()
    if args.convert:
        run_conversion(*args.convert, bits=args.bits[0])
        return
    results = {size: measure(size, tuple(args.bits), args.scratch) for size in args.sizes}
    print(json.dumps(results, indent=1))
    what = "memory of quantising checkpoints on disk, made-up bf16 weights"
    save(record(what, {"bits": args.bits}, results), args.json)


if __name__ == "__main__":
    main()
