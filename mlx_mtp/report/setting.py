"""What the sections are given: a pair, where its files are, and a few fixed prompts that belong to nobody."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mlx_mtp.api import generate
from mlx_mtp.drafter import Drafter
from mlx_mtp.errors import GenerationError
from mlx_mtp.machine import Machine
from mlx_mtp.pair import Pair
from mlx_mtp.prompt import prompt_ids
from mlx_mtp.reply import Generation
from mlx_mtp.round import Rounds
from mlx_mtp.sampling import Sampling
from mlx_mtp.target import Target

PROMPTS = {
    "code": "Write a Python function that merges two sorted lists into one sorted list, with a docstring.",
    "facts": "What is multi-token prediction, and why does it make a language model faster?",
    "json": 'Give three planets as a JSON list of objects with the keys "name", "radius_km" and "moons".',
    "story": "Tell a short story about a lighthouse keeper who finds a letter addressed to the sea.",
    "steps": "Explain step by step how to change a bicycle tyre.",
    "german": "Beschreibe in ein paar Sätzen, wie ein Regenbogen entsteht.",
}
PROSE = (
    "The road to the mill ran beside the water for a mile and then left it, as roads do, for no reason that anybody "
    "remembered. In spring it was mud, and in summer dust, and the carts that used it were mended in the yard of the "
    "inn by a man who had come to mend one cart and had stayed for thirty years. "
)
GREEDY = Sampling(temperature=0.0)


@dataclass(slots=True)
class Setting:
    """One machine with one model, or without where none could be opened (`no_pair_because`)."""

    name: str
    machine: Machine
    pair: Pair | None = None
    no_pair_because: str = "none was asked for"
    target_folder: Path | None = None
    drafter_folder: Path | None = None
    offline: bool = False
    size: str | None = None  # "e2b" and so on where the model has an alias
    prompts: dict[str, list[int]] = field(default_factory=dict)  # token ids by kind; empty: those above
    tokens: int = 96  # of each reply that is played
    repeats: int = 7  # of each timing

    @property
    def the_pair(self) -> Pair:
        """The pair, for sections that only run when there is one."""
        assert self.pair is not None, "sections that need a pair are skipped without one"
        return self.pair

    def prompt_tokens(self) -> dict[str, list[int]]:
        """Token ids of the prompts by kind, in the model's chat template."""
        if not self.prompts:
            pair = self.the_pair
            chat = pair.prompt_format.template is not None
            self.prompts = {
                kind: prompt_ids(
                    pair.prompt_format, [{"role": "user", "content": text}] if chat else text
                ).ids
                for kind, text in PROMPTS.items()
            }
        return self.prompts

    def long_prompt(self, tokens: int) -> list[int]:
        """Token ids of about `tokens` tokens of prose, at most half of the context."""
        pair = self.the_pair
        room = min(tokens, pair.max_context // 2)
        if self.prompts:
            ids = [token for prompt in self.prompts.values() for token in prompt]
            return (ids * (room // len(ids) + 1))[:room]
        ids = prompt_ids(pair.prompt_format, PROSE).ids
        while len(ids) < room:
            ids = [*ids, *ids[1:]]
        return ids[:room]


def play(pair: Pair, ids: Sequence[int], *, k: int | str, tokens: int, sampling: Sampling) -> Generation:
    """One reply; refuses one that ended in broken logits, whose figures would mean nothing."""
    room = max(1, min(tokens, pair.max_context - len(ids) - 1))
    out = generate(pair, list(ids), max_tokens=room, sampling=sampling, num_draft_tokens=k)
    if out.finish_reason == "error":
        raise GenerationError(
            f"{pair.name} gave logits that are not finite; check or download the model again"
        )
    return out


def with_drafter(pair: Pair, drafter: Drafter) -> Pair:
    """The same target with another drafter, and rounds of its own."""
    return replace(pair, drafter=drafter, rounds=Rounds(pair.target, drafter, compiled=pair.rounds.compiled))


def with_target(pair: Pair, target: Target) -> Pair:
    """Another form of the target, without a drafter, and rounds of its own."""
    return replace(
        pair, target=target, drafter=None, rounds=Rounds(target, None, compiled=pair.rounds.compiled)
    )


def rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")
