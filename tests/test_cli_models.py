"""`mlx-mtp models` and models by name in other commands, without a terminal, against a hub on the loopback."""

import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from cli_runs import one_line, run_main, write_chat_pair
from hub_stand_in import HubStandIn
from mlx_mtp.aliases import find_alias
from mlx_mtp.cache import list_cached
from mlx_mtp.cli.layout import table, wrapped
from mlx_mtp.cli.model_list import cached_text
from mlx_mtp.cli.sizes import columns_of
from mlx_mtp.machine import read_machine
from mlx_mtp.published_configs import published_target

MACHINES = Path(__file__).parent / "machines"
DAY = 86_400.0


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    return write_chat_pair(tmp_path_factory.mktemp("published")).parent


class Mac:
    """Runs commands on a described machine, with its own cache and home and a hub of its own."""

    def __init__(self, hub: HubStandIn, home: Path):
        self.hub, self.home, self.machine = hub, home, "m1_16"

    def run(self, *words: str | Path, stdin: bytes = b""):
        described = read_machine(MACHINES / f"{self.machine}.json")
        with (
            self.hub.in_process(self.home),
            mock.patch("mlx_mtp.machine.this_machine", lambda: described),
            mock.patch("mlx_mtp.pair.this_machine", lambda: described),
        ):
            return run_main(*words, stdin=stdin, HOME=str(self.home))

    def cached(self) -> dict[str, str]:
        return {model.repo_id: model.kind for model in list_cached(cache_dir=self.home / "hub")}


@pytest.fixture
def mac(published, tmp_path):
    """A 16 GB Mac; the tiny pair stands for each alias's target and drafter."""
    repos = {}
    for name in ("e2b:4bit", "e4b:4bit", "e4b:8bit", "26b:4bit", "12b:bf16"):
        alias = find_alias(name)
        repos[alias.target] = published / "target"
        repos[alias.drafter] = published / "drafter"
    with HubStandIn(repos) as hub:
        yield Mac(hub, tmp_path)


def test_pull_shows_sizes_downloads_target_and_drafter_and_prints_the_folder(mac):
    alias = find_alias("e4b")
    done = mac.run("models", "pull", "e4b")
    assert done.returncode == 0
    assert mac.cached() == {alias.target: "target", alias.drafter: "drafter"}
    folder = Path(done.stdout.decode().removesuffix("\n"))
    assert (folder / "config.json").is_file()
    said = done.stderr.decode()
    assert said.index(alias.target) < said.index(alias.drafter) < said.index("downloaded")
    assert "free on the disk" in said
    assert b"\x1b" not in done.stdout + done.stderr
    before = len(mac.hub.requests)
    again = mac.run("models", "pull", "e4b")
    assert (again.returncode, again.stdout, again.stderr) == (0, done.stdout, b"")
    assert len(mac.hub.requests) == before


@pytest.mark.parametrize(
    "words", [("models", "pull", "26b"), ("generate", "26b", "Hi"), ("generate", "26b", "Hi", "--yes")]
)
def test_what_this_machine_can_never_hold_is_refused_before_a_request(mac, words):
    done = mac.run(*words)
    assert done.returncode == 4
    assert "use e4b:4bit" in one_line(done.stderr)
    assert mac.hub.requests == []


def test_a_hub_id_that_is_too_large_is_refused_once_its_configuration_is_there(mac):
    config = json.dumps(published_target("31b")).encode()
    mac.hub.push(
        "ann/tuned", {"config.json": config, "model.safetensors": b"x" * 1000, "tokenizer.json": b"{}"}
    )
    done = mac.run("models", "pull", "ann/tuned")
    assert done.returncode == 4
    assert "ann/tuned needs" in done.stderr.decode()
    assert not mac.hub.downloads("model.safetensors")


def test_unquantised_weights_are_downloaded_only_if_meant(mac):
    mac.machine = "m4_max_128"
    refused = mac.run("models", "pull", "12b:bf16")
    assert refused.returncode == 2
    said = refused.stderr.decode()
    assert "12b:4bit is the same model in 4 bits" in said
    assert "models pull 12b:bf16 --yes" in said
    assert not mac.hub.downloads()
    assert mac.run("models", "pull", "12b:bf16", "--yes").returncode == 0


@pytest.mark.parametrize(
    ("name", "why"), [("demo", "on this disk already"), ("./target", "on this disk already")]
)
def test_what_is_here_is_not_pulled(mac, published, monkeypatch, name, why):
    monkeypatch.chdir(published)
    done = mac.run("models", "pull", name)
    assert done.returncode == 2
    assert why in one_line(done.stderr)


def test_missing_and_gated_models_exit_with_5(mac):
    done = mac.run("models", "pull", "ann/nothing")
    assert done.returncode == 5
    one_line(done.stderr)
    target = find_alias("e4b").target
    mac.hub.repos[target].is_gated = True
    done = mac.run("models", "pull", "e4b")
    assert done.returncode == 5
    assert target in done.stderr.decode().splitlines()[-1]


def test_a_drafter_that_cannot_be_had_does_not_keep_the_target_away(mac):
    mac.hub.repos[find_alias("e4b").drafter].is_gated = True
    done = mac.run("models", "pull", "e4b")
    assert done.returncode == 0
    assert "warning: decoding will be plain" in done.stderr.decode()
    assert mac.run("models", "pull", "e4b", "--drafter", find_alias("e4b").drafter).returncode == 5


@pytest.mark.parametrize("command", [("generate", "e4b", "Hi"), ("prove", "e4b"), ("chat", "e4b")])
def test_without_a_terminal_nothing_is_downloaded_unasked(mac, command):
    done = mac.run(*command)
    assert done.returncode == 2
    refusal = one_line(done.stderr)
    assert "mlx-mtp models pull e4b" in refusal
    assert "about 6.8 GB" in refusal
    assert mac.hub.requests == []


def test_a_cached_target_without_its_drafter_says_so(mac):
    mac.run("models", "pull", "e4b", "--drafter", "none")
    assert list(mac.cached().values()) == ["target"]
    done = mac.run("generate", "e4b", "Hi", "--max-tokens", "2")
    assert done.returncode == 2
    assert "the drafter of e4b" in one_line(done.stderr)
    assert mac.run("generate", "e4b", "Hi", "--max-tokens", "2", "--drafter", "none").returncode == 0


def test_yes_downloads_and_answers_and_the_next_time_needs_no_hub(mac):
    done = mac.run("generate", "e4b", "Hi", "--max-tokens", "2", "--yes")
    assert done.returncode == 0
    assert "downloaded" in done.stderr.decode()
    mac.hub.faults.web_pages.add("api")
    before = len(mac.hub.requests)
    assert mac.run("generate", "e4b", "Hi", "--max-tokens", "2").returncode == 0
    assert len(mac.hub.requests) == before


@pytest.mark.parametrize(
    "words",
    [("--quantize", "3"), ("--drafter-bits", "5"), ("--context", "0"), ("--revision", "../x")],
)
def test_options_are_checked_before_anything_is_looked_up(mac, words):
    done = mac.run("generate", "e4b", "Hi", "--yes", *words)
    assert done.returncode == 2
    one_line(done.stderr)
    assert mac.hub.requests == []


def test_list_shows_what_is_here_and_what_fits(mac):
    empty = mac.run("models", "list")
    assert empty.returncode == 0
    assert empty.stderr == b""
    assert "No model is downloaded yet." in empty.stdout.decode()
    mac.run("models", "pull", "e4b")
    shown = mac.run("models", "list").stdout.decode()
    alias = find_alias("e4b")
    (row,) = (line for line in shown.splitlines() if line.endswith(alias.target))
    assert row.split()[0] == "e4b:4bit"
    assert "today" in row
    (row,) = (line for line in shown.splitlines() if line.startswith("26b:4bit"))
    assert row.split()[5] == "no"
    assert "models may take 8.0 GB of this machine's 16.0 GB" in shown


def test_list_as_json(mac):
    mac.run("models", "pull", "e4b")
    listed = json.loads(mac.run("models", "list", "--json").stdout)
    targets = [model for model in listed["cached"] if model["kind"] == "target"]
    assert [(model["alias"], model["repo_id"]) for model in targets] == [
        ("e4b:4bit", find_alias("e4b").target)
    ]
    assert all(len(model["commit"]) == 40 and model["bytes"] > 0 for model in listed["cached"])
    fits = {alias["name"]: alias["fits"] for alias in listed["aliases"]}
    assert fits["e4b:4bit"] and not fits["26b:4bit"]
    assert all(isinstance(alias["verified"], bool) and alias["source"] for alias in listed["aliases"])


def test_rm_asks_and_frees_the_drafter_too(mac):
    mac.run("models", "pull", "e4b")
    size = sum(model.bytes for model in list_cached(cache_dir=mac.home / "hub"))
    refused = mac.run("models", "rm", "e4b")
    assert refused.returncode == 2
    assert b"--yes" in refused.stderr
    assert len(mac.cached()) == 2
    done = mac.run("models", "rm", "e4b", "--yes")
    assert done.returncode == 0
    assert f"{size / 1e6:.1f} MB freed" in done.stdout.decode()
    assert mac.cached() == {}
    again = mac.run("models", "rm", "e4b", "--yes")
    assert again.returncode == 2
    assert "models list" in one_line(again.stderr)


def test_rm_keeps_a_drafter_that_another_model_uses(mac):
    four, eight = find_alias("e4b:4bit"), find_alias("e4b:8bit")
    assert four.drafter == eight.drafter
    mac.machine = "m2_max_32"
    mac.run("models", "pull", "e4b:4bit")
    mac.run("models", "pull", "e4b:8bit")
    done = mac.run("models", "rm", "e4b:4bit", "--yes")
    assert f"{four.drafter} stays: {eight.target} uses it" in done.stderr.decode()
    assert mac.cached() == {eight.target: "target", four.drafter: "drafter"}
    mac.run("models", "rm", "e4b:8bit", "--yes")
    assert mac.cached() == {}


def test_rm_takes_quantised_copies_with_it(mac):
    mac.run("models", "pull", "e4b")
    words = ("generate", "e4b", "Hi", "--max-tokens", "2", "--quantize", "4")
    assert mac.run(*words).returncode == 0
    (copies,) = mac.home.rglob("quantized")
    assert len([path for path in copies.iterdir() if path.is_dir()]) == 1
    done = mac.run("models", "rm", "e4b", "--yes")
    assert "its 4-bit copy" in done.stderr.decode()
    assert not [path for path in copies.iterdir() if path.is_dir()]


def test_unfinished_and_foreign_models_are_told_apart():
    def model(name, kind, is_complete=True, days=0.0):
        path = Path("/cache")
        return SimpleNamespace(
            repo_id=name,
            commit="c" * 40,
            bytes=15_600_000_000,
            path=path,
            kind=kind,
            last_used=1e9 - days * DAY,
            is_complete=is_complete,
        )

    cached = [
        model("mlx-community/gemma-4-26B-A4B-it-qat-4bit", "target", days=13),
        model("ann/tuned", "target", is_complete=False),
        model("mlx-community/gemma-4-26B-A4B-it-qat-assistant-4bit", "drafter", days=90),
        model("meta/other", "other"),
    ]
    shown = cached_text(cached, 1e9, 80)
    assert all(columns_of(line) <= 80 for line in shown.splitlines())
    assert "26b:4bit  15.6 GB  13 d ago  ccccccc  mlx-community/gemma-4-26B-A4B-it-qat-4bit" in shown
    assert "-         15.6 GB  partial" in shown
    assert "12 w ago" in shown
    assert "meta/other" not in shown
    assert "62.4 GB in" in shown
    assert "1 of other kinds" in " ".join(shown.split()), "wherever the path makes the line break"


def test_a_table_that_is_too_wide_is_stacked():
    header, rows = ("alias", "size", "model"), [("e2b", "4.3 GB", "org/name"), ("x\x1b[2J", "1 B", "b")]
    assert table(header, rows, None, title=2).splitlines()[1] == "e2b    4.3 GB  org/name"
    assert (
        table(header, rows, 20, title=2)
        == "org/name\n  alias e2b\n  size 4.3 GB\nb\n  alias x[2J\n  size 1 B"
    )


def test_sentences_break_between_words_and_names_stay_whole():
    name = "mlx-community/gemma-4-26B-A4B-it-qat-4bit"
    assert wrapped(f"  one two {name} three", 20) == f"  one two\n  {name}\n  three"
    assert wrapped("a b", None) == "a b"
