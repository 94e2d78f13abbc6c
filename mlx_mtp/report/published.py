"""Every published model's names, shapes and configuration against what this program expects of it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_mtp.config import DrafterConfig, TargetConfig
from mlx_mtp.config_parse import parse_drafter_config, parse_target_config
from mlx_mtp.errors import CheckpointError, MtpError
from mlx_mtp.headers import TensorInfo, read_headers
from mlx_mtp.inventory import check_tensor, sort_by_path
from mlx_mtp.model_files import own_file, read_json
from mlx_mtp.published_configs import published_drafter, published_target
from mlx_mtp.quantization import parse_quantization
from mlx_mtp.report.protocol import Deadline, Found, NotHere
from mlx_mtp.report.setting import Setting
from mlx_mtp.tensor_names import expected_tensors

MOST_NAMED = 20  # of any list of names
HERE = Path("model")  # stands for a folder in messages about files that were not downloaded


@dataclass(frozen=True, slots=True)
class Described:
    """A model as its small files and its weights' headers describe it."""

    config: dict[str, Any]
    generation: dict[str, Any]
    headers: dict[str, TensorInfo]
    where: str  # "hub" or "cache"
    commit: str | None = None


Describe = Callable[[str], Described | None]


def published(setting: Setting, found: Found, deadline: Deadline) -> None:
    """Every alias's target and drafter, those of the model at hand first."""
    from mlx_mtp.aliases import ALIASES

    models: dict[str, tuple[str, str]] = {}
    for alias in sorted(ALIASES, key=lambda alias: alias.size != setting.size):
        models.setdefault(alias.target, (alias.shape, "target"))
        models.setdefault(alias.drafter, (alias.shape, "drafter"))
    compare_models(models, describer(setting.offline), found, deadline)


def compare_models(
    models: dict[str, tuple[str, str]], describe: Describe, found: Found, deadline: Deadline
) -> None:
    """models: repository -> size and role. Fills in an entry each, and lists of those that agree, differ or are out
    of reach."""
    found.update({"agree": [], "differ": [], "not_seen": [], "models": {}})
    for repo_id, (shape, role) in models.items():
        deadline.check()
        try:
            described = describe(repo_id)
        except (
            Exception
        ) as error:  # whatever the network gave: it is this model's answer, the others are still asked
            found["models"][repo_id] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
            found["not_seen"].append(repo_id)
            continue
        if described is None:
            found["not_seen"].append(repo_id)
            continue
        entry = compare(described, shape, role)
        found["models"][repo_id] = entry
        found["agree" if entry["agrees"] else "differ"].append(repo_id)
    if not found["models"]:
        raise NotHere("no published model is in the cache, and the hub was not to be asked (--offline)")


def compare(described: Described, shape: str, role: str) -> Found:
    """One model's config fields, tensor names, shapes and formats; `agrees` when it would load as we expect it."""
    entry: Found = {"size": shape, "role": role, "where": described.where, "commit": described.commit}
    raw = described.config
    entry["quantization"] = _short(raw.get("quantization") or raw.get("quantization_config"))
    entry["generation_config"] = _short(described.generation)
    try:
        config = _parse(raw, role, "config.json")
        ours = _parse(published_target(shape) if role == "target" else published_drafter(shape), role, shape)
        entry["config_differences"] = differences(ours, config)
        entry |= compare_tensors(described.headers, config, raw)
    except MtpError as error:  # it would not load: the answer for this model
        entry["refusal"] = str(error)
    entry["agrees"] = not any(
        entry.get(name) for name in ("refusal", "config_differences", "missing", "wrong", "not_used")
    )
    return entry


def _parse(raw: dict[str, Any], role: str, source: str) -> TargetConfig | DrafterConfig:
    return parse_target_config(raw, source) if role == "target" else parse_drafter_config(raw, source)


def differences(ours: TargetConfig | DrafterConfig, theirs: TargetConfig | DrafterConfig) -> list[Found]:
    """Fields in which the published config.json is not as we have it written down."""
    pairs = []
    mine, other = asdict(ours), asdict(theirs)
    for one, two, prefix in ((mine.pop("text"), other.pop("text"), "text."), (mine, other, "")):
        pairs += [(prefix + name, one[name], two[name]) for name in one if one[name] != two[name]]
    return [{"field": name, "ours": a, "published": b} for name, a, b in pairs if name != "multimodal"]


def compare_tensors(
    headers: dict[str, TensorInfo], config: TargetConfig | DrafterConfig, raw: dict[str, Any]
) -> Found:
    """Every difference, where loading would stop at the first: missing, wrong (why), and what nobody uses."""
    claims = parse_quantization(raw, "config.json")
    expected = expected_tensors(config)
    stored, ignored = sort_by_path(headers, config, HERE)
    missing = [path for path in expected if "weight" not in stored.get(path, {})]
    wrong, formats = [], set()
    for path, shape in expected.items():
        if path in missing:
            continue
        try:
            form = check_tensor(path, shape, stored[path], claims)
            formats.add(str(form) if form is not None else "dense")
        except CheckpointError as error:
            wrong.append(str(error))
    unused = [*ignored, *(path for path in stored if path not in expected)]
    return {
        "tensors": len(expected),
        "tensors_stored": len(headers),
        "formats": sorted(formats),
        "missing": missing[:MOST_NAMED],
        "missing_count": len(missing),
        "wrong": wrong[:MOST_NAMED],
        "wrong_count": len(wrong),
        "not_used": unused[:MOST_NAMED],
        "not_used_count": len(unused),
        "weight_bytes": sum(info.nbytes for info in headers.values()),
    }


def _short(value: Any) -> Any:
    """A config's entry without the format of every single layer."""
    if not isinstance(value, dict):
        return value
    nested = [name for name, entry in value.items() if isinstance(entry, dict)]
    plain = {name: entry for name, entry in value.items() if name not in nested}
    return {**plain, "entries_by_layer": len(nested)} if nested else plain


def describer(offline: bool) -> Describe:
    """From the cache where a whole snapshot is there, else from the hub unless that must not be asked."""

    def describe(repo_id: str) -> Described | None:
        from mlx_mtp.download import cached_snapshot

        folder = cached_snapshot(repo_id)
        if folder is not None:
            return from_folder(folder)
        return None if offline else from_hub(repo_id)

    return describe


def from_folder(folder: Path) -> Described:
    """A model on disk."""
    generation = own_file(folder, "generation_config.json")
    return Described(
        config=read_json(folder / "config.json"),
        generation={} if generation is None else read_json(generation),
        headers=read_headers(folder)[0],
        where="cache",
        commit=folder.name if folder.parent.name == "snapshots" else None,
    )


def from_hub(repo_id: str) -> Described:
    """A model on the hub, by its small files and the first bytes of its weights; nothing stays in the cache."""
    import tempfile

    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    with tempfile.TemporaryDirectory() as scratch:

        def small(name: str) -> dict[str, Any]:
            content = read_json(Path(hf_hub_download(repo_id, name, local_dir=scratch)))
            return content if isinstance(content, dict) else {}

        config = small("config.json")
        try:
            generation = small("generation_config.json")
        except EntryNotFoundError:
            generation = {}
    metadata = HfApi().get_safetensors_metadata(repo_id)
    headers = {
        name: TensorInfo(
            name, tuple(info.shape), info.dtype, HERE / file, info.data_offsets[0], _size(info.data_offsets)
        )
        for file, content in metadata.files_metadata.items()
        for name, info in content.tensors.items()
    }
    return Described(config, generation, headers, "hub")


def _size(offsets: tuple[int, int]) -> int:
    return offsets[1] - offsets[0]
