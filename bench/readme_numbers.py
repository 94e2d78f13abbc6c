"""The README's table of numbers, from the result files that are committed: written into it, or compared with it.

python bench/readme_numbers.py --write
python bench/readme_numbers.py --check

A row says on which machine its file was made, and a prediction says that it is one. A file that is not there has no
row. Files of `mlx-mtp bench` (see README.md here) have a row each, Macs first.
"""

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marked_tables import put, write_or_check
from predicted_gains import predict
from published_gains import GAINS

from mlx_mtp.measure.plan import AUTO
from mlx_mtp.measure.results import KIND, read_document
from mlx_mtp.measure.summary import rows_of

README = Path(__file__).resolve().parent.parent / "README.md"
RESULTS = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- numbers: made by bench/readme_numbers.py -->", "<!-- end of numbers -->"
HEAD = "| what | figure | where |\n|---|---|---|"
PREDICTED = "**predicted**, no Mac measured ([docs](docs/predictions.md))"
NAMES = {"e2b": "E2B", "e4b": "E4B", "12b": "12B", "26b-a4b": "26B-A4B", "31b": "31B"}
MOST = 12  # rows


@dataclass(frozen=True, slots=True)
class Number:
    """One row: what was compared, the figure, and where it was seen."""

    what: str
    figure: str
    where: str

    def line(self) -> str:
        return f"| {self.what} | {self.figure} | {self.where} |"


def times(ratio: float) -> str:
    return f"{ratio:.2f}x"


def span(ratios: list[float]) -> str:
    """One ratio, or the smallest and the largest of several."""
    low, high = times(min(ratios)), times(max(ratios))
    return low if low == high else f"{low} to {high}"


def place(result: dict[str, Any], *, blas: str = "") -> str:
    """The machine of a record that `report.record` made, as short as it can be told."""
    machine = result["machine"]
    system = machine["system"].partition("-")[0].replace("macOS", "macOS")
    kind = "CPU" if system == "Linux" else f"{machine.get('gpu_cores')} GPU cores"
    return ", ".join(part for part in (system, machine["processor"], kind, blas) if part)


def demo_speed(files: list[dict[str, Any]]) -> Iterator[Number]:
    """decode_speed.py on held-out code with a BLAS that shares weights between rows."""
    arms = [result["results"]["ms a token"]["k=3"] for result in files]
    gain = span([own["plain / this"] for own in arms])
    peer = span([own["mlx-lm plain / this"] for own in arms])
    yield Number(
        "demo pair, code, greedy, 3 drafts: speed over our plain decoding, and over mlx-lm's",
        f"{gain}, {peer}",
        place(files[0], blas="OpenBLAS"),
    )


def demo_stock(files: list[dict[str, Any]]) -> Iterator[Number]:
    """The same with the BLAS of MLX's wheel, in which rows share nothing."""
    arms = files[0]["results"]["ms a token"]
    yield Number(
        "the same with MLX's own BLAS, where rows share nothing: plain decoding over mlx-lm's; 4 drafts over "
        "our plain",
        f"{times(arms['plain']['mlx-lm plain / this'])}; {times(arms['k=4']['plain / this'])}",
        place(files[0]),
    )


def peers(files: list[dict[str, Any]], what: str, blas: str) -> Iterator[Number]:
    """peers.py: the time a token over each peer's, on all pairs of these files."""
    ratios: dict[str, list[float]] = {}
    for result in files:
        for pair in result["results"]["pairs"].values():
            for name, ratio in pair["ratios"].items():
                ratios.setdefault(name, []).append(ratio)
    shown = {
        "ours MTP / mlx-vlm MTP, ms a token": "MTP over mlx-vlm's",
        "ours plain / mlx-lm plain, ms a token": "plain over mlx-lm's",
        "ours MTP / transformers assisted, ms a token": "MTP over transformers' assisted",
    }
    figures = [f"{span(ratios[name])} ({said})" for name, said in shown.items() if name in ratios]
    yield Number(f"{what}: time a token over a peer's", ", ".join(figures), place(files[0], blas=blas))


def host_time(files: list[dict[str, Any]]) -> Iterator[Number]:
    """host_time.py: building a round over mlx-lm's plain step, at both depths."""
    sizes = {name: found for result in files for name, found in result["results"]["sizes"].items()}
    figures = []
    for arm, said in (
        ("ours plain", "plain"),
        ("ours k=3", "3 drafts"),
        ("mlx-vlm k=3", "mlx-vlm, 3 drafts"),
    ):
        ratios = [found["over mlx-lm's plain step"][arm]["build"] for found in sizes.values()]
        figures.append(f"{span(ratios)} ({said})")
    yield Number(
        "host time to build a round at the depth of 26B and 31B, tiny widths, over mlx-lm's plain step",
        ", ".join(figures),
        place(files[0]),
    )


def prefill(files: list[dict[str, Any]]) -> Iterator[Number]:
    arms = files[0]["results"]["seconds to the first token"]
    ratio = next(own["this / mlx-lm"] for name, own in arms.items() if name.startswith("ours"))
    yield Number(
        "demo pair: time to the first token after 4,000 over mlx-lm's", times(ratio), place(files[0])
    )


def memory(files: list[dict[str, Any]]) -> Iterator[Number]:
    """memory_peaks.py: the peak of the process over its estimate."""
    shares = [
        case["measured MiB"]["process"] / case["estimate MiB"]["total"]
        for case in files[0]["results"].values()
    ]
    yield Number(
        f"peak memory over `estimate_memory`, {len(shares)} models and contexts, made-up weights",
        span(shares),
        place(files[0]),
    )


WAYS = ("best for each text", "best for all texts together", "plain")


def auto_gain(files: list[dict[str, Any]]) -> Iterator[Number]:
    """auto_gain.py: "auto" on texts after the first, over the best numbers for each and for all, and plain."""
    summaries = files[0]["results"]["summary"]
    for blas, said in (("openblas", "OpenBLAS"), ("stock", "MLX's own BLAS")):
        figures = []
        for name, own in summaries.items():
            if not name.startswith(blas):
                continue
            found = own["measured"]["auto, later"]
            each, one, plain = (found[way] for way in WAYS)
            bounds = (
                f" ({times(each['lower'])} to {times(each['upper'])})" if each["lower"] is not None else ""
            )
            kind = "experts" if name.endswith("moe") else "dense"
            passes = "1 pass" if found["passes"] == 1 else f"{found['passes']} passes"
            figures.append(
                f"{kind} {times(each['speed'])}{bounds}, {times(one['speed'])}, {times(plain['speed'])} ({passes})"
            )
        if figures:
            yield Number(
                "enlarged pair, three texts of 256 tokens: speed of `auto` over the best number of drafts for each "
                "text, over the best for all together, both known afterwards, and over plain",
                "; ".join(figures),
                place(files[0], blas=said),
            )


def batch_width(files: list[dict[str, Any]]) -> Iterator[Number]:
    """batch_width.py: the widest batch over one reply at a time, both plain, and what drafting with "auto" adds."""
    arms = files[0]["results"]["tokens a second"]
    widths = sorted({int(name.split()[1]) for name in arms if name.split()[1].isdigit()})
    wide = f"width {widths[-1]}"
    # Ratios within each pass, as in bench/README.md: the machine is faster in some passes than in others.
    over_one, over_plain = "this / width 1 plain", "this / plain of the width"
    figures = [f"{times(arms[f'{wide} plain'][over_one]['median'])} ({widths[-1]} at once, plain)"]
    figures += [
        f"{times(arms[f'width {width} auto'][over_plain]['median'])} (`auto` over plain, {width} at once)"
        for width in widths
    ]
    yield Number(
        "demo pair, several replies at a time: tokens a second",
        ", ".join(figures),
        place(files[0], blas="OpenBLAS"),
    )


def predictions() -> Iterator[Number]:
    """The cost model on our kernels, for the rows of code that others published, by size."""
    rows = [predict(gain) for gain in GAINS]
    figures = []
    for size, name in NAMES.items():
        own = [row.ours_best for row in rows if row.gain.size == size and row.gain.text == "code"]
        if own:
            figures.append(f"{name} {span(own)}")
    yield Number(
        "MTP over plain decoding on Macs from M1 to M5, code, one conversation, our kernels",
        ", ".join(figures),
        PREDICTED,
    )


def bench_runs(documents: list[dict[str, Any]]) -> Iterator[Number]:
    """Files of `mlx-mtp bench`: "auto" over our plain decoding, the median of the cases that are not noisy."""
    for document in documents:
        rows = [row for row in rows_of(document) if row.arm == AUTO and row.speedup is not None]
        steady = [row.speedup.value for row in rows if row.speedup is not None and not row.is_noisy]
        if not document["complete"] or not steady:
            continue
        machine, versions = document["fingerprint"]["machine"], document["fingerprint"]["versions"]
        cores = f", {machine['gpu_cores']} GPU cores" if machine["gpu_cores"] else ""
        text = "text equal to plain" if all(row.same_text for row in rows) else "**text not always equal**"
        cases = "1 workload" if len(steady) == 1 else f"{len(steady)} workloads"
        spread = f" ({span(steady)})" if len(steady) > 1 else ""
        yield Number(
            f"{document['opening']['name']}: `auto` over our plain decoding, {cases}; {text}",
            times(statistics.median(steady)) + spread,
            f"{machine['chip']}{cores}, MLX {versions['mlx']}",
        )


SOURCES: tuple[tuple[str, Callable[[list[dict[str, Any]]], Iterator[Number]]], ...] = (
    ("decode_openblas_quiet_*.json", demo_speed),
    ("decode_stock.json", demo_stock),
    ("peers_tiny*.json", lambda files: peers(files, "tiny pairs (host and dispatch)", "")),
    ("peers_enlarged*.json", lambda files: peers(files, "enlarged pair (memory-bound)", "OpenBLAS")),
    ("auto_gain.json", auto_gain),
    ("batch_width_openblas.json", batch_width),
    ("host_time*.json", host_time),
    ("prefill.json", prefill),
    ("memory_peaks.json", memory),
)


def numbers(folder: Path = RESULTS) -> list[Number]:
    """All rows: runs of `mlx-mtp bench` on Macs first, then what was measured on Linux, then predictions."""
    found: list[Number] = []
    runs = [read_document(path) for path in sorted(folder.rglob("*.json")) if is_bench_run(path)]
    runs.sort(key=lambda document: document["fingerprint"]["machine"]["system"] != "Darwin")
    found.extend(bench_runs(runs))
    for pattern, numbers_of in SOURCES:
        files = [json.loads(path.read_text()) for path in sorted(folder.glob(pattern))]
        if files:
            found.extend(numbers_of(files))
    found.extend(predictions())
    return found[:MOST]


def is_bench_run(path: Path) -> bool:
    found = json.loads(path.read_text())
    return isinstance(found, dict) and found.get("kind") == KIND


def with_table(text: str, rows: list[Number]) -> str:
    """The README with this table between its marks; ValueError where they are missing."""
    return put(text, BEGIN, END, "\n".join([HEAD, *(row.line() for row in rows)]))


if __name__ == "__main__":
    write_or_check(README, lambda text: with_table(text, numbers()), __doc__)
