"""The estimate of memory: its parts against arrays that are really made, its sum against recorded and live peaks."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_mtp.aliases import ALIASES
from mlx_mtp.checkpoint import read_drafter, read_target
from mlx_mtp.config_parse import parse_drafter_config, parse_target_config
from mlx_mtp.errors import CheckpointError, MtpError, ParameterError
from mlx_mtp.memory import estimate_memory
from mlx_mtp.memory_parts import attention_scratch_bytes, ring_bytes
from mlx_mtp.published_configs import SIZES, published_drafter, published_target
from mlx_mtp.quantize import quantize_checkpoint
from mlx_mtp.state import capacity_for, new_kv
from mlx_mtp.tensor_names import parameter_count
from mlx_mtp.turns import CHECKPOINT_BYTES, History
from mlx_mtp.weights import DenseWeight
from pairs import VARIANTS, golden_pair
from tiny_checkpoints import (
    KINDS,
    drafter_config,
    mlx_names,
    random_tensors,
    target_config,
    write_checkpoint,
    write_drafter,
    write_target,
)

BENCH = Path(__file__).parent.parent / "bench"
CONTEXTS = (4096, 32_768, 131_072)
PRECISIONS = ((4, None), (4, 8), (8, None), (16, None))
GB = 10**9


def held(tensors: Any) -> int:
    """Bytes of loaded tensors; a dense matrix's transposed view is no second copy."""
    total = 0
    for value in tensors.values():
        arrays = [value] if isinstance(value, mx.array) else value.arrays
        total += sum(array.nbytes for array in (arrays[:1] if isinstance(value, DenseWeight) else arrays))
    return total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_weights_are_counted_to_the_byte(tmp_path: Path, kind: str, bits: int) -> None:
    """Against the tensors that are loaded from a folder, as published and as we quantise it."""
    folder = write_target(tmp_path / "target", kind)
    if bits != 16:
        folder = quantize_checkpoint(folder, tmp_path / "quantised", bits=bits)
    for dtype, name in ((mx.float32, "float32"), (mx.bfloat16, "bfloat16")):
        loaded = held(read_target(folder, dtype=dtype).tensors)
        assert estimate_memory(folder, 64, dtype=name).weights == loaded
        assert estimate_memory(str(folder), 64, dtype=dtype).weights == loaded
        # from the unquantised model's config, as before a download
        assert estimate_memory(target_config(kind), 64, bits=bits, dtype=name).weights == loaded


@pytest.mark.parametrize(
    "kind", ["31b", "e2b"]
)  # the second is 32 wide, and what groups do not divide stays dense
@pytest.mark.parametrize("num_centroids", [0, 32])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_drafters_are_counted_to_the_byte(tmp_path: Path, kind: str, bits: int, num_centroids: int) -> None:
    folder = write_drafter(tmp_path / "drafter", kind, num_centroids=num_centroids)
    if bits != 16:
        folder = quantize_checkpoint(folder, tmp_path / "quantised", bits=bits)
    loaded = held(read_drafter(folder, dtype=mx.bfloat16).tensors)
    drafter = parse_drafter_config(drafter_config(kind, num_centroids=num_centroids), "tiny")
    estimate = estimate_memory(target_config(kind), 64, bits=4, drafter=drafter, drafter_bits=bits)
    assert estimate.drafter == loaded


def test_formats_of_single_matrices_in_config_json_are_followed(tmp_path: Path) -> None:
    """Another format, another mode, and a matrix left dense."""
    config = target_config("31b")
    tensors = random_tensors(config, dtype=mx.bfloat16)
    stored = mlx_names(tensors, "language_model.model.", {"bits": 4, "group_size": 32})
    quantization: dict[str, Any] = {"bits": 4, "group_size": 32}
    for path, form in (
        ("layers.0.mlp.up_proj", {"bits": 8, "group_size": 64}),
        ("layers.1.self_attn.q_proj", {"bits": 4, "group_size": 32, "mode": "mxfp4"}),
        ("layers.2.mlp.down_proj", None),
    ):
        full = f"language_model.model.{path}"
        stored = {name: value for name, value in stored.items() if not name.startswith(f"{full}.")}
        quantization[full] = False if form is None else form
        parts = [tensors[path]] if form is None else mx.quantize(tensors[path], **form)
        stored |= {
            f"{full}.{part}": value
            for part, value in zip(("weight", "scales", "biases"), parts, strict=False)
        }
    folder = write_checkpoint(tmp_path / "mixed", {**config, "quantization": quantization}, stored)
    assert estimate_memory(folder, 64).weights == held(read_target(folder).tensors)
    plain = estimate_memory({**config, "quantization": {"bits": 4, "group_size": 32}}, 64).weights
    assert estimate_memory(folder, 64).weights != plain


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size: str) -> None:
    """At 16 bits: two bytes for every parameter; quantised: half a bit a weight more than the bits."""
    target = parse_target_config(published_target(size), size)
    drafter = parse_drafter_config(published_drafter(size), size)
    dense = estimate_memory(size, bits=16)
    ordering = 4 * 262_144 if drafter.num_centroids else 0
    assert dense.weights == 2 * parameter_count(target)
    assert dense.drafter == 2 * parameter_count(drafter) + ordering
    for bits in (4, 8):
        quantised = estimate_memory(size, bits=bits)
        assert 1 <= quantised.weights * 8 / parameter_count(target) / (bits + 0.5) < 1.01
        assert 1 <= (quantised.drafter - ordering) * 8 / parameter_count(drafter) / 4.5 < 1.02


def test_weight_files_of_the_published_models() -> None:
    """Their sizes as their pages give them; what is not loaded is the towers for images and sound."""
    known = [alias for alias in ALIASES if alias.download_gb is not None]
    assert len(known) >= 10
    for alias in known:
        weights = estimate_memory(alias.name).weights / GB
        towers = 0.1 if alias.size == "12b" else 1.3
        assert alias.download_gb is not None
        assert -0.06 <= alias.download_gb - weights <= towers, (alias.name, weights)


@pytest.mark.parametrize("variant", VARIANTS)
def test_kv_and_checkpoints_are_counted_to_the_byte(variant: str) -> None:
    """Against the buffers, and against what a conversation keeps of them."""
    pair = golden_pair(variant, drafter=None)
    text, item = pair.target.text, pair.target.dtype.size
    estimate = estimate_memory(pair.target.config, 300, dtype=pair.target.dtype, turns=1)
    assert estimate.kv == sum(b.nbytes for both in new_kv(pair.target, capacity_for(300)) for b in both)
    history = History(pair.target)
    history.extend(list(range(3, 43)), room=8, boundaries=[30])
    assert estimate.checkpoints == sum(c.nbytes for c in history._checkpoints) == ring_bytes(text, item)


def test_checkpoints_stay_in_their_budget() -> None:
    for size in SIZES:
        one = estimate_memory(size, 131_072, turns=1).checkpoints
        many = estimate_memory(size, 131_072).checkpoints
        assert one <= many <= max(one, CHECKPOINT_BYTES)
        assert estimate_memory(size, 131_072, turns=0).checkpoints == 0


@pytest.mark.parametrize("size", SIZES)
def test_mtp_adds_at_most_a_tenth(size: str) -> None:
    for bits, mlp_bits in PRECISIONS:
        for context in CONTEXTS:
            for batch, drafter_bits in ((1, "auto"), (1, None), (4, "auto")):
                asked: dict[str, Any] = {"bits": bits, "mlp_bits": mlp_bits, "drafter_bits": drafter_bits}
                estimate = estimate_memory(size, context, batch, **asked)
                assert 0 < estimate.mtp_share <= 0.1, (asked, context, batch)
                without = estimate_memory(size, context, batch, drafter=None, **asked)
                assert without.total == estimate.plain and without.mtp_share == 0


def test_more_of_anything_takes_more() -> None:
    base = estimate_memory("e4b:4bit", 4096)
    assert base.total < estimate_memory("e4b:4bit", 8192).total
    assert base.total < estimate_memory("e4b:4bit", 4096, 2).total
    assert base.total < estimate_memory("e4b:8bit", 4096).total < estimate_memory("e4b:bf16", 4096).total
    assert base.total < estimate_memory("e4b:4bit", 4096, drafter_bits=None).total
    assert estimate_memory("e4b:bf16", dtype="float32").weights == 2 * estimate_memory("e4b:bf16").weights
    assert base.prefill > estimate_memory("e4b:4bit", 4096, prompt=16).prefill
    assert sum(size for _, size in base.lines()) == base.total


def test_names_of_models(tmp_path: Path) -> None:
    assert estimate_memory("e4b") == estimate_memory("e4b:4bit") == estimate_memory("e4b", bits=4, mlp_bits=8)
    assert estimate_memory("26b", bits=8, mlp_bits=8) == estimate_memory("26b-a4b", bits=8)
    (tmp_path / "config.json").write_text(json.dumps(published_target("12b")))
    assert (
        estimate_memory(tmp_path) == estimate_memory("12b:bf16") == estimate_memory(published_target("12b"))
    )
    for wrong in ("70b", "e4b:3bit", "", "org/name"):
        with pytest.raises(ParameterError, match="alias"):
            estimate_memory(wrong)
    with pytest.raises(CheckpointError):
        estimate_memory(tmp_path / "nothing here")
    with pytest.raises(MtpError):
        estimate_memory({})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"context": 0}, "context"),
        ({"context": 4096.0}, "context"),
        ({"batch": True}, "batch"),
        ({"bits": 5}, "bits"),
        ({"mlp_bits": 3}, "mlp_bits"),
        ({"drafter_bits": 2}, "drafter_bits"),
        ({"dtype": "int8"}, "dtype"),
        ({"dtype": mx.int32}, "dtype"),
        ({"turns": -1}, "turns"),
        ({"prompt": 0}, "prompt"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ParameterError, match=says):
        estimate_memory("e2b", **options)


def bench(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_tables_in_the_document_are_those_of_today() -> None:
    done = bench("memory_table.py", "--check")
    assert done.returncode == 0, done.stderr


def test_recorded_peaks_are_within_15_percent_of_the_estimate_of_today() -> None:
    file = BENCH / "results/memory_peaks.json"
    measured = {"e2b_4bit", "e2b_8bit", "e4b_4bit", "12b_4bit", "26b_4bit", "demo_32k", "31b_heads_128k"}
    assert measured <= json.loads(file.read_text())["results"].keys()
    done = bench("memory_peaks.py", "--again", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("case", ["quick", pytest.param("everything_sampled", marks=pytest.mark.slow)])
def test_a_live_peak_is_within_15_percent(case: str) -> None:
    done = bench("memory_peaks.py", case, "--here")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert abs(found["estimate / process"] - 1) <= 0.15, found


@pytest.mark.parametrize("size", SIZES)
def test_attention_of_ours_is_counted_where_it_may_run(size: str) -> None:
    """On a GPU the partitions of a layer, where they are more than stock's scores; on a CPU no kernel of ours runs."""
    text = parse_target_config(published_target(size), size).text
    for context, batch in ((4096, 1), (131_072, 1), (32_768, 4)):
        scratch = attention_scratch_bytes(text, context, batch, 9)
        logits = 3 * 4 * 9 * batch * text.vocab_size
        on_gpu = estimate_memory(size, context, batch, bits=4).rounds
        on_cpu = estimate_memory(size, context, batch, bits=4, dtype="float32").rounds
        assert on_gpu == max(on_cpu, logits + scratch)
    assert on_gpu > on_cpu


def test_attention_of_31b_at_128k() -> None:
    """Per row and key of 32 heads: a weight, 2 sums in 256 of 512 values, an eighth of a peak and a total."""
    text = parse_target_config(published_target("31b"), "31b").text
    per_key = 4 * (1 + 512 / 256 + 2 / 16 + 2 / 256)
    assert attention_scratch_bytes(text, 131_072, 1, 8) == 8 * 32 * 131_072 * per_key
