"""A conversation that goes on as soon as its reader was told of a reply's end, however late the engine's thread is."""

import time

from engines import engine_on
from mlx_mtp.mailbox import Mailbox
from mlx_mtp.sampling import Sampling


def test_whoever_has_the_result_can_go_on_at_once(monkeypatch):
    """The engine's thread tells readers first and the conversation afterwards: here, a good while afterwards."""
    told = Mailbox._end

    def late(mailbox: Mailbox) -> None:
        time.sleep(0.2)
        told(mailbox)

    monkeypatch.setattr(Mailbox, "_end", late)
    with engine_on() as engine:
        chat = engine.conversation(max_tokens=3, sampling=Sampling(temperature=0.0))
        first = chat.say("hello").result()
        assert [message["content"] for message in chat.messages] == ["hello", first.text]
        assert chat.regenerate().result().text == first.text
        chat.say("more").result()
        assert len(chat.messages) == 4
        chat.undo()
        assert len(chat.messages) == 2
