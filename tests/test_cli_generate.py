"""`mlx-mtp generate` through a shell's eyes: streams, exit codes, refusals, and whatever bytes come in or out."""

import io
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from cli_runs import COMMAND, CONTEXT, babble, environment, one_line, run_cli, run_main, write_chat_pair
from tiny_checkpoints import edit_json

SHORT = ("--max-tokens", "12", "--seed", "3", "--mtp", "off")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_chat_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def babbling(model) -> tuple[str, ...]:
    return babble(model)


def start(model: Path, *words: str) -> subprocess.Popen[bytes]:
    command = [*COMMAND, "generate", str(model), *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=environment())


def answer(model: Path, *words: str, stdin: bytes = b"") -> dict:
    done = run_main("generate", model, *words, "--json", stdin=stdin)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def test_only_the_answer_is_on_stdout(model):
    done = run_cli("generate", model, "How many legs has a spider?", *SHORT)
    assert done.returncode == 0
    asked = answer(model, "How many legs has a spider?", *SHORT)
    assert asked["stats"]["generation_tokens"] == len(asked["tokens"]) == 12
    shown = done.stdout.decode()
    assert [char for char in shown if char.isalnum()] == [char for char in asked["text"] if char.isalnum()]
    status = done.stderr.decode().splitlines()[-1]
    assert status.startswith("12 tok · ")
    assert f"/{CONTEXT}" in status


def test_the_seed_decides_and_drafting_does_not(model):
    texts = [answer(model, "Why?", *SHORT, "--mtp", mtp)["tokens"] for mtp in ("off", "2", "auto")]
    assert texts[0] == texts[1] == texts[2]
    other = answer(model, "Why?", "--max-tokens", "12", "--seed", "4")["tokens"]
    assert other != texts[0]


def test_temperature_zero_overrides_the_models_sampling(model):
    texts = [answer(model, "Why?", "--max-tokens", "8", "--temperature", "0")["tokens"] for _ in range(2)]
    assert texts[0] == texts[1]


def test_piped_text_follows_the_question(model):
    piped = answer(model, "What is this?", *SHORT, stdin=b"A quick fox.\n")
    typed = answer(model, "What is this?\n\nA quick fox.\n", *SHORT)
    assert piped["tokens"] == typed["tokens"]
    assert piped["stats"]["prompt_tokens"] == typed["stats"]["prompt_tokens"]


def test_piped_text_alone_is_a_prompt(model):
    assert answer(model, *SHORT, stdin=b"Why?")["tokens"] == answer(model, "Why?", *SHORT)["tokens"]


def test_invalid_utf8_is_replaced_and_said_once(model):
    done = run_main("generate", model, "", *SHORT, "--json", stdin=b"A \xff\xfe fox\xe2\x82")
    assert done.returncode == 0
    assert done.stderr.decode().count("U+FFFD") == 1
    replaced = answer(model, *SHORT, stdin="A \ufffd\ufffd fox\ufffd".encode())
    assert json.loads(done.stdout)["tokens"] == replaced["tokens"]


def test_an_argument_that_is_not_utf8_is_replaced_too(model):
    command = [os.fsencode(word) for word in (*COMMAND, "generate", str(model), *SHORT)]
    done = subprocess.run([*command, b"A \xff fox"], stdin=subprocess.DEVNULL, capture_output=True)
    assert done.returncode == 0
    assert done.stderr.decode().count("U+FFFD") == 1


@pytest.mark.parametrize("words", [(), ("",)])
def test_an_empty_prompt_is_a_usage_error(model, words):
    done = run_main("generate", model, *words)
    assert done.returncode == 2
    assert "the prompt is empty" in one_line(done.stderr)
    assert done.stdout == b""


def test_a_prompt_of_whitespace_goes_through_the_template(model):
    assert len(answer(model, " \n ", *SHORT)["tokens"]) == 12


def test_control_tokens_in_the_prompt_stay_text(model):
    plain = answer(model, "x", *SHORT)["stats"]["prompt_tokens"]
    spelled = answer(model, "x<|turn>model", *SHORT)["stats"]["prompt_tokens"]
    assert spelled - plain >= len("<|turn>")  # a control token would be one


def test_a_prompt_beyond_the_context_is_refused_with_counts(model):
    done = run_main("generate", model, "x " * 2 * CONTEXT)
    assert done.returncode == 2
    line = one_line(done.stderr)
    assert str(CONTEXT) in line
    assert "shorten" in line


def test_stdin_without_end_is_refused_in_bounded_memory(model):
    done = run_main("generate", model, "What is this?", stdin=b"y\n" * (17 << 20))
    assert done.returncode == 2
    assert "32 MiB" in one_line(done.stderr)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--temperature", "nan"), "temperature"),
        (("--temperature", "-1"), "temperature"),
        (("--top-p", "0"), "top_p"),
        (("--top-p", "1.5"), "top_p"),
        (("--top-k", "-1"), "top_k"),
        (("--min-p", "2"), "min_p"),
        (("--repetition-penalty", "0"), "repetition_penalty"),
        (("--max-tokens", "0"), "max_tokens"),
        (("--max-tokens", "-5"), "max_tokens"),
        (("--stop", ""), "stop"),
        (("--mtp", "100"), "num_draft_tokens"),
        (("--mtp", "on"), "auto, off or a number"),
        (("--mtp", "3", "--drafter", "none"), "without a drafter"),
        (("--text", "--system", "Be brief."), "--text"),
        (("--text", "--thinking"), "--text"),
    ],
)
def test_parameters_out_of_range_are_usage_errors(model, words, said):
    done = run_main("generate", model, "Why?", *words)
    assert done.returncode == 2
    assert said in one_line(done.stderr)
    assert done.stdout == b""


@pytest.mark.parametrize(
    "words",
    [
        ("--top-k", "1000000"),
        ("--seed", "-1"),
        ("--seed", str(2**64 + 1)),
        ("--mtp", "0"),
        ("--mtp", "15"),
    ],
)
def test_parameters_at_the_edge_are_defined(model, words):
    first, second = (answer(model, "Why?", *SHORT, *words)["tokens"] for _ in range(2))
    assert first == second
    assert len(first) == 12


def test_a_huge_max_tokens_ends_with_the_context(model):
    done = answer(model, "Why?", "--max-tokens", str(10**12), "--seed", "3", "--mtp", "off")
    stats = done["stats"]
    assert done["finish_reason"] in ("stop", "length")
    assert stats["prompt_tokens"] + stats["generation_tokens"] <= CONTEXT


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("/no/such/folder",), "/no/such/folder"),
        (("gemma-4-E4B-it",), "./path"),
        (("./\x1b[2Jnothing",), "./[2Jnothing"),
    ],
)
def test_a_missing_model_is_refused_without_a_traceback(words, said):
    done = run_main("generate", *words, "Why?")
    assert done.returncode == 3
    assert said in one_line(done.stderr)


def test_a_drafter_of_another_size_is_refused(tmp_path):
    model = write_chat_pair(tmp_path)
    edit_json(tmp_path / "drafter" / "config.json", backbone_hidden_size=128)
    done = run_main("generate", model, "Why?")
    assert done.returncode == 3
    assert "128" in one_line(done.stderr)


def test_without_a_drafter_it_decodes_plainly_and_says_so_once(model):
    lone = run_main("generate", model, "Why?", *SHORT, "--drafter", "none")
    assert lone.returncode == 0
    assert lone.stdout == run_main("generate", model, "Why?", *SHORT).stdout


def test_a_reader_who_leaves_ends_it_quietly(model, babbling):
    process = start(model, *babbling)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0
    assert stderr == b""


def test_closed_standard_streams_are_no_crash(model):
    words = " ".join([*map(str, (model, "Why?", *SHORT)), "<&-", ">&-", "2>&-"])
    done = subprocess.run(["sh", "-c", f'exec "$@" {words}', "sh", *COMMAND, "generate"], env=environment())
    assert done.returncode == 0


@pytest.mark.parametrize("home", [None, "/proc/nowhere"])
def test_no_home_or_one_that_cannot_be_written(model, home):
    done = run_cli("generate", model, "Why?", *SHORT, HOME=home, XDG_CACHE_HOME=home)
    assert done.returncode == 0
    assert done.stdout


def test_ctrl_c_in_a_reply_ends_it_with_130_and_no_traceback(model, babbling):
    class PressesCtrlC(io.BytesIO):
        """The person at this screen presses Ctrl-C as soon as it shows something."""

        def write(self, data) -> int:
            signal.raise_signal(signal.SIGINT)
            return super().write(data)

    done = run_main("generate", model, *babbling, screen=PressesCtrlC())
    assert done.returncode == 130
    assert len(done.stdout) < 10
    assert b"Traceback" not in done.stderr


def test_no_control_byte_of_the_model_is_written(model, babbling):
    assert "\x1b" in answer(model, *babbling)["text"]
    shown = run_cli("generate", model, *babbling, TERM="xterm")
    assert len(shown.stdout) > 100
    for stream in (shown.stdout, shown.stderr):
        assert not {char for char in stream.decode() if ord(char) < 32 and char not in "\n\t"}
        assert b"\x7f" not in stream


@pytest.mark.parametrize("words", [("generate",), ("generate", "demo", "x", "--top-k", "many"), ("dance",)])
def test_wrong_usage_exits_with_2(words):
    done = run_main(*words)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert b"--help" in done.stderr


def test_the_first_token_is_written_before_the_last_is_made(model, babbling):
    process = start(model, *babbling)
    assert process.stdout is not None
    process.stdout.read(1)
    first = time.monotonic()
    rest, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert time.monotonic() - first > 0.01
    assert len(rest) > 100
