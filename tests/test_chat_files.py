"""/save and /load with K/V: the next answer is a cold one's and reads nothing again, and any doubt costs a line."""

import os
import stat
from pathlib import Path

import pytest

from mlx_mtp.cli import chat_files
from mlx_mtp.cli.chat_commands import obey
from mlx_mtp.cli.commands import read_line
from mlx_mtp.cli.interrupts import Interrupts
from mlx_mtp.cli.options import ReplyOptions
from mlx_mtp.cli.session import Session
from mlx_mtp.cli.talk import Talk
from mlx_mtp.cli.transcripts import kv_path, load_conversation
from servers import demo_pair


def session_with(max_tokens: int = 12) -> Session:
    options = ReplyOptions(max_tokens, 2, (), None, {"temperature": 0.0})
    return Session(demo_pair(), Talk("demo", options, "plain"), Interrupts())


def do(session: Session, line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """A command -> what was said on it."""
    capsys.readouterr()
    obey(session, read_line(line))
    return capsys.readouterr().err


@pytest.fixture
def kept(tmp_path, capsys) -> tuple[Path, list[dict[str, str]]]:
    """A conversation of one turn that was saved with its K/V, and how it goes on without a break."""
    path = tmp_path / "talk.json"
    session = session_with()
    session.say("What is MLX?")
    said = do(session, f"/save {path} --kv", capsys)
    assert str(path) in said and "of K/V beside it" in said
    assert stat.S_IMODE(kv_path(path).stat().st_mode) == 0o600
    session.talk.kept_as = None
    session.say("What is MTP?")
    return path, session.talk.messages


def test_a_conversation_goes_on_from_its_kv(kept, capsys):
    path, whole = kept
    session = session_with()
    said = do(session, f"/load {path}", capsys)
    assert ": 1 message)" in said and "with the K/V of" in said
    session.say("What is MTP?")
    assert session.talk.messages == whole
    assert session.stats.reused_tokens > 20, "only the new turn was read"
    cold = session_with()
    cold.talk.messages = [dict(one) for one in whole[:2]]
    cold.say("What is MTP?")
    assert cold.talk.messages == whole and cold.stats.reused_tokens == 0
    # The longer conversation is kept in words; its K/V are still those of its beginning.
    assert len(load_conversation(path).messages) == 4
    again = session_with()
    assert "with the K/V of" in do(again, f"/load {path}", capsys)


@pytest.mark.parametrize("damage", ["cut", "foreign", "missing", "words"])
def test_kv_that_do_not_fit_cost_a_line_and_the_words_still_load(kept, damage, capsys, monkeypatch):
    path, whole = kept
    file = kv_path(path)
    if damage == "cut":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "foreign":
        monkeypatch.setattr("mlx_mtp.kept_kv.model_key", lambda pair: "another")
    elif damage == "missing":
        file.unlink()
    else:
        path.write_text(path.read_text().replace("What is MLX?", "Something quite different"))
    session = session_with()
    said = do(session, f"/load {path}", capsys)
    if damage == "words":
        # What both begin with may be used, and no more.
        assert session._conversation.history.rows == 0 or "with the K/V of" in said
        return
    assert said.count("are not used") == 1 and "read anew" in said
    session.say("What is MTP?")
    assert session.talk.messages == whole and session.stats.reused_tokens == 0


def test_kv_are_kept_where_asked_for_alone(tmp_path, capsys):
    session = session_with(max_tokens=4)
    assert "no K/V yet" in do(session, f"/save {tmp_path}/early.json --kv", capsys)
    session.say("What is MLX?")
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    do(session, f"/save {first} --kv", capsys)
    do(session, f"/save {second}", capsys)
    assert load_conversation(first).kv and load_conversation(second).kv is None
    assert kv_path(first).exists() and not kv_path(second).exists()
    do(session, "/clear", capsys)
    session.say("What is MTP?")
    do(session, f"/save {first}", capsys)
    assert not kv_path(first).exists(), "nobody could use those of the conversation before"
    assert "/save NAME" in do(session_with(), "/save", capsys)
    assert chat_files.WITH_KV in do(session, "/help", capsys)
