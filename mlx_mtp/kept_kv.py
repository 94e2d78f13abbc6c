"""A conversation's K/V on the disk, so that taking it up again reads no prompt: for the model that computed it alone.

One safetensors file: the buffers as they are, the newest checkpoint's rings, the tokens. Whoever keeps it notes the
digest that `save_kv` gives; a file of which one byte is another is refused by `load_kv` before MLX sees it, and so is
one of another model, shape or version. What is refused costs a prefill and nothing else.
"""

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import cast

import mlx.core as mx
from safetensors import safe_open

from mlx_mtp.config import FULL, SLIDING, TextConfig
from mlx_mtp.errors import CheckpointError, StorageError
from mlx_mtp.headers import read_header
from mlx_mtp.pair import Pair
from mlx_mtp.pressure import Guard
from mlx_mtp.profiles import key_of
from mlx_mtp.state import RING_SLACK, kv_shapes
from mlx_mtp.store import make_folder, sync_folder
from mlx_mtp.turns import Checkpoint, Contents, History
from mlx_mtp.whole_folder import check_free, storage_errors

FORMAT = "mlx-mtp kv 1"
FIELDS = ("format", "model", "rows", "written", "checkpoint_length", "checkpoint_written")
DTYPES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}
READ_AT_ONCE = 1 << 20  # bytes
Shapes = dict[str, tuple[tuple[int, ...], str]]


def model_key(pair: Pair) -> str:
    """What computed K/V, for certain: weights, their formats, MLX, and which operations are ours; a hash."""
    key = asdict(key_of(pair))
    computed_by = {name: key[name] for name in ("mlx", "checkpoint", "quantisation", "kernels")}
    return hashlib.sha256(json.dumps(computed_by, sort_keys=True).encode()).hexdigest()


def save_kv(path: Path, history: History, pair: Pair) -> tuple[str, int]:
    """Keep what `history` has, in one step, readable by its owner alone -> the file's SHA-256 and its bytes.

    Raises StorageError, also where there is nothing to keep.
    """
    contents = history.contents
    if contents is None:
        raise StorageError("there is no K/V yet; it can be kept after the next reply")
    arrays, about = _arrays(contents), _about(contents, model_key(pair))
    make_folder(path.parent)
    check_free(path.parent, sum(array.nbytes for array in arrays.values()), "the conversation's K/V")
    temporary = None
    with storage_errors(path.parent):
        try:
            # Made with 0600, which stays when MLX writes into it.
            descriptor, temporary = tempfile.mkstemp(".safetensors", f".{path.name}.", path.parent)
            os.close(descriptor)
            _write(temporary, arrays, about)
            digest, size = _digest(Path(temporary)), os.path.getsize(temporary)
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            if temporary is not None:
                with suppress(OSError):  # gone already where all went well
                    os.unlink(temporary)
    return digest, size


def load_kv(path: Path, history: History, pair: Pair, digest: str) -> int:
    """Put kept K/V in the place of what `history` has -> rows taken over.

    Raises StorageError where the file is not the one with this digest, or another model's, and MemoryRefusal where it
    does not fit now; the history is then as it was.
    """
    try:
        if not path.is_file():
            raise StorageError(f"{path.name} is missing")
        if _digest(path) != digest:
            raise StorageError(f"{path.name} is not as it was written")
        found = {info.name: (info.shape, info.dtype) for info in read_header(path)}
        with safe_open(path, framework="numpy") as opened:
            about = opened.metadata() or {}
    except OSError as error:
        raise StorageError(f"{path.name} cannot be read ({error.strerror or error})") from None
    except CheckpointError:
        raise StorageError(f"{path.name} is damaged") from None
    if set(about) != set(FIELDS) or about["format"] != FORMAT:
        raise StorageError(f"{path.name} was written by another version of this program")
    if about["model"] != model_key(pair):
        raise StorageError(f"{path.name} was computed by another model, or otherwise")
    contents = _checked(path, found, about, pair)
    history.take_over(contents)
    return contents.rows


def _arrays(contents: Contents) -> dict[str, mx.array]:
    arrays = {"tokens": mx.array(contents.tokens, mx.uint32)}
    for i, (keys, values) in enumerate(contents.kv):
        arrays |= {f"kv.{i}.keys": keys, f"kv.{i}.values": values}
    if contents.checkpoint is not None:
        for i, (keys, values) in contents.checkpoint.rings.items():
            arrays |= {f"ring.{i}.keys": keys, f"ring.{i}.values": values}
    return arrays


def _about(contents: Contents, model: str) -> dict[str, str]:
    last = contents.checkpoint
    numbers = (
        contents.rows,
        contents.written,
        0 if last is None else last.length,
        0 if last is None else last.written,
    )
    return dict(zip(FIELDS, (FORMAT, model, *map(str, numbers)), strict=True))


def _write(file: str, arrays: dict[str, mx.array], about: dict[str, str]) -> None:
    """Write, and look whether all of it arrived: MLX may not say that a disk is full."""
    try:
        mx.save_safetensors(file, arrays, about)
        read_header(Path(file))
    except (RuntimeError, CheckpointError) as error:
        raise StorageError(
            f"the K/V could not be written ({str(error)[:100]}); free some disk space and try again"
        ) from None
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(READ_AT_ONCE):
            digest.update(piece)
    return digest.hexdigest()


def _checked(path: Path, found: Shapes, about: dict[str, str], pair: Pair) -> Contents:
    """The file's contents, if they are what this model's K/V look like."""
    text, dtype = pair.target.text, DTYPES[pair.target.dtype]
    try:
        numbers = [int(about[name]) for name in FIELDS[2:]]
        has_checkpoint = any(name.startswith("ring.") for name in found)
        capacity, count = _sizes(found, text)
        expected = _expected(text, dtype, capacity, count, with_checkpoint=has_checkpoint)
    except (KeyError, ValueError, IndexError):
        raise StorageError(f"{path.name} holds something else") from None
    rows, written, length, checkpoint_written = numbers
    is_sound = (
        found == expected
        and 0 < rows <= capacity
        and rows in (count - 1, count)
        and rows <= written <= capacity + RING_SLACK
        and (not has_checkpoint or 0 < length <= rows)
        and length <= max(checkpoint_written, 0) <= capacity + RING_SLACK
        and count <= pair.max_context + 1
    )
    if not is_sound:
        raise StorageError(f"{path.name} holds something else")
    Guard().admit(path.stat().st_size)
    arrays = cast(dict[str, mx.array], mx.load(str(path)))
    mx.eval(arrays)
    tokens = cast(list[int], arrays["tokens"].tolist())
    if max(tokens) >= text.vocab_size:
        raise StorageError(f"{path.name} holds something else")
    layers = range(text.first_shared_layer)
    kv = tuple((arrays[f"kv.{i}.keys"], arrays[f"kv.{i}.values"]) for i in layers)
    rings = {
        i: (arrays[f"ring.{i}.keys"], arrays[f"ring.{i}.values"])
        for i in layers
        if f"ring.{i}.keys" in arrays
    }
    checkpoint = Checkpoint(length, checkpoint_written, rings) if has_checkpoint else None
    return Contents(tuple(tokens), rows, written, kv, checkpoint)


def _sizes(found: Shapes, text: TextConfig) -> tuple[int, int]:
    """The capacity of full layers and the number of tokens that a file claims."""
    return found[f"kv.{text.feeding_layers[FULL]}.keys"][0][2], found["tokens"][0][0]


def _expected(text: TextConfig, dtype: str, capacity: int, count: int, *, with_checkpoint: bool) -> Shapes:
    shapes: Shapes = {"tokens": ((count,), "U32")}
    kinds = text.layer_types[: text.first_shared_layer]
    for i, (kind, shape) in enumerate(zip(kinds, kv_shapes(text, 1, capacity), strict=True)):
        names = ["kv", "ring"] if with_checkpoint and kind == SLIDING else ["kv"]
        shapes |= {f"{name}.{i}.{part}": (shape, dtype) for name in names for part in ("keys", "values")}
    return shapes
