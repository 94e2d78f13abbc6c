"""One conversation in the terminal with one model: replies that Ctrl-C can stop, on the K/V of earlier turns."""

from contextlib import closing
from typing import TYPE_CHECKING

from mlx_mtp.cli.interrupts import Interrupts
from mlx_mtp.cli.json_turns import JsonTurns
from mlx_mtp.cli.patience import Patience
from mlx_mtp.cli.several import write_answers
from mlx_mtp.cli.status import context_warning, status_line
from mlx_mtp.cli.talk import Talk
from mlx_mtp.cli.terminal import say
from mlx_mtp.cli.transcripts import save_conversation
from mlx_mtp.errors import MtpError, StorageError

if TYPE_CHECKING:
    from pathlib import Path

    from mlx_mtp.cli.reply_views import ReplyView
    from mlx_mtp.pair import Pair
    from mlx_mtp.policy import Policy
    from mlx_mtp.reply import Chunk
    from mlx_mtp.stats import Stats


class _Stopped(Exception):
    """Ctrl-C came while the prompt was read."""


class Session:
    """A talk with a pair; K/V of earlier turns is reused."""

    def __init__(self, pair: "Pair", talk: Talk, interrupts: Interrupts, turns: JsonTurns | None = None):
        from mlx_mtp.conversation import Conversation

        self.pair, self.talk = pair, talk
        self.stats: Stats | None = None
        self.thoughts = ""  # before the last answer
        self._others: list[str] = []  # the last answers, where there were several
        self._warned: set[str] = set()
        self._interrupts, self._turns = interrupts, turns
        self._conversation = Conversation(pair)

    @property
    def policy(self) -> "Policy":
        """What chooses the number of drafts of the next reply."""
        return self._conversation.policy(self.talk.options.num_draft_tokens)

    def restart(self, system: str | None) -> None:
        """Begin a new conversation, under this system prompt."""
        self.talk.restart(system)
        self._others = []
        self._conversation.clear()

    def save_kv(self, path: "Path") -> tuple[str, int]:
        """Keep the K/V of what was said -> its file's SHA-256 and bytes. Raises StorageError."""
        from mlx_mtp.kept_kv import save_kv

        return save_kv(path, self._conversation.history, self.pair)

    def load_kv(self, path: "Path", digest: str) -> int:
        """Go on from kept K/V -> the tokens of this conversation that need not be read again.

        Raises StorageError for a file that is not the one that was kept, or not this model's, and MemoryRefusal.
        """
        from mlx_mtp.kept_kv import load_kv
        from mlx_mtp.prompt import render_chat

        load_kv(path, self._conversation.history, self.pair, digest)
        thinking = self.talk.options.thinking
        ids = render_chat(self.pair.prompt_format, self.talk.messages, thinking=thinking).ids
        tokens = self._conversation.history.reusable(ids)
        if not tokens:
            self._conversation.clear()
            raise StorageError(f"{path.name} belongs to other words")
        return tokens

    def pick(self, argument: str) -> None:
        """Go on with another of the last answers."""
        if not self._others:
            say("there are no answers to choose from; /n N asks for several")
        elif not (argument.isascii() and argument.isdigit() and 1 <= int(argument) <= len(self._others)):
            say(f"choose one of the answers 1 .. {len(self._others)}, such as /pick 1")
        else:
            self.talk.messages[-1] = {"role": "assistant", "content": self._others[int(argument) - 1]}
            self._keep()
            say(f"(going on with answer {int(argument)})")

    def say(self, text: str) -> None:
        """Say `text` to the model and show its reply as it comes; a turn that gave nothing is taken back."""
        messages = self.talk.messages
        messages.append({"role": "user", "content": text})
        answer: list[str] = []
        self._others, self.thoughts = [], ""
        try:
            with self._interrupts.during_reply():
                if self.talk.n > 1:
                    self._several(answer)
                else:
                    self._stream(answer)
        except _Stopped:
            say("(stopped before the reply began)" if self.talk.n == 1 else "(stopped; no answer is kept)")
        except MtpError as error:
            say(str(error))
        self._interrupts.settled()
        if any(answer):
            messages.append({"role": "assistant", "content": "".join(answer)})
            self._keep()
        else:
            messages.pop()

    def _stream(self, answer: list[str]) -> None:
        """Show a reply's chunks and collect its answer until it ends or Ctrl-C asks it to stop."""
        chunks = self._conversation.stream(
            self.talk.messages, on_progress=self._stop_if_asked, **self.talk.options.request(self.pair)
        )
        view, last = self._view(), None
        try:
            with closing(chunks), Patience(view) as patience:
                for last in chunks:
                    patience.heard()
                    view.take(last)
                    answer.append(last.text)
                    self.thoughts += last.thought
                    if self._interrupts.asked:
                        break
        finally:
            view.finish()
        if last is not None:
            self._close(last)
            if self._turns is not None:
                self._turns.write(self.talk.messages[-1]["content"], "".join(answer), last)

    def _view(self) -> "ReplyView":
        if self._turns is not None:
            return self._turns.view()
        from mlx_mtp.cli.reply_views import MarkdownView, PlainView, TraceView

        views = {"markdown": MarkdownView, "trace": TraceView, "plain": PlainView}
        return views[self.talk.view]()

    def _several(self, answer: list[str]) -> None:
        """Write some answers when all have ended; the conversation goes on with the first."""
        from mlx_mtp.answers import answers_in
        from mlx_mtp.batch_watch import Watch

        def on_round(tokens: int) -> None:
            self._stop_if_asked(tokens, tokens)

        watch = Watch(self._stop_if_asked, on_round, on_note=lambda note: say(f"({note})"))
        outs = answers_in(
            self._conversation,
            self.talk.messages,
            self.talk.n,
            watch=watch,
            **self.talk.options.request(self.pair),
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

    def _close(self, last: "Chunk") -> None:
        """The line under a reply, and what was unusual about its end."""
        self.stats = last.stats
        if last.finish_reason is None:
            say("(stopped)")
        elif last.finish_reason == "length":
            say("(cut off: the reply reached its limit of tokens; --max-tokens or /set max_tokens sets it)")
        elif last.note is not None:
            say(f"({last.note})")
        self._say_once(last.stats.warning, "warning: ")
        say(status_line(last.stats, self.pair.max_context, plain_tps=self._plain_tps()))
        self._say_once(context_warning(last.stats, self.pair.max_context))

    def _plain_tps(self) -> float | None:
        """Tokens a second without drafts, where such rounds were timed since this program began."""
        times = self.pair.rounds.times
        seconds = times.plain_seconds() if times.timed(0) else None
        return None if seconds is None else 1 / seconds

    def _say_once(self, text: str | None, prefix: str = "") -> None:
        if text is not None and text not in self._warned:
            say(prefix + text)
            self._warned.add(text)

    def _keep(self) -> None:
        """Write the conversation down, where it is kept; what cannot be written is spoken of once."""
        if self.talk.kept_as is None:
            return
        try:
            save_conversation(self.talk.kept_as, self.talk.transcript())
        except StorageError as error:
            self._say_once(str(error), "warning: the conversation is not kept: ")
