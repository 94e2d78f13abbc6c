"""`mlx-mtp batch` through a shell's eyes: lines in, lines out, interrupts, and whatever lines come in."""

import json
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cli_runs import COMMAND, environment, one_line, run_main, write_chat_pair
from mlx_mtp import generate, load
from mlx_mtp.batch_width import MAX_BATCH

QUICK = ("--max-tokens", "8", "--seed", "3")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_chat_pair(tmp_path_factory.mktemp("pair"))


def write(path: Path, *lines: object) -> Path:
    """A file of these lines: bytes as they are, anything else as JSON."""
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(model: Path, prompts: Path, out: Path, *words: str) -> str:
    """What it said, where it ended well."""
    done = run_main("batch", model, prompts, "-o", out, *QUICK, *words)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == b""
    return done.stderr.decode()


def test_each_line_is_what_generate_gives(model, tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    prompts = write(
        tmp_path / "in.jsonl",
        {"prompt": "How many legs?", "id": "legs"},
        {"prompt": "Who?", "max_tokens": 5, "seed": 9},
        {"messages": messages, "id": 7, "sampling": {"temperature": 0.0}},
        {"prompt": "When?", "sampling": {"temperature": 0.5, "logit_bias": {"65": 3.0}}, "stop": ["e", "a"]},
        {"prompt": "Where?", "thinking": False},
    )
    said = run(model, prompts, tmp_path / "out.jsonl", "--width", "2")
    assert "5 of 5 lines answered, 0 with an error" in said and "at a time" not in said
    answers = sorted(read(tmp_path / "out.jsonl"), key=lambda answer: answer["line"])
    assert [answer["id"] for answer in answers] == ["legs", None, 7, None, None]
    pair = load(model)
    own = pair.sampling
    plain = {"max_tokens": 8, "num_draft_tokens": 0}
    asked = [
        generate(pair, _user("How many legs?"), sampling=replace(own, seed=3), **plain),
        generate(pair, _user("Who?"), sampling=replace(own, seed=9), **{**plain, "max_tokens": 5}),
        generate(pair, messages, sampling=replace(own, temperature=0.0), **plain),
        generate(
            pair,
            _user("When?"),
            sampling=replace(own, temperature=0.5, seed=3, logit_bias={65: 3.0}),
            stop=("e", "a"),
            **plain,
        ),
        generate(pair, _user("Where?"), sampling=replace(own, seed=3), thinking=False, **plain),
    ]
    assert [answer["text"] for answer in answers] == [out.text for out in asked]
    assert [answer["finish_reason"] for answer in answers] == [out.finish_reason for out in asked]
    assert [answer["seed"] for answer in answers] == [3, 9, 3, 3, 3]


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


BAD = (
    (b"not json", "is not JSON"),
    (b"[1, 2]", "a line is a JSON object"),
    (b'{"prompt": "\xff"}', "not UTF-8"),
    (b"[" * 100_000, "is not JSON"),
    ({}, 'either "prompt" or "messages"'),
    ({"prompt": "a", "messages": []}, 'either "prompt" or "messages"'),
    ({"prompt": 3}, '"prompt" is a text'),
    ({"prompt": ""}, '"prompt" is a text'),
    ({"messages": "a"}, '"messages" is a list'),
    ({"messages": [{"role": "nobody", "content": "a"}]}, "role"),
    ({"prompt": "a", "temperature": 1}, "'temperature'"),
    ({"prompt": "a", "sampling": 3}, '"sampling" is an object'),
    ({"prompt": "a", "sampling": {"top": 3}}, '"sampling" is an object'),
    (b'{"prompt": "a", "sampling": {"temperature": NaN}}', "temperature"),
    ({"prompt": "a", "sampling": {"logit_bias": {"x": 1.0}}}, "token ids"),
    ({"prompt": "a", "sampling": {"logit_bias": {"99999": 1.0}}}, "must be in 0 .. 511"),
    ({"prompt": "a", "seed": "x"}, "seed"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "a", "stop": [""]}, "stop"),
    ({"prompt": "a " * 600}, "context"),
)


def test_a_bad_line_costs_no_other(model, tmp_path):
    good = {"prompt": "How many legs?"}
    prompts = write(tmp_path / "in.jsonl", good, b"", *(line for line, _ in BAD), good)
    said = run(model, prompts, tmp_path / "out.jsonl", "--goal", "latency")
    assert " at a time" in said
    assert f"2 of {len(BAD) + 2} lines answered, {len(BAD)} with an error" in said
    answers = {answer["line"]: answer for answer in read(tmp_path / "out.jsonl")}
    assert sorted(answers) == [1, *range(3, len(BAD) + 4)], "one line for each that is not blank"
    for number, (_, words) in enumerate(BAD, 3):
        assert words in answers[number]["error"]["message"], number
        assert answers[number]["error"]["code"] in ("prompt", "parameter", "context")
    assert answers[1]["text"] == answers[len(BAD) + 3]["text"]


def test_lines_that_were_answered_are_skipped(model, tmp_path):
    """Also of lines that are alike, as many; errors and a torn line are done again, and nothing else is touched."""
    alike, other = {"prompt": "Why?"}, {"prompt": "Who?"}
    prompts, out = write(tmp_path / "in.jsonl", alike, alike, b"x", other), tmp_path / "out.jsonl"
    run(model, prompts, out)
    whole = read(out)
    assert len(whole) == 4
    first = [answer for answer in whole if "text" in answer][:1]
    error = [answer for answer in whole if "error" in answer]
    write(out, *first, *error, b'{"id": null, "line": 4, "te')
    kept = out.read_bytes().splitlines()[0]
    said = run(model, prompts, out)
    assert "1 of 4 lines were answered already" in said and "2 of 3 lines answered, 1 with an error" in said
    again = out.read_bytes().splitlines()
    assert again[0] == kept and len(again) == 4
    assert sorted(answer.get("text", "") for answer in read(out)) == sorted(a.get("text", "") for a in whole)
    write(prompts, alike, alike, other)
    assert run(model, prompts, out) == "(3 of 3 lines were answered already)\n"
    assert len(read(out)) == 3


def test_an_interrupt_keeps_what_was_answered(model, tmp_path):
    prompts = write(tmp_path / "in.jsonl", *({"prompt": f"{i}?", "max_tokens": 40 * i} for i in range(1, 10)))
    out = tmp_path / "out.jsonl"
    words = ["batch", str(model), str(prompts), "-o", str(out), "--width", "1", "--seed", "1"]
    child = subprocess.Popen([*COMMAND, *words], stderr=subprocess.PIPE, env=environment())
    deadline = time.monotonic() + 120
    while (not out.exists() or not out.read_bytes().count(b"\n")) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=60)
    assert child.returncode == 130
    answered = read(out)
    assert 1 <= len(answered) < 9 and all("text" in answer for answer in answered)
    said = run_main(*words).stderr.decode()
    assert f"{len(answered)} of 9 lines were answered already" in said
    assert sorted(answer["line"] for answer in read(out)) == list(range(1, 10))
    assert read(out)[: len(answered)] == answered


@pytest.mark.parametrize(
    "words, said, code",
    [
        (("--width", "0"), f"1 .. {MAX_BATCH} rows", 2),
        (("--width", "65"), f"1 .. {MAX_BATCH} rows", 2),
        (("--width", "wide"), f"1 .. {MAX_BATCH} rows", 2),
        (("--goal", "speed"), '"throughput" or "latency"', 2),
        (("--mtp", "99"), "0 .. 15", 2),
        (("--max-tokens", "4"), "holds no line", 2),
    ],
)
def test_what_concerns_every_line_is_refused_before_a_model_is_opened(tmp_path, words, said, code):
    prompts = write(tmp_path / "in.jsonl", b"" if said == "holds no line" else {"prompt": "a"})
    done = run_main("batch", "./none", prompts, "-o", tmp_path / "out.jsonl", *words)
    assert done.returncode == code and said in one_line(done.stderr)
    assert not (tmp_path / "out.jsonl").exists()


def test_files_that_cannot_be_used(model, tmp_path):
    prompts = write(tmp_path / "in.jsonl", {"prompt": "a"})
    for source, out, said in (
        (tmp_path / "none", tmp_path / "out", "cannot be read"),
        (prompts, prompts, "the file of prompts itself"),
        (prompts, tmp_path / "no" / "out", "cannot be written"),
        (prompts, write(tmp_path / "foreign.jsonl", {"a": 1}), "is no answer of this command"),
    ):
        done = run_main("batch", model, source, "-o", out)
        assert done.returncode in (2, 3) and said in one_line(done.stderr)
    assert read(prompts) == [{"prompt": "a"}] and read(tmp_path / "foreign.jsonl") == [{"a": 1}]


def test_several_answers_to_one_prompt(model):
    words = ("generate", model, "Why?", "--max-tokens", "6", "--seed", "3", "-n")
    done = run_main(*words, "3", "--json")
    answers = json.loads(done.stdout)["answers"]
    alone = [json.loads(run_main(*words[:5], "--seed", str(seed), "--json").stdout) for seed in (3, 4, 5)]
    assert [answer["tokens"] for answer in answers] == [answer["tokens"] for answer in alone]
    shown = run_main(*words, "3")
    assert shown.returncode == 0 and shown.stderr.decode().count("[answer ") == 3
    for n in ("0", "65"):
        refused = run_main(*words, n)
        assert refused.returncode == 2 and "1 .. 64 answers" in one_line(refused.stderr)


def test_chat_goes_on_with_the_answer_that_was_picked(model):
    lines = "/n 3\nWhy?\n/pick 2\n/pick 4\n/n 1\n/n x\n/n\nWho?\n/pick 1\n"
    done = run_main("chat", model, "--max-tokens", "6", "--seed", "3", stdin=lines.encode())
    said = done.stderr.decode()
    assert done.returncode == 0, said
    assert said.count("[answer ") == 3
    for words in (
        "going on with answer 2",
        "answers 1 .. 3",
        "n must be 1 .. 64",
        "one answer to each",
        "no answers",
    ):
        assert words in said, words
