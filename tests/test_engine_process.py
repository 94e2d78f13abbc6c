"""What an engine leaves of the process it lives in: nothing printed, nothing changed, a clean end."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engines import engine_on, ids_of, sampled
from mlx_mtp.machine import footprint_bytes

WITHIN_S = 120.0

CHANGES_NOTHING = """
import os, resource, signal, sys, threading
import mlx.core as mx

def all_of_it():
    signals = {number: signal.getsignal(number) for number in signal.valid_signals()}
    limits = {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT")}
    cache = mx.set_cache_limit(1 << 20)
    mx.set_cache_limit(cache)
    files = sorted(os.listdir("/proc/self/fd")) if sys.platform == "linux" else []
    mlx = mx.get_memory_limit(), cache, mx.default_device()
    return dict(os.environ), signals, limits, files, mlx, threading.excepthook, sys.excepthook

before = all_of_it()
from mlx_mtp import Engine, Sampling
with Engine("demo") as engine:
    chat = engine.conversation("You are terse.")
    assert chat.say("What is MLX?", max_tokens=8).result(60).text
    assert len([engine.submit("def f", max_tokens=4) for _ in range(3)][2].result(60).tokens) == 4
    try:
        engine.submit("")
    except Exception:
        pass
    engine.submit("class A", max_tokens=3000).cancel()
    inside = all_of_it()
assert threading.active_count() == 1, threading.enumerate()
assert before == inside == all_of_it()
"""

EXITS = {
    "while a reply is generated": """
handle = engine.submit("def f", max_tokens=3000)
kept = iter(handle)
next(kept)
""",
    "while nobody reads": """
handle = engine.submit("def f", max_tokens=3000, on_event=lambda event: None)
engine.submit("class A", max_tokens=3000)
handle2 = engine.submit("import os", max_tokens=3000)
next(iter_kept := iter(handle2))
""",
    "in a prefill": """
handle = engine.submit("def f(x): return x\\n" * 900, max_tokens=5)
next(handle.events())
""",
    "idle, without close": "engine.submit('def f', max_tokens=4).result(60)\n",
    "after close": "engine.submit('def f', max_tokens=4).result(60); engine.close()\n",
    "with two engines": """
other = Engine("demo")
handles = [one.submit("def f", max_tokens=3000) for one in (engine, other)]
kept = [iter(handle) for handle in handles]
[next(chunks) for chunks in kept]
""",
    "in asyncio": """
import asyncio
async def main():
    handle = engine.submit("def f", max_tokens=3000)
    async for chunk in handle:
        return handle
handle = asyncio.run(main())
""",
}


def run(code: str) -> None:
    """`code` in a process of its own, which has to say nothing and end well."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WITHIN_S)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_nothing_is_printed_and_nothing_of_the_process_is_changed():
    run(CHANGES_NOTHING)


@pytest.mark.parametrize("when", EXITS)
def test_the_interpreter_exits(when):
    """Streams of a thread that ended without clearing them abort about every second process."""
    began = time.monotonic()
    run("from mlx_mtp import Engine\nengine = Engine('demo')\n" + EXITS[when])
    assert time.monotonic() - began < 60


def test_nothing_is_printed_where_a_request_fails(capfd, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("broken")

    with engine_on() as engine:
        engine.submit(ids_of(), max_tokens=4).result(WITHIN_S)
        monkeypatch.setattr("mlx_mtp.batch_slots.decode", broken)
        with pytest.raises(Exception, match="broken"):
            engine.submit(ids_of(), max_tokens=4).result(WITHIN_S)
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
def test_a_forked_child_is_told():
    run(
        """
import os, warnings
warnings.simplefilter("ignore")
from mlx_mtp import Engine, EngineError
engine = Engine("demo")
child = os.fork()
if child == 0:
    code = 1
    try:
        engine.submit("def f")
    except EngineError as error:
        code = 0 if "fork" in str(error) and engine.status.status == "failed" else 2
    os._exit(code)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert engine.submit("def f", max_tokens=3).result(60).tokens
"""
    )


def soak(turns: int, *, every: int) -> list[int]:
    """Footprints while a conversation of `turns` turns goes on and starts again, replies are cancelled and fail."""
    footprints = []
    with engine_on(max_context=512, max_batch=2, prefix_budget=2**20) as engine:
        ids = ids_of(count=30)
        for turn in range(turns):
            request = {
                "max_tokens": 8,
                "sampling": sampled(turn),
                "num_draft_tokens": (0, 2, "auto")[turn % 3],
            }
            handle = engine.submit(ids, **request)
            if turn % 10 == 3:
                handle.cancel()
            if turn % 10 == 6:
                for _ in handle:
                    break
            out = handle.result(WITHIN_S)
            ids = [*ids, *out.tokens, *ids_of(start=turn % 40, count=6)]
            if len(ids) > 400:
                ids = ids_of(start=turn % 50, count=30)
            if turn % every == every - 1:
                footprints.append(footprint_bytes())
    return footprints


def slope(footprints: list[int]) -> float:
    """Bytes per sample, by least squares over the later two thirds."""
    late = footprints[len(footprints) // 3 :]
    middle = (len(late) - 1) / 2
    spread = sum((i - middle) ** 2 for i in range(len(late)))
    return sum((i - middle) * size for i, size in enumerate(late)) / spread


def test_a_short_soak():
    footprints = soak(60, every=5)
    assert max(footprints[-3:]) - min(footprints[4:7]) < 8 * 2**20, footprints


@pytest.mark.slow
def test_a_soak_of_a_thousand_turns(capsys):
    footprints = soak(1000, every=10)
    growth = slope(footprints) / 10
    with capsys.disabled():
        first, last = footprints[33] / 2**20, footprints[-1] / 2**20
        print(f"\nfootprint {first:.1f} to {last:.1f} MiB, {growth:.0f} bytes a turn")
    assert growth < 1024, footprints


def test_the_examples_in_the_documentation_run():
    text = (Path(__file__).parent.parent / "docs" / "embedding.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(examples) == 2
    for code in examples:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WITHIN_S)
        assert (done.returncode, done.stderr) == (0, "")
    assert "problem" in examples[1] and done.stdout == "", "nothing is wrong here"
