"""One conversation in the terminal: its messages, its settings, and replies that Ctrl-C can stop."""

from contextlib import closing
from typing import TYPE_CHECKING, Any, Literal

from mlx_mtp.cli.interrupts import Interrupts
from mlx_mtp.cli.patience import Patience
from mlx_mtp.cli.several import write_answers
from mlx_mtp.cli.status import status_line
from mlx_mtp.cli.terminal import ReplyWriter, say
from mlx_mtp.errors import MtpError

if TYPE_CHECKING:
    from mlx_mtp.pair import Pair
    from mlx_mtp.stats import Stats


class _Stopped(Exception):
    """Ctrl-C came while the prompt was read."""


class Session:
    """The messages so far and how replies are made; K/V of earlier turns is reused."""

    def __init__(self, pair: "Pair", request: dict[str, Any], system: str | None, interrupts: Interrupts):
        from mlx_mtp.conversation import Conversation

        self.num_draft_tokens: int | Literal["auto"] = request.pop("num_draft_tokens")
        self.stats: Stats | None = None
        self.n = 1  # answers to each message
        self._others: list[str] = []  # the last ones, where there were several
        self._warned: str | None = None
        self._pair = pair
        self._request = request
        self._interrupts = interrupts
        self._conversation = Conversation(pair)
        self.restart(system)

    def restart(self, system: str | None) -> None:
        """Begin a new conversation, under this system prompt."""
        self.system = system
        self._messages = [{"role": "system", "content": system}] if system else []
        self._others = []
        self._conversation.clear()

    def set_mtp(self, num_draft_tokens: int | Literal["auto"]) -> None:
        """How many drafts a round from the next reply on; refused like any request for them."""
        from mlx_mtp.policy import make_policy

        make_policy(num_draft_tokens, has_drafter=self._pair.drafter is not None)
        self.num_draft_tokens = num_draft_tokens

    def set_answers(self, n: int | str) -> None:
        """How many answers each message gets from the next on; refused like any request for them."""
        from mlx_mtp.api import check_answers

        self.n = check_answers(n)  # type: ignore[arg-type]  # it refuses what is no number

    def pick(self, argument: str) -> None:
        """Go on with another of the last answers."""
        if not self._others:
            say("there are no answers to choose from; /n N asks for several")
        elif not (argument.isascii() and argument.isdigit() and 1 <= int(argument) <= len(self._others)):
            say(f"choose one of the answers 1 .. {len(self._others)}, such as /pick 1")
        else:
            self._messages[-1] = {"role": "assistant", "content": self._others[int(argument) - 1]}
            say(f"(going on with answer {int(argument)})")

    def say(self, text: str) -> None:
        """Say `text` to the model and write its reply as it comes; a turn that gave nothing is taken back."""
        self._messages.append({"role": "user", "content": text})
        writer = ReplyWriter()
        answer: list[str] = []
        self._others = []
        try:
            with self._interrupts.during_reply():
                if self.n > 1:
                    self._several(answer)
                else:
                    self._stream(writer, answer)
        except _Stopped:
            say("(stopped before the reply began)" if self.n == 1 else "(stopped; no answer is kept)")
        except MtpError as error:
            writer.finish()
            say(str(error))
        self._interrupts.settled()
        if any(answer):
            self._messages.append({"role": "assistant", "content": "".join(answer)})
        else:
            self._messages.pop()

    def _stream(self, writer: ReplyWriter, answer: list[str]) -> None:
        """Write a reply's chunks and collect its answer until it ends or Ctrl-C asks it to stop."""
        chunks = self._conversation.stream(
            self._messages,
            num_draft_tokens=self.num_draft_tokens,
            on_progress=self._stop_if_asked,
            **self._request,
        )
        finish_reason = note = None
        with closing(chunks), Patience(writer) as patience:
            for chunk in chunks:
                patience.heard()
                writer.write(chunk.thought, "thought")
                writer.write(chunk.tool_call, "tool call")
                writer.write(chunk.text, "answer")
                answer.append(chunk.text)
                self.stats, finish_reason, note = chunk.stats, chunk.finish_reason, chunk.note
                if self._interrupts.asked:
                    break
        writer.finish()
        self._close(finish_reason, note)

    def _several(self, answer: list[str]) -> None:
        """Write some answers when all have ended; the conversation goes on with the first."""
        from mlx_mtp.answers import answers_in
        from mlx_mtp.batch import Watch

        def on_round(tokens: int) -> None:
            self._stop_if_asked(tokens, tokens)

        watch = Watch(self._stop_if_asked, on_round, on_note=lambda note: say(f"({note})"))
        outs = answers_in(
            self._conversation,
            self._messages,
            self.n,
            num_draft_tokens=self.num_draft_tokens,
            watch=watch,
            **self._request,
        )
        write_answers(outs)
        self.stats = outs[0].stats
        answer.append(outs[0].text)
        if outs[0].text:
            self._others = [out.text for out in outs]
            say("(the conversation goes on with answer 1; /pick I takes another)")

    def _stop_if_asked(self, done: int, total: int) -> None:
        if self._interrupts.asked:
            raise _Stopped

    def _close(self, finish_reason: str | None, note: str | None) -> None:
        """The line under a reply, and what was unusual about its end."""
        if finish_reason is None:
            say("(stopped)")
        elif finish_reason == "length":
            say("(cut off: the reply reached its limit of tokens; --max-tokens sets it)")
        elif note is not None:
            say(f"({note})")
        if self.stats is not None:
            if self.stats.warning not in (None, self._warned):
                say(f"warning: {self.stats.warning}")
            self._warned = self.stats.warning
            say(status_line(self.stats, self._pair.max_context))
