"""From a model that is on the disk to its first token: reading and prefill, nothing else.

No calibration, self-test, drafting or compiled round comes before; no socket is opened and no package loaded that only
downloads or conversion need.
"""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from cli_runs import environment, run_main, write_chat_pair
from mlx_mtp import exactness, load
from mlx_mtp import pair as pair_module
from mlx_mtp import prefill as prefill_module
from mlx_mtp.cli.terminal import ReplyWriter
from mlx_mtp.conversation import Conversation
from mlx_mtp.round import Rounds

TO_FIRST_TOKEN = """
import collections, json, sys
opened, sockets = collections.Counter(), []
def note(event, values):
    if event == "open" and isinstance(values[0], str):
        opened[values[0]] += 1
    elif event in ("socket.connect", "socket.getaddrinfo", "socket.bind", "subprocess.Popen", "os.system"):
        sockets.append(event)
sys.addaudithook(note)
import mlx_mtp
pair = mlx_mtp.load(sys.argv[1])
chunks = mlx_mtp.stream_generate(pair, [{"role": "user", "content": "Hi"}], max_tokens=8)
first = next(chunks)
assert len(first.tokens) == 1 and first.stats.rounds == 0
print(json.dumps({"opened": opened, "sockets": sockets, "modules": sorted(sys.modules)}))
"""
NOT_NEEDED = (
    "huggingface_hub",
    "mlx_lm",
    "transformers",
    "torch",
    "typer",
    "rich",
    "prompt_toolkit",
    "httpx",
)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return write_chat_pair(tmp_path)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens from now on, in order: prefill passes, rounds, drafting, compiling, self-tests, text shown."""
    happened: list[str] = []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **options: Any) -> Any:
            happened.append(name)
            return function(*args, **options)

        return wrapper

    monkeypatch.setattr(prefill_module, "_chunk", noted("prefill", prefill_module._chunk))
    monkeypatch.setattr(Rounds, "played", noted("round", Rounds.played))
    monkeypatch.setattr(Rounds, "first_drafts", noted("drafts", Rounds.first_drafts))
    monkeypatch.setattr(mx, "compile", noted("compile", mx.compile))
    for module in (exactness, pair_module):
        monkeypatch.setattr(module, "exactness_of", noted("self-test", module.exactness_of))
    monkeypatch.setattr(ReplyWriter, "write", noted("shown", ReplyWriter.write))
    return happened


def test_a_first_token_takes_its_prefill_alone(target: Path, events: list[str]) -> None:
    pair = load(target)
    assert events == []
    chunks = Conversation(pair, chunk=32).stream([5] * 100, max_tokens=8)
    first = next(chunks)
    assert events == ["prefill"] * 4 and len(first.tokens) == 1
    next(chunks)
    assert set(events[4:]) == {"drafts", "compile", "round"}  # so these are noted


@pytest.mark.parametrize("words", [("generate", "TARGET", "Hi"), ("chat", "TARGET")])
def test_no_self_test_before_the_first_reply(target: Path, events: list[str], words: tuple[str, ...]) -> None:
    given = [str(target) if word == "TARGET" else word for word in words]
    run = run_main(*given, "--seed", "1", "--max-tokens", "12", stdin=b"Hi\n" if words[0] == "chat" else b"")
    assert run.returncode == 0, run.stderr
    first = events.index("shown")
    assert (
        events[:first] == ["prefill"] * 2
    )  # up to the model's turn, where the rings are kept, and from there
    assert "round" in events[first:] and "self-test" not in events


def test_what_is_opened_before_the_first_token(target: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", TO_FIRST_TOKEN, target],
        capture_output=True,
        env=environment(PYTHONPATH=":".join(path for path in sys.path if path)),
        timeout=300,
    )
    assert run.returncode == 0 and run.stderr == b"", run.stderr.decode()
    found = json.loads(run.stdout)
    assert found["sockets"] == []
    assert not {module for module in found["modules"] if module.split(".")[0] in NOT_NEEDED}
    names = Counter({path: n for path, n in found["opened"].items() if path.startswith(str(target.parent))})
    assert {Path(path).name for path in names} <= {
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors",
    }
    small = {path: n for path, n in names.items() if not path.endswith(".safetensors")}
    assert small and max(small.values()) <= 6
