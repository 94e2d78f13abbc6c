"""Peak memory of conversations on made-up weights of published and narrow shapes, beside `estimate_memory`.

    python bench/memory_peaks.py e2b_4bit demo_32k --json bench/results/memory_peaks.json
    python bench/memory_peaks.py --again --json bench/results/memory_peaks.json
    python bench/memory_peaks.py --list

Each case runs in a process of its own. Two peaks are taken: `arrays` is MLX's own count, `process` is the kernel's
(VmHWM, everything resident). The estimate is of the process; without its overhead it is of the arrays.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from report import record, rounded, save
from synthetic import ORDERING, configs_of, quantised_matrix

from mlx_mtp.checkpoint import read_drafter, read_drafter_config, read_target, read_target_config
from mlx_mtp.config import FULL, SLIDING, DrafterConfig, TargetConfig, TextConfig
from mlx_mtp.decode import RowLimits, decode
from mlx_mtp.drafter import Drafter, make_drafter
from mlx_mtp.layers import Tensors
from mlx_mtp.memory import MemoryEstimate, estimate_memory
from mlx_mtp.memory_parts import DRAFT_TOKENS, Formats, formats_of_bits
from mlx_mtp.policy import FixedPolicy
from mlx_mtp.prefill import first_token
from mlx_mtp.round import Rounds
from mlx_mtp.sampling import Sampling, sampler_class, sampling_arrays
from mlx_mtp.state import State, StateCell, no_drafts
from mlx_mtp.target import Target, make_target
from mlx_mtp.tensor_names import expected_tensors
from mlx_mtp.turns import History
from mlx_mtp.weights import DenseWeight

GIB, MIB = 2**30, 2**20
DTYPES = {"bfloat16": mx.bfloat16, "float32": mx.float32}
GEMMA = Sampling(temperature=1.0, top_k=64, top_p=0.95, seed=7)  # the published generation_config.json
THRESHOLDS = Sampling(temperature=1.0, top_p=0.95, min_p=0.01, seed=7)
EVERYTHING = Sampling(temperature=1.0, top_p=0.95, min_p=0.01, repetition_penalty=1.1, seed=7)


@dataclass(frozen=True, slots=True)
class Case:
    """`turns` prompts of `prompt` tokens each; K/V have room for `context` tokens at the last one."""

    shape: str  # a published size, "demo", or one of NARROW
    bits: int
    context: int
    prompt: int
    turns: int = 2
    rounds: int = 3
    drafts: int = DRAFT_TOKENS
    dtype: str = "float32"
    sampling: Sampling = GEMMA
    pretend: int = (
        0  # play the rounds as if so many rows were committed: what they attend to, without a prefill
    )


# Head counts and sizes of the published models, hardly any width: K/V, scores and logits are most of the memory.
NARROW: dict[str, dict[str, Any]] = {
    "heads_of_31b": {"num_heads": 32, "num_kv_heads": 16, "num_global_kv_heads": 4, "sliding_window": 1024},
    "heads_of_e2b": {"num_heads": 8, "num_kv_heads": 1, "num_global_kv_heads": 1, "sliding_window": 512},
}

CASES: dict[str, Case] = {
    "e2b_4bit": Case("e2b", 4, 4096, 32),
    "e2b_4bit_long_prompt": Case("e2b", 4, 4096, 520, turns=1, rounds=1),
    "e2b_8bit": Case("e2b", 8, 4096, 16),
    "e2b_4bit_bf16": Case("e2b", 4, 4096, 8, dtype="bfloat16"),
    "e2b_16bit_bf16": Case("e2b", 16, 4096, 8, turns=1, rounds=1, dtype="bfloat16"),
    "e4b_4bit": Case("e4b", 4, 32_768, 16),
    "12b_4bit": Case("12b", 4, 8192, 8, turns=2, rounds=2),
    "26b_4bit": Case("26b-a4b", 4, 4096, 8, turns=2, rounds=2),
    "quick": Case("heads_of_e2b", 4, 32_768, 64, rounds=0),
    "demo_32k": Case("demo", 16, 32_000, 31_900, turns=1),
    "31b_heads_32k": Case("heads_of_31b", 4, 32_768, 1300),
    "31b_heads_128k": Case("heads_of_31b", 4, 131_072, 64),
    "e2b_heads_128k": Case("heads_of_e2b", 4, 131_072, 1300),
    "31b_heads_late_rounds": Case("heads_of_31b", 4, 32_768, 64, turns=1, rounds=1, pretend=32_000),
    "thresholds_sampled": Case("heads_of_e2b", 4, 4096, 64, sampling=THRESHOLDS),
    "gemma_sampled": Case("heads_of_e2b", 4, 4096, 64),
    "everything_sampled": Case("heads_of_e2b", 4, 4096, 64, sampling=EVERYTHING),
}


def narrow(name: str) -> tuple[TargetConfig, DrafterConfig]:
    """A target and drafter of 4 layers with the named heads, 512 wide, with the published vocabulary."""
    size = {"heads_of_31b": "31b", "heads_of_e2b": "e2b"}[name]
    target, drafter = configs_of(size)
    small: dict[str, Any] = {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "layer_types": (SLIDING, FULL, FULL, FULL),
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "per_layer_input_dim": 0,
        "per_layer_vocab_size": 0,
        **NARROW[name],
    }
    text: TextConfig = replace(target.text, **small)
    return replace(target, text=text), replace(drafter, backbone_hidden_size=512)


def made_up(config: TargetConfig | DrafterConfig, formats: Formats, dtype: mx.Dtype, seed: int) -> Tensors:
    """Random tensors in the formats that are estimated, made one at a time."""
    tensors: dict[str, Any] = {}
    for number, (name, shape) in enumerate(expected_tensors(config).items()):
        form = formats.of(name, shape) if len(shape) > 1 else None
        key = mx.random.key(seed * 10_000 + number)
        if name == ORDERING:
            tensors[name] = mx.arange(shape[0], dtype=mx.uint32)
        elif form is not None:
            tensors[name] = quantised_matrix(shape, dtype, np.random.default_rng((seed, number)), form.bits)
        elif len(shape) == 1:
            tensors[name] = mx.random.uniform(0.8, 1.2, shape, key=key).astype(dtype)
        else:
            tensors[name] = DenseWeight(cheap_matrix(shape, dtype))
        value = tensors[name]
        mx.eval(value if isinstance(value, mx.array) else value.arrays)
    return tensors


def cheap_matrix(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """[..., K] of small numbers that differ, without random numbers of the matrix's size."""
    rows = mx.sin(mx.arange(shape[-2], dtype=mx.float32) * 0.37)[:, None].astype(dtype)
    columns = mx.sin(mx.arange(shape[-1], dtype=mx.float32) * 0.73).astype(dtype)
    matrix = rows * columns * mx.array(shape[-1] ** -0.5, dtype)
    return mx.contiguous(mx.broadcast_to(matrix, shape))


def demo_folder(part: str) -> Path:
    return Path(str(files("mlx_mtp.demo"))) / part


def configs_of_case(case: Case) -> tuple[TargetConfig, DrafterConfig]:
    """Target and drafter; nothing but configurations is read."""
    if case.shape == "demo":
        return read_target_config(demo_folder("target")), read_drafter_config(demo_folder("drafter"))
    return narrow(case.shape) if case.shape in NARROW else configs_of(case.shape)


def estimate_of(case: Case) -> MemoryEstimate:
    """What is estimated for a case."""
    target, drafter = configs_of_case(case)
    return estimate_memory(
        target,
        case.context,
        bits=case.bits,
        drafter=drafter,
        drafter_bits=case.bits,
        dtype=case.dtype,
        turns=case.turns,
        prompt=case.prompt,
        wide_sampling=case.sampling.penalises or not sampler_class([case.sampling]).candidates,
    )


def load_case(case: Case) -> tuple[Target, Drafter]:
    """The pair of a case, in memory."""
    dtype = DTYPES[case.dtype]
    config, small_config = configs_of_case(case)
    if case.shape == "demo":
        tensors = read_target(demo_folder("target"), dtype=dtype).tensors
        small_tensors = read_drafter(demo_folder("drafter"), dtype=dtype).tensors
        return make_target(config, tensors), make_drafter(small_config, small_tensors)
    forms = [formats_of_bits(case.bits, expected_tensors(own), dtype.size) for own in (config, small_config)]
    target = make_target(config, made_up(config, forms[0], dtype, 1))
    return target, make_drafter(small_config, made_up(small_config, forms[1], dtype, 2))


def resident() -> dict[str, int]:
    """The kernel's figures for this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = (line.split() for line in lines if line.startswith(("VmHWM", "VmRSS", "RssAnon", "RssFile")))
    return {field[0].rstrip(":"): int(field[1]) * 1024 for field in fields}


def reset_peaks() -> None:
    mx.reset_peak_memory()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now


def turn_state(target: Target, case: Case, ids: list[int], kv: Any, hidden: mx.array) -> State:
    state = State(
        kv=kv,
        length=mx.array([len(ids)], mx.int32),
        last=mx.zeros((1,), mx.uint32),
        hidden=hidden,
        drafts=no_drafts(1),
        seed=mx.array([7], mx.uint32),
        sampling=sampling_arrays(case.sampling, target.text.vocab_size),
        counts=mx.zeros((1, 2, target.text.vocab_size), mx.int32) if case.sampling.penalises else None,
        active=mx.array([True]),
    )
    if case.pretend:
        state = state._replace(length=mx.array([case.pretend], mx.int32))
    token, valid = first_token(target, state, sampler_class([case.sampling]))
    state = state._replace(last=token, active=valid)
    mx.eval(state)
    return state


def converse(target: Target, drafter: Drafter, case: Case) -> dict[str, int]:
    """All turns -> the peaks of MLX's arrays in bytes, by phase."""
    rng = np.random.default_rng(3)
    history, tokens = History(target), list[int]()
    rounds = Rounds(target, drafter)
    peaks = {"prefill": 0, "rounds": 0}
    for turn in range(case.turns):
        ids = [*tokens, *map(int, rng.integers(3, target.text.vocab_size, case.prompt))]
        held = case.context - (case.turns - 1 - turn) * (case.context // 8)  # so that K/V grow at each turn
        mx.reset_peak_memory()
        kv, hidden, _ = history.extend(ids, room=max(8, held - len(ids)), boundaries=[len(ids) - 2])
        peaks["prefill"] = max(peaks["prefill"], mx.get_peak_memory())
        mx.reset_peak_memory()
        cell = StateCell(turn_state(target, case, ids, kv, hidden))
        del kv, hidden
        limits = [RowLimits(10_000, frozenset())]
        steps = decode(rounds, cell, limits, FixedPolicy(case.drafts), sampler_class([case.sampling]))
        emitted = list(next(steps).tokens[0])
        for _ in range(case.rounds):
            emitted += next(steps).tokens[0]
        steps.close()
        mx.synchronize()
        peaks["rounds"] = max(peaks["rounds"], mx.get_peak_memory())
        tokens = [*ids, *emitted] if not case.pretend else ids
        history.keep(tokens, cell.take().kv)
    return peaks


def run_case(name: str) -> dict[str, Any]:
    """One case in this process."""
    case = CASES[name]
    mx.set_default_device(mx.cpu)
    base = resident()["VmRSS"]
    started = time.perf_counter()
    target, drafter = load_case(case)
    estimate = estimate_of(case)
    weights = mx.get_active_memory()
    reset_peaks()
    peaks = converse(target, drafter, case)
    kernel = resident()
    arrays, process = max(peaks.values()), kernel["VmHWM"]
    kept = estimate.weights + estimate.drafter + estimate.kv + estimate.checkpoints
    return {
        "case": {
            "shape": case.shape,
            "bits": case.bits,
            "dtype": case.dtype,
            "context": case.context,
            "prompt": case.prompt,
            "turns": case.turns,
        },
        "estimate MiB": {part: mib(size) for part, size in estimate.lines()} | {"total": mib(estimate.total)},
        "estimated scratch MiB": {"prefill": mib(estimate.prefill), "rounds": mib(estimate.rounds)},
        "measured MiB": {
            "weights and drafter": mib(weights),
            "arrays": mib(arrays),
            "scratch of prefill": mib(peaks["prefill"] - kept),
            "scratch of rounds": mib(peaks["rounds"] - kept),
            "process": mib(process),
            "of it mapped files": mib(kernel["RssFile"]),
            "process before the weights": mib(base),
        },
        **ratios(estimate, arrays, process),
        "seconds": rounded(time.perf_counter() - started),
    }


def ratios(estimate: MemoryEstimate, arrays: float, process: float) -> dict[str, float]:
    return {
        "estimate / process": rounded(estimate.total / process),
        "estimate without overhead / arrays": rounded((estimate.total - estimate.overhead) / arrays),
    }


def comparison(results: dict[str, Any]) -> tuple[str, list[str]]:
    """Recorded peaks beside what is estimated now -> a table, and the cases whose process is not within 15 %."""
    lines = [
        "| Case | Estimate, MiB | Process, MiB | Estimate / process | Arrays, MiB | Estimate / arrays |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    off = []
    for name, result in results.items():
        estimate, measured = estimate_of(CASES[name]), result["measured MiB"]
        of_process, of_arrays = ratios(estimate, measured["arrays"] * MIB, measured["process"] * MIB).values()
        lines.append(
            f"| {name} | {estimate.total / MIB:,.0f} | {measured['process']:,.0f} | {of_process:.2f} | "
            f"{measured['arrays']:,.0f} | {of_arrays:.2f} |"
        )
        off += [name] if abs(of_process - 1) > 0.15 else []
    return "\n".join(lines), off


def mib(size: int) -> float:
    return rounded(size / MIB)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}")
    parser.add_argument("--list", action="store_true", help="print the cases and their estimates and end")
    parser.add_argument(
        "--json", type=Path, help="also write the record here; cases that it has already are kept"
    )
    parser.add_argument(
        "--again", action="store_true", help="compare what --json has with the estimate of today"
    )
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        print(json.dumps(run_case(args.cases[0])))
        return
    if args.list:
        print("\n".join(f"{name}: {case}" for name, case in CASES.items()))
        return
    results: dict[str, Any] = {}
    if args.json and args.json.is_file():
        results = json.loads(args.json.read_text())["results"]
    if args.again:
        table, off = comparison(results)
        print(table)
        if off or not results:
            sys.exit(
                f"not within 15 % of the process that was measured: {', '.join(off) or 'nothing is recorded'}"
            )
        return
    for name in args.cases:
        command = [sys.executable, __file__, name, "--here"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: {json.dumps(results[name], indent=1)}", flush=True)
        save(record("peak memory beside its estimate", {}, results), args.json)


if __name__ == "__main__":
    main()
