"""The file of a run: versioned, replaced in one step, kept while it grows so that a run can go on from it."""

import json
import math
import time
from pathlib import Path
from typing import Any

from mlx_mtp.errors import ParameterError, StorageError
from mlx_mtp.measure.plan import Settings, settings_of
from mlx_mtp.store import write_bytes

SCHEMA = 1
KIND = "mlx-mtp bench"
LARGEST_BYTES = 256 << 20

Document = dict[str, Any]


def new_document(settings: Settings, opening: dict[str, Any], fingerprint: dict[str, Any]) -> Document:
    """An empty run; `opening`: how the model is opened again."""
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "complete": False,
        "opening": opening,
        "settings": settings.as_json(),
        "fingerprint": fingerprint,
        "energy": None,
        "process_peak_bytes": None,
        "notes": [],
        "cases": {},
    }


def as_json(document: Document) -> str:
    """JSON text; what is no finite number is null."""
    return json.dumps(_finite(document), indent=1, allow_nan=False) + "\n"


def write_document(path: Path, document: Document) -> None:
    """Replace the file in one step. Raises StorageError; what was there stays then."""
    write_bytes(path.absolute(), as_json(document).encode())


def read_document(path: Path) -> Document:
    """A run that `write_document` kept. Raises ParameterError where it is none, or a newer program's."""
    remedy = "give a file that `mlx-mtp bench` wrote (--format json)"
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise ParameterError(f"{path}: has more than {LARGEST_BYTES >> 20} MB; {remedy}")
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise ParameterError(f"{path}: cannot be read ({error.strerror or error}); {remedy}") from None
    except (ValueError, RecursionError):
        raise ParameterError(f"{path}: is not JSON, or was cut short; {remedy}") from None
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise ParameterError(f"{path}: holds no results of a bench; {remedy}")
    schema = document.get("schema")
    if isinstance(schema, int) and not isinstance(schema, bool) and schema > SCHEMA:
        raise ParameterError(
            f"{path}: has schema {schema}, and this program reads up to {SCHEMA}; update mlx-mtp to read it"
        )
    damage = _damage(document)
    if damage is not None:
        raise ParameterError(f"{path}: is damaged ({damage}); {remedy}")
    document.pop("rows", None)  # figures that `--format json` added; they are computed anew
    return document


def _damage(document: Document) -> str | None:
    """What is wrong with a document's structure, as far as anything here relies on it."""
    if document.get("schema") != SCHEMA:
        return "no schema"
    wanted = {
        "settings": dict,
        "fingerprint": dict,
        "cases": dict,
        "opening": dict,
        "complete": bool,
        "notes": list,
    }
    for name, kind in wanted.items():
        if not isinstance(document.get(name), kind):
            return f"no {name}"
    try:
        settings_of(document["settings"])
        for key, case in document["cases"].items():
            place = key
            case["case"]["workload"], case["done"], case["prompt_tokens"], case["verdicts"]
            for arm in case["arms"].values():
                arm["warm_up_s"], arm["texts"], arm["fault"]
                for sample in arm["samples"]:
                    if not all(math.isfinite(sample[name]) and sample[name] > 0 for name in TIMES):
                        return f"times in {place}"
                    sample["counts"], sample["marks"]
    except (TypeError, KeyError, AttributeError, ParameterError) as error:
        return f"{type(error).__name__}: {error}"[:120]
    return None


TIMES = ("prefill_s", "decode_s", "total_s")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


class Keeper:
    """Writes a run as it grows; a disk that is full is spoken of once, and the measuring goes on."""

    def __init__(self, path: Path | None, every_s: float = 5.0) -> None:
        self.path = path
        self.trouble: str | None = None
        self._every_s = every_s
        self._written = float("-inf")

    def keep(self, document: Document, *, at_once: bool = False) -> str | None:
        """-> what is wrong, the first time that something is."""
        now = time.monotonic()
        if self.path is None or (not at_once and now - self._written < self._every_s):
            return None
        self._written = now
        try:
            write_document(self.path, document)
        except StorageError as error:
            is_new, self.trouble = self.trouble is None, str(error)
            return self.trouble if is_new else None
        self.trouble = None
        return None
