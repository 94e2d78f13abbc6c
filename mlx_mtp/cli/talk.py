"""What a conversation in the terminal is apart from the model that answers: it survives a change of model."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mlx_mtp.cli.options import ReplyOptions
from mlx_mtp.cli.transcripts import Transcript
from mlx_mtp.errors import ParameterError

if TYPE_CHECKING:
    from mlx_mtp.sampling import Sampling

View = Literal["markdown", "trace", "plain"]
WHOLE = ("top_k", "max_tokens", "seed")  # of the settings, those that are whole numbers
REAL = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
SWITCHES = {"on": True, "off": False, "auto": None}  # of thinking


@dataclass(slots=True)
class Talk:
    """Messages, how they are answered and how answers are shown."""

    model: str
    options: ReplyOptions
    view: View
    messages: list[dict[str, str]] = field(default_factory=list)
    n: int = 1  # answers to each message
    kept_as: Path | None = None  # where each turn is kept; None: nowhere
    kv: str | None = None  # SHA-256 of the K/V that lie beside it; None: there are none

    @property
    def system(self) -> str | None:
        """The system prompt of this conversation."""
        first = self.messages[0] if self.messages else None
        return first["content"] if first is not None and first["role"] == "system" else None

    def restart(self, system: str | None) -> None:
        self.messages = [{"role": "system", "content": system}] if system else []
        self.kv = None

    def take_back(self) -> str | None:
        """Remove the last message and its answer -> the message, None where there is none."""
        while self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if not self.messages or self.messages[-1]["role"] != "user":
            return None
        return self.messages.pop()["content"]

    def transcript(self) -> Transcript:
        return Transcript(self.model, tuple(self.messages), self.kv)

    def go_on_with(self, transcript: Transcript, path: Path) -> None:
        """Take a kept conversation up; each further turn is kept there."""
        self.messages, self.kept_as, self.kv = list(transcript.messages), path, transcript.kv

    def next_seed(self) -> None:
        """Another draw for the same message, where the seed was chosen."""
        seed = self.options.sampling.get("seed")
        if seed is not None:
            self.set("seed", str(int(seed) + 1))

    def set(self, name: str, text: str) -> None:
        """Change one setting from the next reply on; ParameterError for what there is not, or is no value of it."""
        options = self.options
        if name == "thinking":
            if text not in SWITCHES:
                raise ParameterError(f"thinking is on, off or auto, got {text!r:.40}; try /set thinking on")
            self.options = replace(options, thinking=SWITCHES[text])
            return
        if name not in (*WHOLE, *REAL):
            known = ", ".join((*REAL, *WHOLE, "thinking"))
            raise ParameterError(f"there is no setting {name!r:.40}; these are: {known}")
        value = _number(name, text)
        if name == "max_tokens":
            if value < 1:
                raise ParameterError(f"max_tokens is a whole number from 1 on, got {text!r:.40}; try 256")
            self.options = replace(options, max_tokens=int(value))
            return
        from mlx_mtp.sampling import Sampling

        sampling = {**options.sampling, name: value}
        Sampling(**sampling)  # refuses what is out of range
        self.options = replace(options, sampling=sampling)

    def settings(self, defaults: "Sampling") -> str:
        """All settings, one a line; `defaults` is the model's own sampling."""
        own = asdict(defaults)
        shown = {name: own[name] for name in (*REAL, "top_k", "seed")} | self.options.sampling
        shown |= {"max_tokens": self.options.max_tokens}
        thinking = next(word for word, value in SWITCHES.items() if value is self.options.thinking)
        rows = [*shown.items(), ("thinking", thinking)]
        return "\n".join(f"{name:<20} {'random' if value is None else value}" for name, value in rows)


def _number(name: str, text: str) -> int | float:
    try:
        return int(text) if name in WHOLE else float(text)
    except ValueError:
        kind = "a whole number" if name in WHOLE else "a number"
        raise ParameterError(f"{name} is {kind}, got {text!r:.40}; try /set {name} 1") from None
