"""A pair's files with hostile numbers, types, names and bytes in them, and a trial of what loading makes of them."""

import json
import resource
import struct
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from mlx_mtp import load
from mlx_mtp.errors import MtpError
from mlx_mtp.turns import History

MOST_BYTES = 300 << 20  # of growth over a whole run; the hostile numbers ask for terabytes
MOST_SECONDS = 5.0  # for one example, on a busy machine

NUMBERS = st.sampled_from(
    [-1, 0, 1, 2, 3, 7, 64, 2**16, 2**31 - 1, 2**31, 2**32, 2**62, 2**63, 2**64, 10**12, 10**400, -(2**63)]
)
FLOATS = st.sampled_from(
    [0.0, -0.0, 0.5, -1.5, 4.0, 1e-300, 1e300, float("nan"), float("inf"), float("-inf")]
)
TEXTS = st.sampled_from(
    [
        "",
        "x",
        "F32",
        "U8",
        "full_attention",
        "../x",
        "/etc/passwd",
        "a\0b",
        "\ud800",
        "a" * 5000,
        "\x1b[2J",
        "a\nb",
        "gemma4",
    ]
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    FLOATS,
    TEXTS,
    st.sampled_from(
        [
            [],
            {},
            [[]],
            [None],
            [-1],
            ["x"],
            [2**70],
            {"x": None},
            [{}],
            {"0": {"head_dim": 10**9}},
            [1] * 5000,
        ]
    ),
)


def everywhere(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON tree; only the first four of a long list or object."""
    found = [path] if path else []
    if isinstance(value, dict):
        keys = list(value)
    else:
        keys = list(range(len(value))) if isinstance(value, list) else []
    for key in keys if len(keys) < 60 else keys[:4]:
        found += everywhere(value[key], (*path, key))
    return found


def changed(tree: Any, path: tuple[Any, ...], value: Any, how: str) -> Any:
    """A copy of `tree` with the value at `path` replaced, removed, renamed or put into a list."""
    tree = deepcopy(tree)
    place = tree
    for key in path[:-1]:
        place = place[key]
    if how == "remove" or (how == "rename" and not isinstance(place, dict)):
        del place[path[-1]]
    elif how == "rename":
        place[str(value)] = place.pop(path[-1])
    else:
        place[path[-1]] = [place[path[-1]]] if how == "wrap" else value
    return tree


@st.composite
def spoiled(draw: st.DrawFn, tree: Any) -> Any:
    """`tree` with one to three changes."""
    for _ in range(draw(st.integers(1, 3))):
        paths = everywhere(tree)
        if not paths:
            break
        how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "wrap", "rename"]))
        tree = changed(tree, draw(st.sampled_from(paths)), draw(VALUES), how)
    return tree


def peak_bytes() -> int:
    """The most memory this process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_short_line(message: str) -> bool:
    return 0 < len(message) < 2000 and not set("\n\r\x1b") & set(message)


class Trial:
    """A pair in a folder of its own, whose files one example after another replaces."""

    def __init__(self, folder: Path):
        self.target = folder / "target"
        self.drafter = folder / "drafter"
        self.files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.loaded = self.refused = 0
        load(self.target)  # what the first load takes for good is not the examples'
        self._before = peak_bytes()

    def json(self, path: Path) -> Any:
        return json.loads(self.files[path])

    def run(self, *, is_alone: bool = False, **files: bytes) -> str | None:
        """Load the pair, or the target alone, with these files instead (`target__config_json`: its config.json).

        -> the refusal, None where a pair came of it.
        """
        names = {f"{path.parent.name}__{path.name.replace('.', '_')}": path for path in self.files}
        for name, content in files.items():
            names[name].write_bytes(content)
        started = time.perf_counter()
        try:
            pair = load(self.target, drafter=None if is_alone else self.drafter)
            History(pair.target).extend([2, 3, 4], room=2)  # where the buffers of the K/V are made
            assert all(is_short_line(warning) for warning in pair.warnings), pair.warnings
            self.loaded += 1
        except MtpError as error:
            assert is_short_line(str(error)) and "; " in str(error), str(error)
            self.refused += 1
            return str(error)
        finally:
            for name in files:
                names[name].write_bytes(self.files[names[name]])
            assert time.perf_counter() - started < MOST_SECONDS
            assert peak_bytes() - self._before < MOST_BYTES
        return None


def as_bytes(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def spoil_json(trial: Trial, data: st.DataObject, name: str, path: Path) -> None:
    is_alone = path.parent == trial.target and data.draw(st.booleans())
    trial.run(is_alone=is_alone, **{name: as_bytes(data.draw(spoiled(trial.json(path))))})


def spoil_target_config(trial: Trial, data: st.DataObject) -> None:
    spoil_json(trial, data, "target__config_json", trial.target / "config.json")


def spoil_drafter_config(trial: Trial, data: st.DataObject) -> None:
    spoil_json(trial, data, "drafter__config_json", trial.drafter / "config.json")


def spoil_generation_config(trial: Trial, data: st.DataObject) -> None:
    spoil_json(trial, data, "target__generation_config_json", trial.target / "generation_config.json")


def spoil_tokenizer_config(trial: Trial, data: st.DataObject) -> None:
    spoil_json(trial, data, "target__tokenizer_config_json", trial.target / "tokenizer_config.json")


def spoil_tokenizer(trial: Trial, data: st.DataObject) -> None:
    spoil_json(trial, data, "target__tokenizer_json", trial.target / "tokenizer.json")


def spoil_bytes(trial: Trial, data: st.DataObject) -> None:
    """Any file of the folder, cut, overwritten in places, or with something else altogether."""
    path = data.draw(st.sampled_from(sorted(trial.files)))
    content = bytearray(trial.files[path])
    for _ in range(data.draw(st.integers(0, 4))):
        content[int(data.draw(st.floats(0, 1, exclude_max=True)) * len(content))] = data.draw(
            st.integers(0, 255)
        )
    ends = st.one_of(st.just(len(content)), st.integers(0, len(content)))
    other = st.sampled_from([b"", b"[" * 10_000, b"\xff\xfe", b"{", b"null", b"<html>", bytes(64)])
    start = data.draw(st.one_of(st.just(b""), other))
    name = f"{path.parent.name}__{path.name.replace('.', '_')}"
    trial.run(**{name: start + bytes(content[: data.draw(ends)])})


def spoil_header(trial: Trial, data: st.DataObject) -> None:
    """A safetensors header with hostile numbers, types, names and lengths, before a whole or cut body."""
    path = data.draw(st.sampled_from([trial.target, trial.drafter])) / "model.safetensors"
    content = trial.files[path]
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = data.draw(st.one_of(VALUES, st.just({"format": "mlx"})))
    if not isinstance(header["__metadata__"], dict):
        header.pop("__metadata__", None) if data.draw(st.booleans()) else None
    tree = data.draw(spoiled(header))
    name, other = (data.draw(st.sampled_from(sorted(header))) for _ in range(2))
    if data.draw(st.booleans()) and isinstance(tree, dict):
        tree[name] = deepcopy(header[other])  # two tensors on the same bytes
    text = as_bytes(tree)
    twice = data.draw(st.sampled_from([b"", b'"norm":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},']))
    text = b"{" + twice + text[1:] if data.draw(st.booleans()) else text
    text += b" " * data.draw(st.sampled_from([0, 0, 1, 7, 1000]))
    claimed = data.draw(st.one_of(st.just(len(text)), st.just(len(text)), NUMBERS))
    body = content[8 + length :]
    body = body[: data.draw(st.one_of(st.just(len(body)), st.integers(0, len(body))))]
    trial.run(**{f"{path.parent.name}__model_safetensors": struct.pack("<Q", claimed % 2**64) + text + body})


def spoil_index(trial: Trial, data: st.DataObject) -> None:
    spoil_json(
        trial, data, "target__model_safetensors_index_json", trial.target / "model.safetensors.index.json"
    )


def spoil_quantization(trial: Trial, data: st.DataObject) -> None:
    config = trial.json(trial.target / "config.json")
    entry = {
        "bits": 4,
        "group_size": 64,
        "mode": "affine",
        "quant_method": None,
        "norm": False,
        "x.y": {"bits": 8},
    }
    config["quantization"] = data.draw(spoiled({**entry, **config["quantization"]}))
    trial.run(target__config_json=as_bytes(config))
