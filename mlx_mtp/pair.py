"""A target with its drafter and prompt format, ready to run: what `load` gives and everything else takes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_mtp.checkpoint import (
    check_pair,
    read_drafter,
    read_drafter_config,
    read_target,
    read_target_config,
)
from mlx_mtp.config import TargetConfig
from mlx_mtp.drafter import Drafter, make_drafter
from mlx_mtp.errors import CheckpointError, PairError, ParameterError
from mlx_mtp.exactness import rows_are_invariant
from mlx_mtp.model_files import check_unchanged
from mlx_mtp.prompt import PromptFormat, load_prompt_format
from mlx_mtp.round import Rounds
from mlx_mtp.sampling import Sampling
from mlx_mtp.target import Target, make_target
from mlx_mtp.versions import check_versions

DEMO = "demo"


@dataclass(frozen=True, slots=True)
class Pair:
    """Target, drafter (None: plain decoding only), prompt format and the model's own sampling defaults."""

    name: str
    target: Target
    drafter: Drafter | None
    prompt_format: PromptFormat
    sampling: Sampling
    max_context: int
    rounds: Rounds = field(repr=False)
    warnings: tuple[str, ...] = ()

    def check_exact(self) -> bool:
        """Find out, once, whether MTP on equals MTP off bitwise here (a few passes of 1 to 16 rows)."""
        if self.rounds.exact is None:
            self.rounds.exact = rows_are_invariant(self.target)
        return self.rounds.exact


def load(
    target: str | Path,
    *,
    drafter: str | Path | None = "auto",
    quantize: int | None = None,
    drafter_bits: str | int | None = "auto",
    dtype: mx.Dtype | None = None,
    revision: str | None = None,
    max_context: int | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> Pair:
    """Load a target and its drafter from local folders ("./path", "/path"), or the shipped "demo" pair.

    drafter: a folder, None for plain decoding, or "auto": a folder `drafter` beside or `assistant` inside the target's.
    dtype: of activations and dense weights; None is the file's on a GPU and float32 on a CPU.
    max_context: tokens, at most the model's own. Raises CheckpointError, PairError or ParameterError; whatever the
    configurations and the tokenizer can tell is refused before a weight file is opened.
    """
    _refuse_later_options(quantize, drafter_bits, revision)
    version_warnings = check_versions()
    report = on_progress or (lambda message: None)
    folder = locate(target)
    if dtype is None and mx.default_device().type == mx.cpu:
        # The CPU backend has no fast 16-bit arithmetic and accumulates quantised products in the activations' type.
        dtype = mx.float32
    config = read_target_config(folder)
    context = _checked_context(str(target), config, max_context)
    drafter_folder = locate_drafter(target, folder, drafter)
    if drafter_folder is not None:
        check_pair(config, read_drafter_config(drafter_folder))
    prompts = load_prompt_format(folder, eos_ids=config.eos_token_ids, vocab_size=config.text.vocab_size)

    report(f"reading {folder}")
    checkpoint = read_target(folder, dtype=dtype)
    warnings = [*version_warnings, *checkpoint.warnings]
    small = None
    if drafter_folder is not None:
        report(f"reading {drafter_folder}")
        small_checkpoint = read_drafter(drafter_folder, dtype=dtype)
        small = make_drafter(small_checkpoint.config, small_checkpoint.tensors)
        check_unchanged(small_checkpoint.seen)
        warnings += small_checkpoint.warnings
    elif drafter is not None:
        warnings.append(
            f"no drafter was found beside {folder}: decoding is plain; give drafter=PATH to use MTP"
        )
    model = make_target(checkpoint.config, checkpoint.tensors)
    check_unchanged(checkpoint.seen)
    return Pair(
        name=str(target),
        target=model,
        drafter=small,
        prompt_format=prompts,
        sampling=default_sampling(checkpoint.generation),
        max_context=context,
        rounds=Rounds(model, small),
        warnings=tuple(warnings),
    )


def _checked_context(name: str, config: TargetConfig, max_context: int | None) -> int:
    own = config.text.max_position_embeddings
    if max_context is not None and not 1 <= max_context <= own:
        raise ParameterError(
            f"max_context must be in 1 .. {own} for {name}, got {max_context}; choose a value in that range"
        )
    return max_context or own


def default_sampling(generation: dict[str, Any]) -> Sampling:
    """The sampling that generation_config.json asks for; `do_sample: false` is greedy."""
    if not generation.get("do_sample", True):
        return Sampling(temperature=0.0)
    known = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return Sampling(**{name: generation[name] for name in known if generation.get(name) is not None})


def locate(target: str | Path) -> Path:
    """A name or path -> the target's folder; a bare name must be "demo", so that no folder can shadow a model id."""
    if target == DEMO:
        return Path(str(files("mlx_mtp.demo"))) / "target"
    text = str(target)
    if isinstance(target, str) and not text.startswith(("./", "../", "/", "~")) and text not in (".", ".."):
        raise CheckpointError(
            f'a model is "demo" or a local folder written as ./path or /path, got {text!r}; '
            "names on the Hugging Face hub are not resolved by this version"
        )
    folder = Path(text).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f'there is no folder {text}; check the path, or try the shipped model "demo"')
    return folder


def locate_drafter(target: str | Path, folder: Path, drafter: str | Path | None) -> Path | None:
    """The drafter's folder; "auto" looks beside and inside the target's, None asks for plain decoding."""
    if drafter is None:
        return None
    if drafter != "auto":
        try:
            return locate(drafter)
        except CheckpointError as error:
            raise PairError(f"the drafter cannot be loaded: {error}") from error
    candidates = (folder.parent / "drafter", folder / "assistant")
    return next((path for path in candidates if (path / "config.json").is_file()), None)


def _refuse_later_options(quantize: int | None, drafter_bits: str | int | None, revision: str | None) -> None:
    if quantize is not None or drafter_bits not in ("auto", None):
        raise ParameterError(
            "quantising while loading is not available in this version; convert the model with "
            "`mlx_lm.convert --quantize` and load its folder"
        )
    if revision is not None:
        raise ParameterError(
            "revision applies to models from the hub, which this version does not load; leave it out"
        )
