"""Quantising a checkpoint on disk, a slice of rows at a time, straight into the new files."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx
import numpy as np

from mlx_mtp.errors import CheckpointError, ParameterError
from mlx_mtp.finite import NOT_FINITE
from mlx_mtp.headers import INDEX, TensorInfo
from mlx_mtp.progress import OnProgress, Progress, silent
from mlx_mtp.quantize_plan import ITEM_BYTES, SHARD_BYTES, Job, Plan, Shard, make_plan
from mlx_mtp.whole_folder import building, check_free, publish, storage_errors

SLICE_BYTES = 16 << 20  # read at a time
MLX_TYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
# Beside config.json: what a prompt and the default sampling need.
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
)
Stamps = dict[Path, tuple[int, int]]


def quantize_checkpoint(
    folder: Path | str,
    out: Path | str,
    *,
    bits: int,
    group_size: int = 64,
    on_progress: OnProgress = silent,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write an MLX-quantised copy of a dense Gemma 4 target or drafter to the new folder `out`; -> `out`.

    Names, formats and config.json are those of mlx-lm's own conversion (routers stay at 8 bits); vision and audio
    towers are left behind. Rows pass through memory 16 MB at a time, so the peak is below 150 MB plus what
    importing MLX takes, whatever the model's size. The folder appears complete or not at all. Progress is in bytes
    of the source. Raises CheckpointError (damaged, already quantised, NaN or Inf), ParameterError, StorageError.
    """
    folder, out = Path(folder), Path(out)
    plan = make_plan(folder, bits, group_size, shard_bytes)
    refuse_existing(out)
    with building(out) as partial:
        refuse_existing(out)
        write_plan(plan, partial, on_progress)
        publish(partial, out)
    return out


def refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise ParameterError(f"{out}: exists already; remove it, or choose another folder for the result")


def write_plan(plan: Plan, partial: Path, on_progress: OnProgress) -> None:
    """Everything the new checkpoint holds, into an existing folder."""
    check_free(partial.parent, plan.nbytes, f"the quantised copy of {plan.folder}")
    before = stamps(plan)
    done = 0
    for shard in plan.shards:
        for amount in write_shard(shard, partial / shard.name):
            on_progress(Progress("quantize", f"quantising {plan.folder.name}", done, plan.source_bytes))
            done += amount
    if stamps(plan) != before:
        raise CheckpointError(f"{plan.folder}: its files changed while they were read; try again")
    with storage_errors(partial.parent):
        copy_others(plan.folder, partial)
        write_json(partial / "config.json", plan.config)
        write_json(partial / INDEX, plan.index)
    on_progress(Progress("quantize", f"quantised {plan.folder.name}", done, plan.source_bytes))


def write_shard(shard: Shard, file: Path) -> Iterator[int]:
    """Write one file, yielding after each slice the bytes that were read for it."""
    # Unbuffered, because every write is at a place of its own. What the reader of this iterator raises is not seen
    # here, so all system errors are of reading, which `read_slices` turns into its own, or of writing.
    with storage_errors(file.parent.parent), file.open("wb", buffering=0) as new:
        write_at(new, shard.header, 0)
        for job in shard.jobs:
            yield from write_job(job, shard, new)


def write_job(job: Job, shard: Shard, new: BinaryIO) -> Iterator[int]:
    """Quantise or copy one tensor's rows, slice by slice."""
    row = 0
    for data in read_slices(job):
        check_finite(data, job.part.info.dtype, job.part.info)
        for tensor, values in zip(job.made, convert(job, data), strict=True):
            check_finite(values, tensor.dtype, job.part.info)
            write_at(new, values.data.cast("B"), shard.offsets[tensor.name] + row * tensor.row_bytes)
        row += data.nbytes // (job.shape[-1] * ITEM_BYTES[job.part.info.dtype])
        yield data.nbytes
    mx.clear_cache()  # buffers of this matrix's sizes, which the next has no use for


def read_slices(job: Job) -> Iterator[np.ndarray]:
    """The stored rows as flat unsigned integers, at most `SLICE_BYTES` (or one row) at a time."""
    info = job.part.info
    row_bytes = job.shape[-1] * ITEM_BYTES[info.dtype]
    at_once = max(1, SLICE_BYTES // row_bytes)
    with open_source(info.file) as stream:
        for offset, rows in job.runs():
            stream.seek(offset)
            for first in range(0, rows, at_once):
                data = np.empty(min(at_once, rows - first) * row_bytes, np.uint8)
                read_exactly(stream, data, info)
                yield data


def open_source(file: Path) -> BinaryIO:
    try:
        return file.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); download it again") from error


def read_exactly(stream: BinaryIO, data: np.ndarray, info: TensorInfo) -> None:
    """Fill `data`; a raw read may give less than it was asked for."""
    rest = data.data
    try:
        while rest:
            got = stream.readinto(rest)  # type: ignore[attr-defined]
            if not got:
                raise CheckpointError(f"{info.file}: became shorter while it was read; download it again")
            rest = rest[got:]
    except OSError as error:
        raise CheckpointError(f"{info.file}: cannot be read ({error.strerror}); download it again") from error


def convert(job: Job, data: np.ndarray) -> tuple[np.ndarray, ...]:
    """Bytes of stored rows -> arrays of unsigned integers to write, one for each tensor that is made."""
    dtype = job.part.info.dtype
    if job.form is None and dtype == job.made[-1].dtype:
        return (data,)
    unsigned = np.uint32 if ITEM_BYTES[dtype] == 4 else np.uint16
    rows = mx.array(data.view(unsigned)).view(MLX_TYPES[dtype]).reshape(-1, job.shape[-1])
    rows = rows.astype(MLX_TYPES[job.made[-1].dtype])
    parts = [rows] if job.form is None else mx.quantize(rows, job.form.group_size, job.form.bits)
    plain = [part.view(mx.uint32 if part.itemsize == 4 else mx.uint16) for part in parts]
    mx.eval(plain)
    return tuple(np.array(part, copy=False) for part in plain)


def check_finite(values: np.ndarray, dtype: str, info: TensorInfo) -> None:
    """Refuse NaN and Inf, in what was read as in what became of it."""
    if dtype not in NOT_FINITE:
        return
    unsigned, mask = NOT_FINITE[dtype]
    if ((values.reshape(-1).view(unsigned) & mask) == mask).any():
        raise CheckpointError(
            f"{info.file}: weights must be finite, {info.name} holds NaN or Inf, or values too large for "
            f"{dtype}; download the model again"
        )


def write_at(new: BinaryIO, data: bytes | memoryview, offset: int) -> None:
    """All of `data` at `offset`; the system may write less at a time."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(new.fileno(), rest, offset)
        rest, offset = rest[written:], offset + written


def stamps(plan: Plan) -> Stamps:
    """Size and time of change of every file that is read."""
    files = {info.file for info in plan.sources().values()}
    return {file: (file.stat().st_size, file.stat().st_mtime_ns) for file in files}


def copy_others(folder: Path, partial: Path) -> None:
    """Tokenizer, chat template, default sampling and licence; links become files."""
    for name in COPIED:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, partial / name)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=4) + "\n", encoding="utf-8")
