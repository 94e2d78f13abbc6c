"""Which weight files a folder has and what their headers say, checked before MLX opens any of them."""

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mlx_mtp.config_fields import shown_name
from mlx_mtp.errors import CheckpointError
from mlx_mtp.model_files import own_file, read_json

FLOATS = ("F32", "F16", "BF16")  # the types that weights, norms and scales may have
INDEX = "model.safetensors.index.json"
OTHER_FORMATS = (".bin", ".pt", ".pth", ".npz", ".gguf", ".ckpt", ".pkl")
SHARD_OF = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")
LONGEST_HEADER = 16 << 20  # bytes, of 100 MB that the format allows; the largest Gemma's has below 1 MB
LONGEST_NAME = 255  # bytes that file systems allow
MOST_AXES = 8  # a shape of a million ones is sound to the format
DOWNLOAD = "download it again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as its file's header describes it; `offset` is from the start of the file, in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # the format's own name: "BF16", "U32", ...
    file: Path
    offset: int
    nbytes: int


def read_headers(folder: Path) -> tuple[dict[str, TensorInfo], list[str]]:
    """Every tensor of the model in `folder` by its name in the files, and warnings.

    Raises CheckpointError for a missing, damaged or duplicate file, before any weight is read.
    """
    files, warnings = weight_files(folder)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for info in read_header(file):
            if info.name in tensors:
                raise CheckpointError(
                    f"{folder}: every tensor must be in one file, got {shown_name(info.name)} in "
                    f"{tensors[info.name].file.name} and {file.name}; remove the file that does not belong"
                )
            tensors[info.name] = info
    return tensors, warnings


def weight_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The safetensors files that make up the model: those its index names, or model*.safetensors."""
    present = sorted(folder.glob("*.safetensors"))
    if own_file(folder, INDEX) is not None:
        named = indexed_files(folder)
        unused = [file.name for file in present if file not in named]
        return named, [
            f"not named by {INDEX}, so not read: {', '.join(map(shown_name, unused[:5]))}"
        ] if unused else []
    files = [file for file in present if file.name.startswith("model")] or present
    files = [file for file in files if own_file(folder, file.name) is not None]
    if not files:
        raise no_weights(folder)
    if len(files) > 1:
        check_shard_count(folder, files)
    return files, []


def indexed_files(folder: Path) -> list[Path]:
    """The shards that the index names, all inside the folder and present."""
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX}: must have a weight_map naming the shards; {DOWNLOAD}")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        is_plain = name.isprintable() and len(name) <= LONGEST_NAME
        if not is_plain or Path(name).name != name or "\\" in name or name in (".", ".."):
            raise CheckpointError(
                f"{folder / INDEX}: shards must lie beside the index, got {name!r:.120}; "
                "do not use this model unless you trust whoever made it"
            )
        if not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / INDEX}: shards must be .safetensors, got {name!r:.120}; {DOWNLOAD}"
            )
    missing = [name for name in names if own_file(folder, name) is None]
    if missing:
        raise CheckpointError(
            f"{folder}: the index names {len(names)} shards and {len(missing)} of them are missing "
            f"({', '.join(map(shown_name, missing[:5]))}); download the model again"
        )
    return [folder / name for name in names]


def check_shard_count(folder: Path, files: list[Path]) -> None:
    """Without an index, names such as model-00002-of-00003 must cover the whole count."""
    matches = [SHARD_OF.search(file.name) for file in files]
    total = {int(match[2]) for match in matches if match}
    have = {int(match[1]) for match in matches if match}
    if len(total) != 1 or None in matches or have != set(range(1, max(total) + 1)):
        raise CheckpointError(
            f"{folder}: {INDEX} is missing and the shards do not form one set "
            f"({', '.join(shown_name(file.name) for file in files[:5])}); download the model again"
        )


def no_weights(folder: Path) -> CheckpointError:
    others = sorted(file.name for file in folder.iterdir() if file.suffix in OTHER_FORMATS)
    if others:
        return CheckpointError(
            f"{folder}: weights must be .safetensors, got only {', '.join(map(shown_name, others[:3]))}, "
            "which may run code or is not supported; use a revision of the model with safetensors"
        )
    return CheckpointError(f"{folder}: has no .safetensors files; download the model again")


def read_header(file: Path) -> list[TensorInfo]:
    """The tensors of one file, its header validated by the safetensors reader."""
    try:
        refuse_obvious_damage(file)
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file}: damaged ({shown_name(str(error)[:120])}); {DOWNLOAD}") from None
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=no_name_twice)
    except (
        ValueError,
        RecursionError,
    ) as error:  # what is JSON to the safetensors reader may be none to Python's
        raise CheckpointError(f"{file}: damaged ({shown_name(str(error)[:120])}); {DOWNLOAD}") from None
    tensors = []
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            if len(shape) > MOST_AXES:
                raise CheckpointError(f"{file}: damaged (a tensor of {len(shape)} axes); {DOWNLOAD}")
            tensors.append(TensorInfo(name, shape, entry["dtype"], file, 8 + length + begin, end - begin))
    return tensors


def no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, refused where readers could differ about which of two entries of one name counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in the header")
    return found


def refuse_obvious_damage(file: Path) -> None:
    """Name the common accidents: an empty file, a web page or LFS pointer, a cut download."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(64)
    if size == 0:
        raise CheckpointError(f"{file}: is empty; {DOWNLOAD}")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{file}: is a Git LFS pointer, not the weights; run `git lfs pull` or {DOWNLOAD}"
        )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{file}: is a web page, not weights; {DOWNLOAD}")
    length = int.from_bytes(start[:8], "little")
    if size < 8 or 8 + length > size or length > LONGEST_HEADER:
        raise CheckpointError(
            f"{file}: the header claims {length} bytes and the file has {size}; "
            f"it was cut short or is not safetensors; {DOWNLOAD}"
        )
