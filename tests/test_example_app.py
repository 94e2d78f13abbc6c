"""The logic of examples/macos_app, with a window and a main thread of its own; AppKit itself is on Macs only."""

import functools
import shutil
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fake_window import APP, App, Turn
from mlx_mtp import Engine, Progress, Sampling, generate, load
from mlx_mtp.engine_chat import EngineConversation
from mlx_mtp.hub import demo_folder
from mlx_mtp.machine import read_machine
from mlx_mtp.self_check import Checked, SelfCheck
from servers import demo_pair, no_ends

QUESTION = "What is MLX?"
MAC_16 = read_machine(Path(__file__).parent / "machines" / "m2_16.json")


@contextmanager
def running(**options):
    app = App(**options)
    try:
        yield app
    finally:
        if app.model.phase != "closing":
            app.quit()


@pytest.fixture(autouse=True)
def on_an_empty_mac(monkeypatch):
    """The picker sees a Mac with 16 GB on which nothing was downloaded, whatever the tests run on."""
    monkeypatch.setattr("mlx_mtp.machine.this_machine", lambda: MAC_16)
    monkeypatch.setattr("mlx_mtp.cache.cached_snapshot", lambda *names, **options: None)


@pytest.fixture
def greedy(monkeypatch):
    """Replies that are known: greedy ones, from `generate`."""
    say = EngineConversation._reply

    def greedily(self, messages, options):
        return say(self, messages, {"sampling": Sampling(temperature=0.0), **options})

    monkeypatch.setattr(EngineConversation, "_reply", greedily)


@pytest.fixture
def endless(monkeypatch):
    """Replies that go on until they are stopped."""
    say = EngineConversation._reply
    sampling = Sampling(temperature=0.0, logit_bias={int(id): bias for id, bias in no_ends().items()})

    def endlessly(self, messages, options):
        return say(self, messages, {"sampling": sampling, **options})

    monkeypatch.setattr(EngineConversation, "_reply", endlessly)


@functools.cache
def expected(*said: str) -> str:
    """The answer to the last of these, each of the others answered too."""
    messages = [{"role": "user", "content": said[-1]}]
    for at in range(len(said) - 1, 0, -1):
        before = said[:at]
        messages[:0] = [
            {"role": "user", "content": before[-1]},
            {"role": "assistant", "content": expected(*before)},
        ]
    return generate(demo_pair(), messages, sampling=Sampling(temperature=0.0)).text


def test_a_chat_from_start_to_quit(greedy, monkeypatch):
    """Streams, says what MTP does, answers again, edits; nothing slow on the main thread."""
    slow: list[str] = []
    for kind, names in (
        (Engine, ("__init__", "close", "wait_ready")),
        (EngineConversation, ("say", "edit", "regenerate")),
    ):
        for name in names:
            watch(monkeypatch, kind, name, slow)
    with running() as app:
        app.start()
        assert app.view.rows[app.view.selected].key == "demo" and app.view.status.endswith("is ready.")
        app.chat.send(QUESTION)
        assert app.view.can.stop and not app.view.can.send and not app.view.can.regenerate
        app.until_idle()
        assert app.view.turns == [Turn("user", QUESTION), Turn("assistant", expected(QUESTION))]
        assert "tokens a round" in app.view.status and "% of drafts accepted" in app.view.status
        assert "context" in app.view.status
        app.chat.regenerate()
        app.until_idle()
        assert app.view.turns == [Turn("user", QUESTION), Turn("assistant", expected(QUESTION))]
        app.chat.edit_last()
        assert app.view.input == QUESTION
        app.chat.send("What is a drafter?")
        assert app.view.input == ""
        app.until_idle()
        assert app.view.turns == [
            Turn("user", "What is a drafter?"),
            Turn("assistant", expected("What is a drafter?")),
        ]
        app.chat.send(QUESTION)
        app.until_idle()
        assert app.answer == expected("What is a drafter?", QUESTION) and len(app.view.turns) == 4
        kept = app.chat._conversation.messages
        assert [Turn(message["role"], message["content"]) for message in kept] == app.view.turns
        app.model.new_chat()
        assert app.view.turns == [] and not app.view.can.regenerate
        assert app.remembered.last_model == "demo" and app.view.problems == []
    assert set(slow) == {"other"}, "the main thread has waited"


def watch(monkeypatch, kind, name, slow):
    """Keep on which thread a method was called."""
    method = getattr(kind, name)

    def watched(self, *args, **options):
        slow.append("main" if threading.current_thread() is threading.main_thread() else "other")
        return method(self, *args, **options)

    monkeypatch.setattr(kind, name, watched)


def test_text_comes_at_most_thirty_times_a_second_and_stop_keeps_it(endless):
    with running() as app:
        app.start()
        app.chat.send("def f")
        app.main.until(lambda: len(app.view.added_at) >= 8)
        app.model.stop()
        app.until_idle()
        gaps = [b - a for a, b in zip(app.view.added_at[:-1], app.view.added_at[1:], strict=True)]
        # The last one comes with the end, which waits for nothing.
        assert min(gaps[:-1]) >= 1 / 30 - 0.002
        assert app.view.status.endswith("stopped")
        assert app.view.turns[-1].text == app.chat.turns[-1].text != ""
        assert app.view.can.regenerate and app.view.can.send


def test_a_message_that_got_no_answer_goes_back_into_the_input(monkeypatch):
    pair = load("demo")
    monkeypatch.setattr("mlx_mtp.engine.load", lambda name, **options: replace(pair, max_context=64))
    with running() as app:
        app.start()
        app.chat.send("word " * 100)
        app.until_idle()
        [problem] = app.view.problems
        assert problem.title == "The conversation is too long" and problem.remedy
        assert app.view.input.startswith("word ") and app.view.turns == []
        app.chat.send("x")
        app.chat.stop()  # before it was submitted, or just after: then it has a token, or goes back
        app.until_idle()
        assert app.view.turns == app.chat.turns and (app.view.input == "x" or len(app.view.turns) == 2)


def test_quitting_while_a_reply_is_written(endless):
    with running() as app:
        app.start()
        app.chat.send("def f")
        app.until_text()
        began = time.monotonic()
        app.quit()
        assert time.monotonic() - began < 8, "less than the seconds after which it quits in any case"
        assert not any(thread.name == "mlx-mtp engine" for thread in threading.enumerate())


def test_a_new_chat_while_a_reply_is_written(endless):
    with running() as app:
        app.start()
        app.chat.send("def f")
        app.until_text()
        left, reply = app.chat, app.chat._reply
        app.model.new_chat()
        assert app.view.turns == [] and app.view.can.send
        left._events.put((reply, Progress("prefill", "reading the prompt", 512, 4096)))  # that was under way
        app.chat.send("class A")
        app.until_text()
        assert app.view.turns[0] == Turn("user", "class A")
        assert not any("4,096" in (words or "") for words, _ in app.view.progress)


def test_a_model_that_does_not_fit_is_refused_with_the_remedy(monkeypatch):
    """By the library, on a Mac with 16 GB, before any socket is opened."""
    with running() as app:
        app.start()
        at = app.row("31b:bf16")
        assert app.view.rows[at].line.endswith("too much for this Mac")
        with monkeypatch.context() as on_a_mac:
            on_a_mac.setattr("mlx_mtp.pair.this_machine", lambda: MAC_16)
            app.model.choose(at)
            app.until_phase("idle")
        [problem] = app.view.problems
        assert problem.title == "Not enough memory" and "31b:bf16 needs" in problem.text
        assert problem.remedy == "Use e4b:4bit, which needs " + problem.remedy.rpartition("needs ")[2]
        app.model.choose(app.row("demo"))
        app.until_phase("ready")


def test_a_download_is_asked_for_shown_and_can_be_cancelled(monkeypatch):
    going = threading.Event()

    def slow_load(name, *, on_progress, **options):
        assert name == "e2b:4bit"
        for done in range(10_000):
            on_progress(Progress("download", "downloading model.safetensors", done * 10**6, 4 * 10**9))
            going.set()
            time.sleep(0.02)
        raise AssertionError("never cancelled")

    with running() as app:
        app.start()
        monkeypatch.setattr("mlx_mtp.engine.load", slow_load)
        monkeypatch.setattr("words.ProgressWords._speed", lambda self, done, total: 25e6)
        app.model.choose(app.row("e2b:4bit"))
        [(title, text, answer)] = app.view.questions
        assert title == "Download Gemma 4 E2B, 4-bit?" and "4.3 GB to download" in text
        answer(False)
        assert app.view.selected == app.row("demo") and app.model.phase == "ready"
        app.model.choose(app.row("e2b:4bit"))
        app.view.questions[-1][2](True)
        assert app.view.can.cancel_load and not app.view.can.choose
        app.main.until(lambda: app.view.progress[-1][1] is not None and going.is_set())
        text, share = app.view.progress[-1]
        assert (
            text.startswith("Downloading model.safetensors · 0.0")
            and "of 4.00 GB · 25.0 MB/s, 3 min left" in text
        )
        assert 0 <= share < 0.1
        app.model.stop()
        assert app.view.progress[-1][0] == "Cancelling…"
        app.until_phase("idle")
        assert app.view.problems == [] and app.view.status.startswith("Cancelled.")
        assert app.view.progress[-1] == (None, None) and app.remembered.last_model == "demo"


def test_a_model_inside_the_app_comes_first(tmp_path):
    folder = tmp_path / "models" / "Tiny"
    shutil.copytree(demo_folder() / "target", folder)
    shutil.copytree(demo_folder() / "drafter", folder / "assistant")
    with running(last=None, resources=tmp_path) as app:
        app.start()
        row = app.view.rows[0]
        assert (
            app.view.selected == 0
            and row.key == "bundled/Tiny"
            and row.title == "Tiny (in this app)"
            and row.is_here
        )
        assert app.remembered.last_model == "bundled/Tiny" and app.view.questions == []
        app.chat.send(QUESTION)
        app.until_text()
        app.until_idle()
        assert "of drafts accepted" in app.view.status, "its drafter was found too"


def test_what_selfcheck_finds_is_shown_and_nothing_more_is_tried():
    wrong = Checked(
        "Metal library", False, "mlx.metallib is not beside libmlx", "put the whole mlx package in"
    )
    with running(check=lambda: SelfCheck((wrong,))) as app:
        app.start("broken")
        [problem] = app.view.problems
        assert (
            "Metal library: mlx.metallib" in problem.text
            and problem.remedy == "Put the whole mlx package in."
        )
        assert app.view.rows == [] and not app.view.can.choose and not app.view.can.send
    slight = Checked("demo pair", False, "its files are missing", "put the whole mlx_mtp package in")
    with running(check=lambda: SelfCheck((slight,))) as app:
        app.start()
        assert len(app.view.problems) == 1 and app.view.can.send


def test_a_damaged_model_in_the_app_hides_no_other(tmp_path):
    (tmp_path / "models" / "Bad").mkdir(parents=True)
    (tmp_path / "models" / "Bad" / "config.json").write_text("{")
    with running(resources=tmp_path) as app:
        app.start()
        assert app.view.rows[0].line == "Bad (in this app) · on this Mac · cannot be read"
        app.model.choose(0)
        app.until_phase("idle")
        assert app.view.problems[0].title == "The model cannot be used"


def test_mistakes_of_the_app_itself_are_shown_and_it_goes_on(monkeypatch):
    with running(check=lambda: 1 / 0) as app:
        app.start("broken")
        assert "ZeroDivisionError" in app.view.problems[0].text and app.view.progress[-1] == (None, None)
    with running() as app:
        app.start()
        with monkeypatch.context() as broken:
            broken.setattr(EngineConversation, "say", lambda self, text: 1 / 0)
            app.chat.send("hello")
            app.until_idle()
        assert "ZeroDivisionError" in app.view.problems[0].text and app.view.input == "hello"
        app.chat.send(QUESTION)
        app.until_idle()
        assert app.view.turns[-1].text


def test_at_the_first_start_the_recommended_model_is_offered_not_downloaded():
    with running(last=None) as app:
        app.start("idle")
        assert app.view.rows[app.view.selected].key == "e4b:4bit" and app.view.questions == []
        assert app.view.can.choose and not app.view.can.send and app.view.status == "Choose a model."


def test_the_recipe_and_its_check(tmp_path, monkeypatch):
    """On folders like those of the wheels; README.md says what was seen with the wheels themselves."""
    monkeypatch.syspath_prepend(APP)
    import check_bundle
    import setup as recipe

    installed = tmp_path / "site" / "mlx"
    (installed / "lib").mkdir(parents=True)
    (installed / "core.cpython-312-darwin.so").touch()
    (installed / "lib" / "libmlx.dylib").touch()
    (installed / "lib" / "mlx.metallib").write_bytes(b"MTLB...")
    recipe.stage_mlx(installed, tmp_path / "staged")
    assert (tmp_path / "staged" / "mlx" / "__init__.py").is_file()
    packages = tmp_path / "MTP Chat.app" / "Contents" / "Resources" / "lib" / "python3.12"
    shutil.copytree(tmp_path / "staged", packages)
    for name in ("metal/a.metal", "demo/target/model.safetensors", "demo/drafter/model.safetensors"):
        path = packages / "mlx_mtp" / name
        path.parent.mkdir(parents=True)
        path.touch()
    app = tmp_path / "MTP Chat.app"
    assert check_bundle.problems_of(app) == []
    frameworks = app / "Contents" / "Frameworks"
    frameworks.mkdir()
    library = packages / "mlx" / "lib" / "libmlx.dylib"
    library.rename(frameworks / "libmlx.dylib")
    assert len(check_bundle.problems_of(app)) == 2, (
        "the Metal library is not beside it, and core does not find it"
    )
    shutil.copy(frameworks / "libmlx.dylib", library)
    assert "once" in check_bundle.problems_of(app)[0]
    with pytest.raises(SystemExit, match="from a wheel"):
        recipe.check_ours(tmp_path)
