"""`mlx-mtp bench` as a person runs it: every format, interrupted and resumed; it says no when it must."""

import errno
import json
import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_mtp.round
from bench_runs import made_document
from cli_runs import COMMAND, environment, one_line, run_main, write_chat_pair
from mlx_mtp.cli.bench_lock import alone
from mlx_mtp.cli.bench_progress import BenchProgress
from mlx_mtp.cli.sizes import columns_of
from mlx_mtp.conversation import Conversation
from mlx_mtp.measure.plan import Case
from mlx_mtp.measure.results import read_document, write_document
from mlx_mtp.measure.run import Step
from mlx_mtp.policy import FixedPolicy

QUICK = ("--workload", "chat", "--context", "0", "--sampling", "greedy", "--prompts", "1", "--tokens", "8")
TWICE = ("--repeats", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_chat_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(autouse=True)
def uncompiled():
    """Compiling costs seconds a kind of round on a processor."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(autouse=True)
def own_lock(monkeypatch, tmp_path):
    """A bench that runs on this machine beside the tests is not theirs."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture
def at_rest(monkeypatch):
    """Other tests that run beside this one are no other load."""
    monkeypatch.setattr("mlx_mtp.measure.conditions.most_by_others", lambda processors: float("inf"))


def kept_run() -> Path:
    """The file that the only run of this test's home is kept in."""
    [path] = Path(environment()["HOME"]).rglob("bench/*.json")
    return path


def test_a_run_is_complete_in_every_format(model, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    plot = tmp_path / "out.svg"
    words = ("--batch", "1,2", "--arms", "plain,mlx-lm,auto,k=2", "--plot", plot)
    done = run_main("bench", model, *QUICK, *TWICE, *words)
    assert done.returncode == 0, done.stderr
    said, aside = done.stdout.decode(), done.stderr.decode()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits
    for arm in ("plain", "mlx-lm", "auto", "k=2"):
        assert f"\n  {arm} " in said
    assert "1 at a time" in said and "2 at a time" in said
    assert "the same tokens as without, 48 tokens compared" in said
    assert "its best token is ours 8 of 8 times" in said
    assert "warm-up, discarded" in said and "energy: " in said
    assert "\x1b" not in said + aside and "\r" not in aside, "no terminal"
    assert "bench   0 %" in aside
    assert plot.read_text().startswith("<?xml")

    path = kept_run()
    assert str(path) in aside
    document = read_document(path)
    assert document["complete"] and len(document["cases"]) == 2
    assert document["fingerprint"]["target"]["files"]["model.safetensors"]
    assert str(model) not in path.read_text(), "where a model lies is nobody's business"
    for form, holds in (
        ("md", "| chat | greedy |"),
        ("csv", "chat,greedy,0,2,k=2"),
        ("jsonl", '"arm": "k=2"'),
        ("json", '"rows"'),
    ):
        out = tmp_path / f"out.{form}"
        again = run_main("bench", "--resume", path, "--format", form, "-o", out)
        assert again.returncode == 0 and not again.stdout
        assert holds in out.read_text()
        assert run_main("bench", "--resume", path, "--format", form).stdout.decode() == out.read_text()
    assert run_main("bench", "--compare", path, tmp_path / "out.json").returncode == 0


def test_an_interrupted_run_is_kept_and_goes_on(model, tmp_path):
    words = ("--workload", "chat,prose,code,json", "--arms", "plain,k=2", *QUICK[2:], "--repeats", "4")
    command = [*COMMAND, "bench", str(model), *words]
    environ = environment(MLX_DISABLE_COMPILE="1", TMPDIR=str(tmp_path))
    home = Path(environ["HOME"])
    running = subprocess.Popen(
        command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = [path for path in home.rglob("bench/*.json") if '"done": true' in path.read_text()]
        if found or running.poll() is not None:
            break
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert out == b""
    [line] = [line for line in err.decode().splitlines() if line.startswith("mlx-mtp bench --resume ")]
    path = Path(line.removeprefix("mlx-mtp bench --resume "))
    document = read_document(path)
    assert not document["complete"]
    first = document["cases"]["chat/greedy/0/1"]
    assert first["done"] and len(first["arms"]["plain"]["samples"]) == 4

    assert "is a folder" in one_line(run_main("bench", "--resume", path).stderr)
    other = run_main("bench", "demo", "--resume", path)
    assert other.returncode == 2 and "begun on something else" in other.stderr.decode()
    done = run_main("bench", model, "--resume", path)
    assert done.returncode == 0, done.stderr
    whole = read_document(path)
    assert whole["complete"] and len(whole["cases"]) == 4
    assert whole["cases"]["chat/greedy/0/1"]["arms"] == first["arms"], (
        "what was measured is not measured again"
    )


def test_a_planted_slow_drafter_breaks_the_guarantee(model, monkeypatch, at_rest):
    """Drafts that take long and are no better, and a policy that plays them all the same."""
    honest = mlx_mtp.round.draft

    def slow(*given, **named):
        time.sleep(0.1)  # not compiled, a round comes by here each time
        return honest(*given, **named)

    monkeypatch.setattr(mlx_mtp.round, "draft", slow)
    monkeypatch.setattr("mlx_mtp.pair.make_policy", lambda drafts, **options: FixedPolicy(4 if drafts else 0))
    done = run_main("bench", model, *QUICK[:-1], "5", "--repeats", "3", "--arms", "plain,auto", "--guarantee")
    assert done.returncode == 1
    said = " ".join(done.stderr.decode().split())
    assert "auto time: SLOWER: " in said
    assert "auto text" not in said, "slow, and yet the same text"
    assert said.endswith("NOT shown")


def test_a_planted_wrong_token_breaks_the_guarantee(model, monkeypatch, at_rest):
    honest = Conversation.stream

    def spoiled(self, ids, *, num_draft_tokens, **options):
        from dataclasses import replace

        for i, chunk in enumerate(honest(self, ids, num_draft_tokens=num_draft_tokens, **options)):
            if num_draft_tokens and i == 2:
                chunk = replace(chunk, tokens=((chunk.tokens[0] + 1) % 500 or 1, *chunk.tokens[1:]))
            yield chunk

    monkeypatch.setattr(Conversation, "stream", spoiled)
    done = run_main("bench", model, *QUICK, *TWICE, "--arms", "plain,auto", "--guarantee")
    assert done.returncode == 1
    said = " ".join(done.stderr.decode().split())
    assert "auto text: OTHER TEXT: 1 of 1 texts part" in said
    assert "NOT explained by rounding" in said
    assert "OTHER" in done.stdout.decode()


def test_a_run_that_keeps_its_word_exits_with_zero(tmp_path):
    path = tmp_path / "run.json"
    steady = [1.0, 1.001, 0.999, 1.002, 1.0, 0.998]
    write_document(
        path, made_document({"plain": steady, "mlx-lm": steady, "auto": [0.8 * s for s in steady]})
    )
    done = run_main("bench", "--resume", path, "--guarantee")
    assert done.returncode == 0
    assert done.stderr.decode().endswith("never slower, and the same text: it holds\n")


def test_two_benches_at_once_are_refused(model):
    with alone():
        done = run_main("bench", model, *QUICK)
    assert done.returncode == 3
    assert "another bench runs" in one_line(done.stderr)


def test_a_full_disk_is_one_line_and_the_figures_are_shown(model, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    done = run_main("bench", model, *QUICK, *TWICE, "--arms", "plain,k=1")
    assert done.returncode == 0
    troubles = [line for line in done.stderr.decode().splitlines() if "No space left" in line]
    assert len(troubles) == 1 and "free some disk space" in troubles[0]
    assert "\n  k=1 " in done.stdout.decode()


def test_output_that_cannot_be_written_is_shown_instead(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_document(path, made_document({"plain": [1.0, 1.0], "auto": [1.0, 1.0]}))

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    done = run_main("bench", "--resume", path, "--format", "csv", "-o", tmp_path / "out.csv")
    assert done.returncode == 3
    assert "free some disk space" in one_line(done.stderr)
    assert done.stdout.startswith(b"schema,workload")
    assert read_document(path)["complete"]


def test_a_model_that_does_not_fit_is_refused_in_a_line(model, monkeypatch):
    monkeypatch.setattr("mlx_mtp.pair.free_bytes", lambda: 1000)
    done = run_main("bench", model, *QUICK)
    assert done.returncode == 4
    assert "close other programs" in one_line(done.stderr)


def test_mlx_lms_copy_that_does_not_fit_is_refused_where_it_was_asked_for(model, monkeypatch):
    monkeypatch.setattr("mlx_mtp.machine.footprint_bytes", lambda: 1 << 60)
    asked = run_main("bench", model, *QUICK, *TWICE, "--arms", "plain,mlx-lm,k=1")
    assert asked.returncode == 4
    assert "mlx-lm's copy" in one_line(asked.stderr)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--workload", "haiku"), "a workload is one of code, prose"),
        (("--workload", "chat,chat"), "named once"),
        (("--workload", ""), "at least one"),
        (("--sampling", "hot"), "greedy, default"),
        (("--context", "-1"), "whole numbers"),
        (("--context", "99999999"), "context takes"),
        (("--batch", "0"), "1 .. 64"),
        (("--batch", "many"), "whole numbers"),
        (("--arms", "k=2"), "name plain"),
        (("--arms", "plain,k=99"), "k=1 .. k=15"),
        (("--repeats", "1"), "2 .. 1000"),
        (("--repeats", "9-3"), "9 .. 1000"),
        (("--repeats", "5-x"), "whole numbers"),
        (("--prompts", "9"), "1 .. 8"),
        (("--tokens", "1"), "2 .. "),
        (("--format", "xml"), "md, csv, json, jsonl"),
        (("--force",), "belongs to --compare"),
        (("-o", "/no/such/folder/x.json"), "folder that exists"),
        (("-o", "/"), "folder that exists"),
        (("--plot", "x.pdf"), ".svg or .png"),
        (("--drafter", "none", "--arms", "plain,k=1"), "there is no drafter"),
        (("--compare", "a.json", "b.json"), "leave out MODEL"),
        (("--resume", "a.json", "--tokens", "9"), "leave out --tokens"),
    ],
)
def test_wrong_usage_is_refused_in_a_line(model, words, said):
    done = run_main("bench", model, *words)
    assert done.returncode == 2, done.stderr
    assert said in one_line(done.stderr)
    assert not done.stdout


def test_without_a_model_the_last_one_is_measured_or_one_is_asked_for(model):
    done = run_main("bench", *QUICK)
    assert done.returncode == 2
    assert "mlx-mtp bench demo" in one_line(done.stderr)


def test_without_a_drafter_plain_decoding_is_measured(model):
    done = run_main("bench", model, *QUICK, *TWICE, "--drafter", "none", "--format", "jsonl")
    assert done.returncode == 0, done.stderr
    head, *records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["arm"] for record in records] == ["plain", "mlx-lm"]
    assert head["fingerprint"]["drafter"] is None


def test_progress_keeps_to_one_line_and_tells_the_time_left(monkeypatch, capsys):
    monkeypatch.setattr("mlx_mtp.cli.bench_progress.is_smart", lambda stream: True)
    monkeypatch.setattr(BenchProgress, "_columns", lambda self: 60)
    now = iter(range(0, 1000, 10))
    case = Case("agent_loop", "default", 16_384, 8)
    with BenchProgress(clock=lambda: next(now)) as progress:
        for turn in range(6):
            progress(Step(case, 3, 9, turn, 5, "mlx-lm", 0.1 * turn))
        progress.note("not kept: no space")
    painted = capsys.readouterr().err.split("\r")
    assert all(columns_of(part.split("\n")[0]) <= 60 for part in painted)
    assert "bench  20 %, 80 s left  3/9 ag" in " ".join(painted)
    assert painted[-1].endswith("not kept: no space\n") and painted[-2].strip() == ""
