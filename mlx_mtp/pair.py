"""A target with its drafter and prompt format, ready to run: what `load` gives and everything else takes."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from mlx_mtp.checkpoint import (
    check_pair,
    read_drafter,
    read_drafter_config,
    read_generation,
    read_target,
    read_target_config,
)
from mlx_mtp.chips import chip_of
from mlx_mtp.config import DrafterConfig, TargetConfig
from mlx_mtp.cost import CostModel, prior
from mlx_mtp.drafter import Drafter, make_drafter
from mlx_mtp.dtypes import activation_dtype
from mlx_mtp.errors import CheckpointError, ParameterError
from mlx_mtp.exactness import Exactness, exactness_of
from mlx_mtp.exactness_tax import Tax, measure_tax
from mlx_mtp.kernels.chooser import Choice, Row, choose_kernels, equip
from mlx_mtp.kernels.results import known_verdicts
from mlx_mtp.machine import Machine, check_machine, free_bytes, this_machine
from mlx_mtp.model_files import check_unchanged
from mlx_mtp.policy import Policy, make_policy
from mlx_mtp.progress import OnProgress, Progress, silent
from mlx_mtp.prompt import PromptFormat, load_prompt_format
from mlx_mtp.quantize import quantize_tensors
from mlx_mtp.round import Rounds
from mlx_mtp.round_times import RoundTimes
from mlx_mtp.sampling import Sampling
from mlx_mtp.sources import Sources, Wanted, admit, find_sources
from mlx_mtp.target import Target, make_target
from mlx_mtp.versions import check_versions
from mlx_mtp.weights import QuantizedWeight, Weight


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
    folder: Path | None = None  # of the target's files
    drafter_folder: Path | None = None
    kernel_table: tuple[Row, ...] = ()  # which operations our kernels compute, and why not the others

    def with_kernels(self, choice: Choice) -> "Pair":
        """The same pair computing with other kernels, for replies that start with it; its rounds are traced anew."""
        target, drafter = equip(self.target, self.drafter, choice)
        times = RoundTimes(self.rounds.times.prior)
        rounds = Rounds(target, drafter, compiled=self.rounds.compiled, times=times)
        return replace(self, target=target, drafter=drafter, rounds=rounds, kernel_table=choice.rows)

    def policy(self, num_draft_tokens: int | str) -> Policy:
        """What chooses the drafts of requests that ask for this number or "auto"; it knows what earlier rounds taught.

        Raises ParameterError.
        """
        return make_policy(
            num_draft_tokens,
            has_drafter=self.drafter is not None,
            fit=self.rounds.fit,
            times=self.rounds.times,
        )

    def check_exact(self) -> bool:
        """Find out, once, whether MTP on equals MTP off bitwise here: promise (a)."""
        return self.exactness().holds

    def exactness(self) -> Exactness:
        """Which promise holds here and why, by operation; the first call takes a few passes of 1 to 17 rows."""
        if self.rounds.exactness is None:
            passed = {row.operation.name for row in self.kernel_table if row.by == "ours"}
            self.rounds.exactness = exactness_of(self.target, (self.sampling,), passed=passed)
        return self.rounds.exactness

    def exactness_tax(self) -> Tax:
        """What plain decoding on our kernels costs against stock operations; the first call measures it."""
        if self.rounds.tax is None:
            why_stock = [row.reason for row in self.kernel_table if row.by == "stock"]
            self.rounds.tax = measure_tax(self.target, compiled=self.rounds.compiled, why_stock=why_stock)
            self.rounds.times.plain_tax = self.rounds.tax.ratio
        return self.rounds.tax


def load(
    target: str | Path,
    *,
    drafter: str | Path | None = "auto",
    quantize: int | None = None,
    drafter_bits: Literal["auto"] | int | None = "auto",
    dtype: mx.Dtype | None = None,
    revision: str | None = None,
    max_context: int | None = None,
    exact: bool = False,
    on_progress: OnProgress | None = None,
) -> Pair:
    """Load a target and its drafter: an alias ("e4b"), an id on the hub, a folder ("./path", "/path") or "demo".

    drafter: a name or folder, None for plain decoding, or "auto": the one published for the target, or a folder
    `drafter` beside or `assistant` inside the target's. What is not in the Hugging Face cache is downloaded.
    quantize: 4 or 8 bits, for a dense target; the result is kept. drafter_bits: 4, 8, "auto" (4 with a quantised
    target) or None (as its files are). dtype: of activations and dense weights, None for what suits the machine.
    max_context: tokens, at most the model's own; memory for so many must be free. exact: our kernels wherever the
    self-test found them right on this chip, also where stock MLX is faster: MTP on then equals MTP off bitwise if
    `Pair.check_exact` says so.

    Raises CheckpointError, PairError, ParameterError, MachineError, MemoryRefusal, HubError or StorageError; whatever
    configurations and tokenizer can tell is refused before a weight file is opened.
    """
    machine = this_machine()
    check_machine(machine)
    version_warnings = check_versions()
    on_cpu = mx.default_device().type == mx.cpu
    dtype = dtype or activation_dtype(machine, mx.bfloat16, on_cpu=on_cpu)[0]
    wanted = Wanted(target, drafter, revision, quantize, drafter_bits, dtype, max_context)
    report = on_progress or silent
    sources = find_sources(wanted, machine, report)
    found = _look_at(sources, wanted)
    admit(wanted, machine, sources.target, free=free_bytes(), drafter=found.drafter)

    report(Progress("read", f"reading {sources.target}"))
    checkpoint = read_target(sources.target, dtype=dtype)
    small, small_warnings = _read_drafter(
        sources, wanted, is_quantized=checkpoint.quantized is not None, report=report
    )
    model = make_target(checkpoint.config, checkpoint.tensors)
    check_unchanged(checkpoint.seen)
    has_metal = machine.has_metal and not on_cpu
    verdicts = known_verdicts(machine, exact=exact) if has_metal else {}
    choice = choose_kernels(model, small, has_metal=has_metal, verdicts=verdicts)
    model, small = equip(model, small, choice)
    expected = _expected_cost(found.target, found.drafter, model, small, choice, machine)
    return Pair(
        name=str(target),
        target=model,
        drafter=small,
        prompt_format=found.prompt_format,
        sampling=found.sampling,
        max_context=found.context,
        rounds=Rounds(model, small, times=RoundTimes(expected)),
        warnings=(*version_warnings, *sources.warnings, *checkpoint.warnings, *small_warnings),
        folder=sources.target,
        drafter_folder=sources.drafter,
        kernel_table=choice.rows,
    )


@dataclass(frozen=True, slots=True)
class Found:
    """What configurations and tokenizer say."""

    target: TargetConfig
    drafter: DrafterConfig | None
    context: int
    prompt_format: PromptFormat
    sampling: Sampling


def _look_at(sources: Sources, wanted: Wanted) -> Found:
    """All that can be refused before a weight file is opened."""
    config = read_target_config(sources.target)
    context = _checked_context(str(wanted.target), config, wanted.max_context)
    small_config = None if sources.drafter is None else read_drafter_config(sources.drafter)
    if small_config is not None:
        check_pair(config, small_config)
    prompts = load_prompt_format(
        sources.target, eos_ids=config.eos_token_ids, vocab_size=config.text.vocab_size
    )
    sampling = default_sampling(
        read_generation(sources.target), str(sources.target / "generation_config.json")
    )
    return Found(config, small_config, context, prompts, sampling)


def _expected_cost(
    config: TargetConfig,
    small_config: DrafterConfig | None,
    model: Target,
    small: Drafter | None,
    choice: Choice,
    machine: Machine,
) -> CostModel:
    """What rounds are expected to cost before one was timed."""
    on_metal = machine.has_metal and mx.default_device().type != mx.cpu
    return prior(
        config,
        small_config,
        chip_of(machine) if on_metal else None,
        bits=_bits_of(model.embedding),
        drafter_bits=16 if small is None else _bits_of(small.embedding),
        kernels="ours" if any(row.by == "ours" for row in choice.rows) else "stock",
    )


def _bits_of(weight: Weight) -> int:
    return weight.bits if isinstance(weight, QuantizedWeight) else 16


def _read_drafter(
    sources: Sources, wanted: Wanted, *, is_quantized: bool, report: OnProgress
) -> tuple[Drafter | None, tuple[str, ...]]:
    """The drafter, if there is one, in the bits that were asked for, and warnings about its files."""
    if sources.drafter is None:
        return None, ()
    report(Progress("read", f"reading {sources.drafter}"))
    checkpoint = read_drafter(sources.drafter, dtype=wanted.dtype)
    tensors, bits = checkpoint.tensors, wanted.drafter_bits
    if bits == "auto":
        # In the files' 16 bits it would read up to 0.4 of what a 4-bit target reads, for each draft.
        bits = 4 if is_quantized else None
    if isinstance(bits, int) and checkpoint.quantized is None:
        tensors = quantize_tensors(tensors, bits)
    drafter = make_drafter(checkpoint.config, tensors)
    check_unchanged(checkpoint.seen)
    return drafter, checkpoint.warnings


def _checked_context(name: str, config: TargetConfig, max_context: int | None) -> int:
    own = config.text.max_position_embeddings
    if max_context is not None and not 1 <= max_context <= own:
        raise ParameterError(
            f"max_context must be in 1 .. {own} for {name}, got {max_context}; choose a value in that range"
        )
    return max_context or own


def default_sampling(generation: dict[str, Any], source: str = "generation_config.json") -> Sampling:
    """The sampling that generation_config.json asks for; `do_sample: false` is greedy."""
    if not generation.get("do_sample", True):
        return Sampling(temperature=0.0)
    known = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    try:
        return Sampling(**{name: generation[name] for name in known if generation.get(name) is not None})
    except ParameterError as error:
        raise CheckpointError(f"{source}: {error}") from None
