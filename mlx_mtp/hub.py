"""Names of models: aliases, ids on the Hugging Face hub and local folders, and which drafter a target gets.

Nothing here opens a socket or reads a weight; `download` fetches what a name of kind "hub" stands for.
"""

import difflib
import re
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from mlx_mtp.aliases import ALIASES, SIZES, Alias, assistants_of, find_alias, stock_assistant
from mlx_mtp.config_fields import shown
from mlx_mtp.errors import CheckpointError, MtpError, PairError, ParameterError
from mlx_mtp.repo_ids import check_repo_id, check_revision

DEMO = "demo"
AUTO = "auto"
PATH_STARTS = ("./", "../", "/", "~")
HUB_URL = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#\s]+/[^/?#\s]+)(?:[/?#]\S*)?")
QAT = re.compile(r"(?:^|[-_.])qat(?:[-_.]|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ModelName:
    """What the user's words for a model mean; `folder` for "demo" and "folder", `repo_id` for "hub"."""

    text: str
    kind: Literal["demo", "folder", "hub"]
    folder: Path | None = None
    repo_id: str | None = None
    revision: str | None = None
    alias: Alias | None = None
    warnings: tuple[str, ...] = ()


def parse_name(text: str | Path, revision: str | None = None) -> ModelName:
    """Read "demo", an alias, "org/name", "org/name@revision" or a folder ("./path", "/path", "~/path", a Path).

    A folder is only ever one that is written as a path, so that none can stand in for a model of the hub. Raises
    CheckpointError for what is none of these, ParameterError for a revision that is none or has no use.
    """
    if isinstance(text, Path) or text.startswith(PATH_STARTS) or text in (".", ".."):
        return _folder_name(text, revision)
    if text == DEMO:
        _refuse_revision(revision, "the demo pair is part of this package")
        return ModelName(text, "demo", folder=demo_folder() / "target")
    url = HUB_URL.fullmatch(text)
    if url is not None:
        raise CheckpointError(f"a model on the hub is named without the address; write {url[1]}")
    words, at, own_revision = text.partition("@")
    if at:
        if revision is not None and revision != own_revision:
            raise ParameterError(
                f"{shown(text)} already names a revision, and another one, {shown(revision)}, was given; give one"
            )
        revision = own_revision
    alias = find_alias(words)
    if alias is None and "/" not in words:
        raise _unknown(text, words)
    if alias is None:
        check_repo_id(words)
    if revision is not None:
        check_revision(revision)
    return ModelName(
        text,
        "hub",
        repo_id=alias.target if alias else words,
        revision=revision,
        alias=alias,
        warnings=_shadow_warning(words),
    )


def demo_folder() -> Path:
    """Where the shipped pair lies; it holds `target` and `drafter`."""
    return Path(str(files("mlx_mtp.demo")))


def drafter_for(name: ModelName, folder: Path | None, drafter: str | Path | None) -> ModelName | None:
    """Which drafter to load with the target `name`, whose files are in `folder` (None: not downloaded yet).

    drafter: None for plain decoding, a name or path, or "auto": the alias's own; for a local folder what lies beside
    (`drafter`) or inside (`assistant`) it; the one published for the id; last, once config.json is there, the stock
    assistant of the size whose shape it has, with a warning. None where nothing fits. Raises PairError for a name that
    cannot be read.
    """
    if drafter is None:
        return None
    if drafter != AUTO:
        return _given_drafter(drafter)
    if name.kind == "demo":
        return ModelName(DEMO, "demo", folder=demo_folder() / "drafter")
    if name.alias is not None:
        return _on_hub(name.alias.drafter)
    if name.kind == "folder" and folder is not None:
        for place in (folder.parent / "drafter", folder / "assistant"):
            if (place / "config.json").is_file():
                return ModelName(str(place), "folder", folder=place)
    published = assistants_of(name.repo_id) if name.repo_id else None
    if published is not None:
        return _on_hub(published)
    return _stock_drafter(name, folder) if folder is not None else None


def _given_drafter(drafter: str | Path) -> ModelName:
    """A drafter by name; an alias, which names a target, means that target's drafter."""
    try:
        given = parse_name(drafter)
    except MtpError as error:
        raise PairError(f"the drafter cannot be loaded: {error}") from error
    if given.alias is not None:
        return replace(given, repo_id=given.alias.drafter, alias=None)
    if given.kind == "demo":
        return replace(given, folder=demo_folder() / "drafter")
    return given


def _on_hub(repo_id: str, warnings: tuple[str, ...] = ()) -> ModelName:
    return ModelName(repo_id, "hub", repo_id=repo_id, warnings=warnings)


def _stock_drafter(name: ModelName, folder: Path) -> ModelName | None:
    """The assistant of the published size whose shape config.json has: what a fine-tune was made from."""
    from mlx_mtp.model_files import read_json

    path = folder / "config.json"
    if not path.is_file():
        return None
    shape = shape_of(read_json(path))
    if shape is None:
        return None
    repo_id = stock_assistant(
        shape, is_qat=QAT.search(Path(name.repo_id or folder.resolve()).name) is not None
    )
    warning = (
        f"no drafter is known for {name.text}; {repo_id} is that of the model whose shape it has: text stays "
        "the same, but the further the weights have moved from it, the fewer drafts are accepted"
    )
    return _on_hub(repo_id, (warning,))


def shape_of(raw: object) -> str | None:
    """A target's config.json -> the published size it has the shape of, as `published_configs` names it."""
    from mlx_mtp.config_parse import FLAT_TARGETS, NESTED_TARGETS, parse_target_config
    from mlx_mtp.published_configs import SIZES as SHAPES
    from mlx_mtp.published_configs import published_target

    if not isinstance(raw, dict) or raw.get("model_type") not in (*NESTED_TARGETS, *FLAT_TARGETS):
        return None
    text = parse_target_config(raw, "config.json").text
    for shape in SHAPES:
        published = parse_target_config(published_target(shape), shape).text
        # Context and per-layer vocabulary may be changed by a fine-tune; these are what a drafter relies on.
        if _what_drafters_read(text) == _what_drafters_read(published):
            return shape
    return None


def _what_drafters_read(text: Any) -> tuple[object, ...]:
    return (
        text.hidden_size,
        text.layer_types,
        text.vocab_size,
        (text.num_kv_heads, text.num_global_kv_heads),
        (text.head_dim, text.global_head_dim),
        text.num_kv_shared_layers,
        text.sliding_window,
    )


def _folder_name(given: str | Path, revision: str | None) -> ModelName:
    text = str(given)
    try:
        folder = Path(text).expanduser()
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError, ValueError) as error:  # unreadable, too long; a home not known; a NUL
        raise CheckpointError(
            f"the folder {shown(text)} cannot be opened ({error}); check the path"
        ) from error
    if is_folder:
        _refuse_revision(revision, f"{text} is a folder")
        return ModelName(text, "folder", folder=folder)
    if exists:
        raise CheckpointError(
            f"a model is a folder, and {text} is a file; give the folder that holds config.json"
        )
    raise CheckpointError(f"there is no folder {text}; check the path, or {_meant_instead(text)}")


def _meant_instead(text: str) -> str:
    """For a missing path: the alias or id that its last parts may have been meant as, else how to name a model."""
    parts = [part for part in Path(text).parts if part not in ("/", ".", "..", "~")]
    last_two = "/".join(parts[-2:])
    alias = find_alias(parts[-1]) if parts else None
    if alias is not None:
        return f"write {alias.name} for {alias.target} on the hub"
    is_relative = not Path(text).is_absolute() and not text.startswith("~")
    if assistants_of(last_two) or (len(parts) == 2 and is_relative and _is_repo_id(last_two)):
        return f"write {last_two} for the model on the hub"
    return f"name a model on the hub such as e4b (one of {', '.join(SIZES)})"


def _unknown(text: str, words: str) -> CheckpointError:
    """The error for a word that is no alias: the closest one, all of them, and the other ways to name a model."""
    size = words.casefold().partition(":")[0]
    own = [alias.name for alias in ALIASES if alias.size == size]
    known = [*SIZES, *(alias.name for alias in ALIASES), DEMO]
    close = own or difflib.get_close_matches(words.casefold(), known, n=1, cutoff=0.5)
    meant = f"did you mean {' or '.join(close)}? " if close else ""
    here = f"the folder of that name here is ./{words}; " if _is_folder_here(words) else ""
    return CheckpointError(
        f"there is no model {shown(text)}; {meant}{here}give one of {', '.join(SIZES)} (with :4bit, :8bit or :bf16), "
        "an id on the hub such as org/name, a folder as ./path or /path, or demo"
    )


def _is_folder_here(words: str) -> bool:
    """Whether a folder lies where these words would lead as a path; words that can be no path lead nowhere."""
    try:
        return bool(words) and Path(words).is_dir()
    except (OSError, ValueError):
        return False


def _shadow_warning(words: str) -> tuple[str, ...]:
    if not _is_folder_here(words):
        return ()
    return (f"{words} means the model on the hub; for the folder of that name here write ./{words}",)


def _is_repo_id(repo_id: str) -> bool:
    try:
        check_repo_id(repo_id)
    except CheckpointError:
        return False
    return True


def _refuse_revision(revision: str | None, why: str) -> None:
    if revision is not None:
        raise ParameterError(f"a revision belongs to a model on the hub, and {why}; leave it out")
