"""What README and docs tell people to type: every command is understood, those on the demo pair run, Python too."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from cli_runs import run_main
from mlx_mtp.cli import app

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("**/README.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(?:#[^)]*)?\)")
LONG = ("chat", "bench", "serve", "race")  # wait for a person, or have tests of their own


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, text) of all fenced blocks of a language."""
    found = []
    for page in PAGES:
        for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")):
            if kind == language:
                found.append((str(page.relative_to(ROOT)), text))
    return found


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every line that calls the program, what is piped into it left away."""
    found = []
    for page, text in blocks("sh"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "|" in words and "mlx-mtp" in words:
                words = words[words.index("mlx-mtp") :]
            if words and words[0] == "mlx-mtp":
                cut = next(
                    (i for i, word in enumerate(words) if word in ("|", ">", "2>", "&", "&&")), len(words)
                )
                found.append((page, words[1:cut]))
    return found


def _label(value: str | list[str]) -> str:
    return value if isinstance(value, str) else " ".join(value)[:60]


def test_pages_hold_commands():
    assert len(commands()) >= 25 and len(blocks("python")) >= 2


@pytest.mark.parametrize(("page", "words"), commands(), ids=_label)
def test_every_command_is_understood(page, words):
    """Parsed as the program would: names of commands and options exist, numbers are numbers."""
    group = typer.main.get_command(app)
    name, command, rest = group.resolve_command(
        group.make_context("mlx-mtp", list(words), resilient_parsing=True), words
    )
    while hasattr(command, "commands"):
        name, command, rest = command.resolve_command(
            command.make_context(name, list(rest), resilient_parsing=True), rest
        )
    command.make_context(name, list(rest))


RUN = [
    (page, words)
    for page, words in commands()
    if "demo" in words and words[0] not in LONG and not any(word.endswith(".jsonl") for word in words)
    if words[0] != "prove" or "--tokens" in words  # the whole takes minutes
]


@pytest.mark.parametrize(("page", "words"), RUN, ids=_label)
def test_commands_on_the_demo_pair_run(page, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if words[0] == "generate":
        words = [*words, "--max-tokens", "24"]
    done = run_main(*words)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout


@pytest.mark.parametrize(("page", "text"), blocks("python"), ids=lambda value: value[:30])
def test_python_in_the_docs_runs(page, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if '"demo"' not in text:
        compile(text, page, "exec")
        return
    exec(compile(text, page, "exec"), {"__name__": "docs"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    missing = [
        link for link in LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()
    ]
    assert missing == []
