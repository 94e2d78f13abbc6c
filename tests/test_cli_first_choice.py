"""`chat` without a model, and downloads that are asked for: dialogues on a terminal, at simulated machines."""

import shutil
import sys
from pathlib import Path
from unittest import mock

import pexpect
import pytest

from cli_runs import environment, one_line, run_main, write_chat_pair
from hub_stand_in import HubStandIn
from mlx_mtp.aliases import ALIASES, find_alias
from mlx_mtp.cli.sizes import columns_of
from mlx_mtp.machine import read_machine
from mlx_mtp.store import last_model

HERE = Path(__file__).parent
MACHINES = HERE / "machines"
WEIGHTS = "model.safetensors"
PATIENCE_S = 60
READY = "/help lists the commands"
QUESTION = r"\[y/N\] "


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    return write_chat_pair(tmp_path_factory.mktemp("published")).parent


@pytest.fixture
def hub(published):
    """The tiny pair stands for every alias's target and drafter."""
    repos = {}
    for alias in ALIASES:
        repos[alias.target], repos[alias.drafter] = published / "target", published / "drafter"
    with HubStandIn(repos) as hub:
        yield hub


class Terminal(pexpect.spawn):
    """A command on a pseudo-terminal, on a described machine, with a home and a cache below `home`."""

    def __init__(self, hub, home, *words, machine="m1_16", term="xterm", columns=80, **variables):
        path = ":".join(path for path in (str(HERE.parent), str(HERE), *sys.path) if path)
        own = {**hub.variables(home), "HOME": str(home), "NO_COLOR": "1", "PYTHONPATH": path, **variables}
        super().__init__(
            sys.executable,
            [str(HERE / "simulated_machine.py"), str(MACHINES / f"{machine}.json"), *words],
            env=environment(TERM=term, **own),
            encoding="utf-8",
            timeout=PATIENCE_S,
            dimensions=(40, columns),
        )

    def left_with(self) -> int | None:
        self.expect(pexpect.EOF)
        self.close()
        return self.exitstatus


@pytest.mark.parametrize(
    ("machine", "model", "smaller"),
    [
        ("m1_16", "e4b:4bit", "e2b:4bit"),
        ("m2_max_32", "26b:4bit", "12b:4bit"),
        ("m4_max_128", "31b:8bit", "26b:4bit"),
    ],
)
def test_the_model_for_this_machine_is_offered_and_a_no_downloads_nothing(
    hub, tmp_path, machine, model, smaller
):
    chat = Terminal(hub, tmp_path, "chat", machine=machine)
    chat.expect(QUESTION)
    shown = chat.before
    assert f"{model}." in shown
    for part in (find_alias(model).target, find_alias(model).drafter, "to download", "free on the disk"):
        assert part in shown
    assert "models may take" in " ".join(shown.split())
    assert "mlx-mtp chat demo" in shown
    assert all(len(line) < 80 for line in shown.split("\r\n"))
    chat.send("n\r")
    chat.expect("Nothing was downloaded")
    assert chat.left_with() == 2
    assert f"mlx-mtp chat {smaller}" in chat.before
    assert hub.downloads() == []
    assert not (tmp_path / "hub").exists()


def test_a_yes_downloads_and_the_next_chat_opens_it_again_without_the_hub(hub, tmp_path):
    chat = Terminal(hub, tmp_path, "chat", "--max-tokens", "4", term="dumb")
    chat.expect(QUESTION)
    chat.send("maybe\r")
    chat.expect("Please type y or n. ")
    chat.expect(QUESTION)
    chat.send("YES\r")
    chat.expect(r"downloaded 1\.\d MB in")
    chat.expect_exact(READY)
    chat.expect("> ")
    chat.sendline("Hi")
    chat.expect(r"\d tok")
    chat.expect("> ")
    chat.sendline("/exit")
    assert chat.left_with() == 0
    requests = len(hub.requests)
    hub.faults.web_pages.add("api")
    again = Terminal(hub, tmp_path, "chat", HF_HUB_OFFLINE="1")
    again.expect_exact("e4b:4bit, as last time.")
    again.expect_exact(READY)
    again.expect(">")
    again.sendeof()
    assert again.left_with() == 0
    assert len(hub.requests) == requests


def test_ctrl_c_in_a_download_says_that_it_goes_on_and_so_it_does(hub, tmp_path):
    (files,) = hub.repos[find_alias("e4b").target].commits.values()
    size = len(files[WEIGHTS].content)
    hub.faults.bytes_per_second = 400_000
    pull = Terminal(hub, tmp_path, "models", "pull", "e4b")
    pull.expect(r"[3-9]\d %")
    pull.sendintr()
    pull.expect_exact("what has arrived is kept")
    assert pull.left_with() == 130
    hub.faults.bytes_per_second = None
    hub.requests.clear()
    again = Terminal(hub, tmp_path, "models", "pull", "e4b")
    again.expect(r"to go\r\n")
    assert again.left_with() == 0
    (weights,) = [request for request in hub.downloads(WEIGHTS) if request.range][:1]
    assert size // 5 < int(weights.range.removeprefix("bytes=").partition("-")[0]) < size


def test_a_closed_input_is_a_no(hub, tmp_path):
    chat = Terminal(hub, tmp_path, "chat", "12b", machine="m2_max_32")
    chat.expect(QUESTION)
    chat.sendeof()
    chat.expect("Nothing was downloaded")
    assert chat.left_with() == 2
    assert hub.downloads() == []


def test_ctrl_c_at_the_question_leaves_with_130(hub, tmp_path):
    chat = Terminal(hub, tmp_path, "chat")
    chat.expect(QUESTION)
    chat.sendintr()
    assert chat.left_with() == 130


def test_unquantised_weights_are_named_as_such_before_the_question(hub, tmp_path):
    chat = Terminal(hub, tmp_path, "generate", "google/gemma-4-12B-it", "Hi", machine="m4_max_128")
    hub.push("google/gemma-4-12B-it", {"config.json": b"{}", WEIGHTS: b"0" * 100})
    hub.push("google/gemma-4-12B-it-assistant", {"config.json": b"{}", WEIGHTS: b"0" * 100})
    chat.expect(QUESTION)
    assert "12b:4bit is the same model in 4 bits" in " ".join(chat.before.split())
    chat.send("\r")
    assert chat.left_with() == 2


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_at_20_columns_no_line_of_ours_wraps(hub, tmp_path, term):
    hub.faults.bytes_per_second = 800_000
    chat = Terminal(hub, tmp_path, "chat", "--max-tokens", "4", columns=20, term=term)
    chat.expect(QUESTION)
    question = chat.before + chat.after
    chat.send("y\r")
    chat.expect(r"lists\s+the\s+commands")
    progress = chat.before
    for row in (question + progress).replace("\r\n", "\n").split("\n"):
        for painted in row.split("\r"):
            words_fit = columns_of(painted.rstrip()) < 20
            assert words_fit or " " not in painted.strip(), repr(painted)
    assert "\x1b" not in progress
    chat.expect(">")
    chat.sendeof()
    assert chat.left_with() == 0


def run_on(machine: str, hub: HubStandIn, home: Path, *words: str, stdin: bytes = b""):
    """The same without a terminal."""
    described = read_machine(MACHINES / f"{machine}.json")
    with hub.in_process(home), mock.patch("mlx_mtp.machine.this_machine", lambda: described):
        return run_main(*words, stdin=stdin, HOME=str(home))


@pytest.mark.parametrize(("machine", "model"), [("m1_16", "e4b:4bit"), ("m2_max_32", "26b:4bit")])
def test_without_a_terminal_one_line_says_what_to_type(hub, tmp_path, machine, model):
    done = run_on(machine, hub, tmp_path, "chat")
    assert done.returncode == 2
    refusal = one_line(done.stderr)
    assert f"mlx-mtp models pull {model}" in refusal
    assert f"mlx-mtp chat {model}" in refusal
    assert "mlx-mtp chat demo" in refusal
    assert hub.requests == []


def test_a_recommended_model_that_is_here_is_opened_without_a_question(hub, tmp_path):
    assert run_on("m1_16", hub, tmp_path, "models", "pull", "e4b").returncode == 0
    done = run_on("m1_16", hub, tmp_path, "chat", stdin=b"/exit\n")
    assert done.returncode == 0
    assert "e4b:4bit suits this machine" in done.stderr.decode()


def test_a_machine_that_cannot_run_models_is_not_offered_any(hub, tmp_path):
    done = run_on("macos_vm", hub, tmp_path, "chat")
    assert done.returncode == 3
    assert "Metal" in one_line(done.stderr)


def remembered(home: Path) -> str | None:
    with mock.patch.dict("os.environ", environment(HOME=str(home)), clear=True):
        return last_model().value


def test_what_is_remembered_is_what_the_name_alone_opens(hub, tmp_path, published):
    run_on("m1_16", hub, tmp_path, "chat", "demo", stdin=b"/exit\n")
    assert remembered(tmp_path) is None
    target = str(published / "target")
    run_on("m1_16", hub, tmp_path, "chat", target, "--drafter", "none", stdin=b"/exit\n")
    assert remembered(tmp_path) is None
    run_on("m1_16", hub, tmp_path, "generate", target, "Hi", "--max-tokens", "2")
    assert remembered(tmp_path) is None
    run_on("m1_16", hub, tmp_path, "chat", target, stdin=b"/exit\n")
    assert remembered(tmp_path) == target


def test_a_model_that_is_gone_is_not_opened_again(hub, tmp_path, published):
    folder = tmp_path / "model"
    shutil.copytree(published, folder)
    run_on("m1_16", hub, tmp_path, "chat", str(folder / "target"), stdin=b"/exit\n")
    shutil.rmtree(folder)
    done = run_on("m1_16", hub, tmp_path, "chat")
    assert done.returncode == 2
    said = done.stderr.decode().splitlines()
    assert "is not on this disk any more" in said[0]
    assert "models pull e4b:4bit" in said[1]


def test_a_model_that_was_removed_is_not_opened_again(hub, tmp_path):
    run_on("m1_16", hub, tmp_path, "chat", "e2b", "--yes", stdin=b"/exit\n")
    assert remembered(tmp_path) == "e2b"
    run_on("m1_16", hub, tmp_path, "models", "rm", "e2b", "--yes")
    done = run_on("m1_16", hub, tmp_path, "chat")
    assert done.returncode == 2
    assert "e2b was used last and is not on this disk any more" in done.stderr.decode()


def test_a_damaged_memory_of_the_last_model_is_set_aside(hub, tmp_path, published):
    run_on("m1_16", hub, tmp_path, "chat", str(published / "target"), stdin=b"/exit\n")
    (record,) = tmp_path.rglob("last-model.json")
    record.write_bytes(b"{")
    done = run_on("m1_16", hub, tmp_path, "chat")
    assert done.returncode == 2
    assert "warning: " in done.stderr.decode()
    assert record.with_name("last-model.json.corrupt").is_file()
