"""Options that mean the same in every command, and what they become in the library's terms."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mlx_mtp.errors import ParameterError

if TYPE_CHECKING:
    from mlx_mtp.pair import Pair

MODEL_HELP = "An alias such as e4b, a hub id (org/name), a folder (./path or /path), or demo."
LAST_HELP = "Without it: the one used last, or one that suits this machine."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
ModelOrLast = Annotated[str, typer.Argument(metavar="[MODEL]", help=f"{MODEL_HELP} {LAST_HELP}")]
Drafter = Annotated[
    str, typer.Option("--drafter", metavar="auto|none|MODEL", help="The assistant to draft with.")
]
Quantize = Annotated[
    int | None,
    typer.Option("--quantize", metavar="4|8", help="Quantise unquantised weights; kept for later."),
]
DrafterBits = Annotated[
    str, typer.Option("--drafter-bits", metavar="auto|4|8|16", help="Bits of the drafter's weights.")
]
Revision = Annotated[
    str | None, typer.Option("--revision", help="A branch, tag or commit of the model on the hub.")
]
Context = Annotated[
    int | None, typer.Option("--context", metavar="N", help="The longest conversation, in tokens.")
]
Yes = Annotated[bool, typer.Option("--yes", help="Download what is missing without asking.")]
Mtp = Annotated[
    str, typer.Option("--mtp", metavar="auto|off|N", help="Draft tokens a round; off is plain decoding.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="The same seed gives the same text.")]
Temperature = Annotated[float | None, typer.Option("--temperature", help="0 always takes the best token.")]
TopK = Annotated[int | None, typer.Option("--top-k", help="Draw from the k best tokens; 0 is off.")]
TopP = Annotated[float | None, typer.Option("--top-p", help="Draw from the best tokens that sum to p.")]
MinP = Annotated[float | None, typer.Option("--min-p", help="Drop tokens below this share of the best one.")]
Repetition = Annotated[float | None, typer.Option("--repetition-penalty", help="Above 1: repeat less.")]
Presence = Annotated[float | None, typer.Option("--presence-penalty", help="Taken off a token once used.")]
Frequency = Annotated[
    float | None, typer.Option("--frequency-penalty", help="Taken off for each earlier use.")
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="The longest reply, in tokens.")]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", help="End the reply before this text; may be repeated.")
]
System = Annotated[
    str | None, typer.Option("--system", help="What the model is told before the conversation.")
]
Thinking = Annotated[bool | None, typer.Option("--thinking/--no-thinking", help="Let the model think first.")]


def parse_mtp(text: str) -> int | Literal["auto"]:
    """`auto`, `off` or a number of draft tokens -> num_draft_tokens."""
    word = text.strip().lower()
    if word == "auto":
        return "auto"
    if word == "off":
        return 0
    if word.isascii() and word.isdigit() and len(word) < 9:
        return int(word)
    raise ParameterError(f"MTP is auto, off or a number of draft tokens, got {text!r}; try `auto`")


@dataclasses.dataclass(frozen=True, slots=True)
class ReplyOptions:
    """How replies are asked for; `sampling` holds only what was given, the rest is the model's own."""

    max_tokens: int
    num_draft_tokens: int | Literal["auto"]
    stop: tuple[str, ...]
    thinking: bool | None
    sampling: dict[str, Any]

    def request(self, pair: "Pair") -> dict[str, Any]:
        """Arguments of `stream_generate` for this pair."""
        return {
            "max_tokens": self.max_tokens,
            "num_draft_tokens": self.num_draft_tokens,
            "stop": self.stop,
            "thinking": self.thinking,
            "sampling": dataclasses.replace(pair.sampling, **self.sampling),
        }


def reply_options(
    *,
    mtp: Mtp = "auto",
    max_tokens: MaxTokens,
    seed: Seed = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Repetition = None,
    presence_penalty: Presence = None,
    frequency_penalty: Frequency = None,
    stop: Stop = None,
    thinking: Thinking = None,
) -> ReplyOptions:
    """Options as they were typed, refused before a model is opened where that needs no model."""
    from mlx_mtp.conversation import check_max_tokens
    from mlx_mtp.policy import make_policy
    from mlx_mtp.sampling import Sampling
    from mlx_mtp.stream import check_stops

    num_draft_tokens = parse_mtp(mtp)
    make_policy(num_draft_tokens, has_drafter=True)
    sampling = {
        "seed": seed,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
    }
    given: dict[str, Any] = {name: value for name, value in sampling.items() if value is not None}
    Sampling(**given)
    return ReplyOptions(check_max_tokens(max_tokens), num_draft_tokens, check_stops(stop), thinking, given)
