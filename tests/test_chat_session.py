"""Conversations that are kept, changed and taken up again; settings; chat for programs."""

import json
import os
import stat
import sys
from pathlib import Path
from unittest import mock

import pytest

from cli_runs import environment, one_line, run_cli, run_main, write_chat_pair
from mlx_mtp import Sampling
from mlx_mtp.cli.options import ReplyOptions
from mlx_mtp.cli.talk import Talk
from mlx_mtp.cli.transcripts import (
    Transcript,
    conversation_path,
    kept_conversations,
    load_conversation,
    save_conversation,
)
from mlx_mtp.cli.why import explanation
from mlx_mtp.errors import ParameterError, StorageError
from mlx_mtp.policy import AutoPolicy, FixedPolicy
from mlx_mtp.stats import Stats
from mlx_mtp.store import data_folder
from test_cli_chat import SHORT, STATUS, Terminal

MESSAGES = ({"role": "user", "content": "Grüße \u202e?"}, {"role": "assistant", "content": "Ja."})


def in_its_home(ask):
    """What `ask` gives where the commands of this test keep their files."""
    with mock.patch.dict(os.environ, environment(), clear=True):
        return ask()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_chat_pair(tmp_path_factory.mktemp("pair"))


def talk(**sampling) -> Talk:
    return Talk("demo", ReplyOptions(9, "auto", (), None, sampling), "plain", [dict(one) for one in MESSAGES])


def test_a_kept_conversation_comes_back_as_it_was_and_is_its_owners_alone(tmp_path):
    path = tmp_path / "deep" / "talk.json"
    save_conversation(path, Transcript("demo", MESSAGES))
    assert load_conversation(path) == Transcript("demo", MESSAGES)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["talk.json"]  # nothing half written beside it


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "no conversation"),
        (b"[]", "no conversation"),
        (b'{"mlx_mtp_conversation": 1}', "no conversation"),
        (b'{"mlx_mtp_conversation": 2, "model": "demo", "messages": []}', "update mlx-mtp"),
        (
            b'{"mlx_mtp_conversation": 1, "model": "demo", "messages": [{"role": "tool", "content": ""}]}',
            "no conv",
        ),
        (b'{"mlx_mtp_conversation": 1, "model": 7, "messages": []}', "no conversation"),
    ],
)
def test_a_file_that_is_no_conversation_is_refused_and_left_alone(tmp_path, content, said):
    path = tmp_path / "notes.json"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=said):
        load_conversation(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["", "..", "a b", "-x", "x" * 65, "a\x1b"])
def test_names_that_are_no_names_are_refused(name):
    with pytest.raises(ParameterError, match="or give a path"):
        conversation_path(name)


def test_conversations_are_listed_the_newest_first():
    for number, name in enumerate(("old", "new")):
        save_conversation(conversation_path(name), Transcript("demo", MESSAGES))
        os.utime(conversation_path(name), (1000 + number, 1000 + number))
    assert [path.stem for path, _ in kept_conversations()] == ["new", "old"]


def test_a_message_is_taken_back_with_its_answer():
    own = talk()
    assert own.take_back() == MESSAGES[0]["content"] and own.messages == []
    assert own.take_back() is None


def test_settings_are_checked_and_shown():
    own = talk(seed=3)
    own.set("temperature", "0.5")
    own.set("max_tokens", "33")
    own.set("thinking", "on")
    own.next_seed()
    assert own.options == ReplyOptions(33, "auto", (), True, {"seed": 4, "temperature": 0.5})
    shown = own.settings(Sampling(top_k=64)).splitlines()
    assert (
        "temperature          0.5" in shown
        and "top_k                64" in shown
        and "thinking             on" in shown
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", "hot"), ("temperature", "-1"), ("top_k", "1.5"), ("max_tokens", "0"), ("dance", "1"),
     ("thinking", "maybe"), ("temperature", "nan")],
)  # fmt: skip
def test_settings_that_are_none_are_refused_and_change_nothing(name, value):
    own = talk()
    before = own.options
    with pytest.raises(ParameterError):
        own.set(name, value)
    assert own.options == before


def test_why_shows_what_the_policy_decides_by():
    policy = AutoPolicy()
    stats = Stats(rounds=3, num_draft_tokens=(0, 2, 2))
    text = explanation(policy, stats, None)
    assert "1 rounds with 0, 2 rounds with 2 drafts" in text
    row = next(line for line in text.splitlines() if line.startswith("4 "))
    assert f"{policy.expected_tokens(4):.2f}" in row and f"×{policy.gain(4):.2f}" in row and "expected" in row
    assert "fixed number" in explanation(FixedPolicy(2), None, None)


def test_one_message_and_piped_text_is_one_answer(model):
    done = run_cli("chat", model, "What is this?", *SHORT, stdin=b"some text\n", TERM="xterm")
    assert done.returncode == 0 and done.stderr.count(b" tok/s") == 1
    assert b"\x1b" not in done.stdout + done.stderr


def test_turns_as_json_lines(model):
    done = run_main("chat", model, *SHORT, "--jsonl", stdin=b"Why?\n/mtp 2\nAnd?\n")
    turns = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert [turn["question"] for turn in turns] == ["Why?", "And?"]
    assert all(turn["finish_reason"] in ("stop", "length") for turn in turns)
    assert turns[0]["stats"]["drafted"] == 0 and turns[1]["stats"]["reused_tokens"] > 0


def test_a_conversation_as_one_json_object(model):
    done = run_main("chat", model, *SHORT, "--json", stdin=b"Why?\n")
    found = json.loads(done.stdout)
    assert len(found["turns"]) == 1 and found["turns"][0]["stats"]["generation_tokens"] > 0
    refused = run_main("chat", model, "--json", "--jsonl", stdin=b"")
    assert refused.returncode == 2 and "choose one" in one_line(refused.stderr)


def test_lines_between_three_quotes_are_one_message(model):
    done = run_main("chat", model, *SHORT, "--jsonl", stdin=b'"""\nfirst\n\nsecond\n"""\n"""one"""\n')
    questions = [json.loads(line)["question"] for line in done.stdout.decode().splitlines()]
    assert questions == ["first\n\nsecond", "one"]


def test_piped_chats_keep_nothing(model):
    run_main("chat", model, *SHORT, stdin=b"Why?\n")
    assert in_its_home(kept_conversations) == []


def test_a_session_that_is_changed_kept_and_taken_up_again(model, tmp_path):
    editor = tmp_path / "editor"
    editor.write_text(f"#!{sys.executable}\nimport sys\nopen(sys.argv[1], 'w').write('Edited?')\n")
    editor.chmod(0o755)
    chat = Terminal(model, *SHORT, term="xterm", columns=400, env={"EDITOR": str(editor)})
    chat.ready()

    def typed(line: str, shown: str) -> None:
        chat.sendline(line)
        chat.expect(shown)

    typed("Why?", STATUS)
    typed("/regen", STATUS)
    typed("/edit", STATUS)
    typed("/set seed 5", "seed is 5")
    typed("/set seed", "takes a name and a value")
    typed("/image cat.png", "describe it in words")
    typed("/save one", r"saved: .*conversations/one\.json")
    kept = load_conversation(in_its_home(lambda: conversation_path("one")))
    assert [message["content"] for message in kept.messages if message["role"] == "user"] == ["Edited?"]
    typed("/undo", "taken back")
    typed("/undo", "nothing to go back to")
    typed("/trace", "accepted draft")
    typed("/mtp 2", "2 draft tokens")
    typed("And?", STATUS)
    typed("/load one", "going on with one: 1 message")
    typed("/thoughts", "came without thoughts")
    typed("/resume 99", "no conversation was kept|choose one of")
    typed(f"/model {tmp_path}/nothing", "going on with")
    chat.sendline("/exit")
    assert chat.left_with() == 0
    again = Terminal(model, *SHORT, "--resume", term="dumb")
    again.expect("going on with")
    again.sendeof()
    assert again.left_with() == 0


def test_pasted_lines_are_one_message_and_history_is_kept_apart(model):
    chat = Terminal(model, *SHORT, term="xterm", columns=400)
    chat.ready()
    chat.send("\x1b[200~first\nsecond\x1b[201~\r")
    chat.expect(STATUS)
    chat.ready()
    chat.sendline("/exit")
    assert chat.left_with() == 0
    history = in_its_home(data_folder) / "chat-history"
    assert "+first\n+second\n" in history.read_text() and stat.S_IMODE(history.stat().st_mode) == 0o600
    kept = load_conversation(in_its_home(kept_conversations)[0][0])
    assert kept.messages[0]["content"] == "first\nsecond"
    before = history.read_text()
    chat = Terminal(model, *SHORT, "--no-history", term="xterm")
    chat.ready()
    chat.sendline("secret")
    chat.expect(STATUS)
    chat.ready()
    chat.sendeof()
    assert chat.left_with() == 0
    assert history.read_text() == before and len(in_its_home(kept_conversations)) == 1
