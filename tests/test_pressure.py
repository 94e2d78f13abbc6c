"""Short of memory in a reply: keeping less changes no text, stopping keeps its beginning, the next turn works."""

import functools
import gc
from dataclasses import replace

import mlx.core as mx
import pytest

import mlx_mtp
import mlx_mtp.conversation
import mlx_mtp.turns
from mlx_mtp.cli.generate import _print_as_it_comes
from mlx_mtp.cli.interrupts import Interrupts
from mlx_mtp.cli.options import ReplyOptions
from mlx_mtp.cli.session import Session
from mlx_mtp.cli.talk import Talk
from mlx_mtp.conversation import Conversation
from mlx_mtp.errors import MemoryRefusal
from mlx_mtp.pressure import LOOK_EVERY_S, PATIENCE_S, SHRINK_EVERY_S, STOPPED, Guard
from mlx_mtp.sampling import Sampling
from pairs import golden_pair
from scripted_guard import ScriptedGuard
from talks import MODEL_TURN, check_rows, golden_text, take, with_characters

pair_of = functools.cache(golden_pair)
SAMPLED = Sampling(temperature=1.0, seed=3)
LENGTH = 24


class Scene:
    """A machine whose memory, and a clock, are set by hand."""

    def __init__(self, *, level: str = "normal", footprint: int = 50, free: int = 1000, budget: int = 100):
        self.level, self.footprint, self.free, self.now, self.looks = level, footprint, free, 0.0, 0
        self.guard = Guard(
            level=self._look,  # type: ignore[arg-type]
            free=lambda: self.free,
            footprint=lambda: self.footprint,
            budget=budget,
            clock=lambda: self.now,
        )

    def _look(self) -> str:
        self.looks += 1
        return self.level

    def after(self, seconds: float, *, level: str | None = None) -> str:
        self.now += seconds
        self.level = level or self.level
        return self.guard.relief()


def test_a_guard_looks_now_and_then():
    scene = Scene()
    for _ in range(1000):
        assert scene.after(LOOK_EVERY_S / 100) == "none"
    assert scene.looks in (10, 11)


def test_warnings_ask_for_less_now_and_then_and_never_stop():
    scene = Scene(level="warning")
    said = [scene.after(LOOK_EVERY_S) for _ in range(80)]
    assert set(said) == {"none", "shrink"}
    assert said[0] == "shrink" and said.count("shrink") == 80 * LOOK_EVERY_S / SHRINK_EVERY_S


def test_critical_shortage_stops_when_shrinking_did_not_help():
    scene = Scene(level="critical")
    said = [scene.after(0)]
    while said[-1] != "stop":
        said.append(scene.after(LOOK_EVERY_S))
    assert said.count("shrink") == PATIENCE_S / SHRINK_EVERY_S
    assert scene.now == PATIENCE_S


def test_relief_in_time_begins_anew():
    scene = Scene(level="critical")
    assert scene.after(0) == "shrink"
    scene.after(PATIENCE_S - LOOK_EVERY_S)
    assert scene.after(LOOK_EVERY_S, level="normal") == "none"
    assert scene.after(LOOK_EVERY_S, level="critical") == "none", "it has just shrunk"
    assert scene.after(PATIENCE_S - LOOK_EVERY_S) == "shrink"
    assert scene.after(LOOK_EVERY_S) == "stop"


def test_too_large_a_footprint_counts():
    scene = Scene(footprint=101)
    assert scene.after(0) == "shrink"
    assert "stop" not in [scene.after(LOOK_EVERY_S) for _ in range(40)], "the machine itself is not short"
    scene.footprint = 100
    assert {scene.after(LOOK_EVERY_S) for _ in range(10)} == {"none"}
    scene.footprint = 101
    assert "stop" in [scene.after(LOOK_EVERY_S, level="warning") for _ in range(40)]


def test_admission_counts_what_is_free_within_the_budget(monkeypatch):
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 7)
    scene = Scene(free=30)
    scene.guard.admit(37)
    with pytest.raises(MemoryRefusal):
        scene.guard.admit(38)
    scene.free = 1000
    scene.guard.admit(57)
    with pytest.raises(MemoryRefusal):
        scene.guard.admit(58)


@functools.cache
def undisturbed(variant: str, prompt: str, k: int | str = 3) -> list[int]:
    ids, _ = golden_text(variant, prompt)
    out = Conversation(pair_of(variant), guard=ScriptedGuard()).generate(
        ids, max_tokens=LENGTH, sampling=SAMPLED, num_draft_tokens=k
    )
    assert out.finish_reason == "length" and out.note is None
    return out.tokens


def cold(variant: str, ids: list[int], **options) -> list[int]:
    return Conversation(pair_of(variant), guard=ScriptedGuard()).generate(ids, **options).tokens


def check_next_turn(conversation: Conversation, variant: str, ids: list[int]) -> None:
    """A turn after `ids` goes as in a cold run, and leaves the rows of a fresh prefill."""
    conversation.guard = ScriptedGuard()
    following = ids + MODEL_TURN
    options = {"max_tokens": 6, "sampling": SAMPLED, "num_draft_tokens": 3}
    assert conversation.generate(following, **options).tokens == cold(variant, following, **options)
    check_rows(conversation)


@pytest.mark.parametrize("variant, k", [("e2b", 0), ("e2b", "auto"), ("31b", 3)])
def test_shrinking_leaves_the_text_as_it_is(variant, k):
    ids, _ = golden_text(variant, "long")
    guard = ScriptedGuard(["shrink"] * 1000)
    conversation = Conversation(pair_of(variant), guard=guard)
    prompt = ids + MODEL_TURN
    options = {"max_tokens": LENGTH, "sampling": SAMPLED, "num_draft_tokens": k}
    out = conversation.generate(prompt, **options)
    assert guard.asked >= out.stats.rounds
    assert out.tokens == cold(variant, prompt, **options)
    assert (out.finish_reason, out.note) == ("length", None)
    assert conversation.history._checkpoints == []
    check_next_turn(conversation, variant, prompt + out.tokens)


def test_shrinking_drops_checkpoints_and_the_cache():
    ids, _ = golden_text("e2b", "long")
    conversation = Conversation(pair_of("e2b"), guard=ScriptedGuard())
    conversation.generate(ids + MODEL_TURN, max_tokens=2, sampling=SAMPLED)
    assert conversation.history._checkpoints
    mx.eval(mx.zeros((1024, 1024)) + 1)
    assert mx.get_cache_memory() > 0
    conversation.shrink()
    assert conversation.history._checkpoints == [] and mx.get_cache_memory() == 0


@pytest.mark.parametrize("looks", range(1, 12, 2))
@pytest.mark.parametrize("k", [0, 3])
def test_stopping_keeps_a_beginning_of_the_text(k, looks):
    ids, _ = golden_text("e2b", "long")
    # The first look comes after the prefill's only chunk.
    conversation = Conversation(pair_of("e2b"), guard=ScriptedGuard(["none"] * looks + ["stop"]))
    out = conversation.generate(ids, max_tokens=LENGTH, sampling=SAMPLED, num_draft_tokens=k)
    assert (out.finish_reason, out.note) == ("error", STOPPED)
    assert looks <= len(out.tokens) < LENGTH
    assert out.tokens == undisturbed("e2b", "long", k)[: len(out.tokens)]
    assert out.stats.reason is None and out.stats.generation_tokens == len(out.tokens)
    assert conversation.history.rows == 0, "memory is short: the K/V was freed"
    check_next_turn(conversation, "e2b", ids + out.tokens)


def test_stopping_frees_memory():
    pair, (ids, _) = pair_of("e2b"), golden_text("e2b", "long")
    guard = ScriptedGuard(["none"] * 5 + ["stop"])
    conversation = Conversation(pair, guard=guard)
    conversation.generate(ids, max_tokens=2, sampling=SAMPLED)  # compiles and caches what stays
    conversation.clear()
    gc.collect()
    before = mx.get_active_memory()
    conversation.guard = ScriptedGuard(["none"] * 5 + ["stop"])
    stream = conversation.stream(ids, max_tokens=LENGTH, sampling=SAMPLED)
    next(stream)
    assert mx.get_active_memory() > before + 50_000
    assert list(stream)[-1].note == STOPPED
    assert mx.get_active_memory() <= before and mx.get_cache_memory() == 0


def test_text_that_was_held_back_is_in_the_last_chunk():
    """It might have become a stop string; now it does not."""
    pair, (ids, text) = with_characters(pair_of("31b")), golden_text("31b", "short")
    stop = chr(256 + text[2]) + "never"
    guard = ScriptedGuard(["none"] * 3 + ["stop"])
    chunks = list(Conversation(pair, guard=guard).stream(ids, max_tokens=9, num_draft_tokens=0, stop=stop))
    assert [chunk.text for chunk in chunks[-2:]] == ["", chr(256 + text[2])]
    assert chunks[-1].tokens == () and chunks[-1].finish_reason == "error"


def test_a_reply_that_ended_by_itself_is_not_stopped():
    ids, text = golden_text("e2b", "long")
    guard = ScriptedGuard(["none", "stop"])
    out = Conversation(pair_of("e2b"), guard=guard).generate(ids, max_tokens=1)
    assert (out.tokens, out.finish_reason, out.note) == (text[:1], "length", None)


@pytest.mark.parametrize("at", [1, 2])
def test_a_prefill_is_given_up(at):
    ids, text = golden_text("e2b", "long")
    guard = ScriptedGuard(["none"] * (at - 1) + ["stop"])
    conversation, seen = Conversation(pair_of("e2b"), chunk=16, guard=guard), []
    with pytest.raises(MemoryRefusal, match=f"given up at token {16 * at} of 45; close other programs"):
        conversation.generate(ids, max_tokens=5, on_progress=lambda done, total: seen.append(done))
    assert seen == [16 * i for i in range(1, at)]
    assert conversation.history.rows == 0 and conversation.history.nbytes == 0
    out = conversation.generate(ids, max_tokens=5)
    assert (out.tokens, out.stats.reused_tokens) == (text[:5], 0)


def test_a_prefill_shrinks_and_goes_on():
    ids, text = golden_text("e2b", "long")
    conversation = Conversation(pair_of("e2b"), chunk=16, guard=ScriptedGuard(["shrink"] * 3))
    assert conversation.generate(ids, max_tokens=5).tokens == text[:5]


def refuse_above(limit: int):
    def admits(needed: int) -> None:
        if needed > limit:
            raise MemoryRefusal(f"{needed} bytes do not fit; shorten the prompt")

    return admits


def test_a_prompt_that_does_not_fit_leaves_the_conversation_as_it_was(monkeypatch):
    pair, (ids, text) = replace(pair_of("e2b"), max_context=100_000), golden_text("e2b", "long")
    conversation = Conversation(pair, guard=ScriptedGuard())
    conversation.generate(ids, max_tokens=5)
    before = (conversation.history.tokens, conversation.history.rows, conversation.history.nbytes)
    conversation.guard = ScriptedGuard(admits=refuse_above(10 * conversation.history.nbytes))
    with monkeypatch.context() as patch:
        for name in ("new_kv", "grow", "prefill"):
            patch.setattr(mlx_mtp.turns, name, None)
        with pytest.raises(MemoryRefusal, match="do not fit"):
            conversation.generate(ids + text[:5], max_tokens=90_000)
    assert (conversation.history.tokens, conversation.history.rows, conversation.history.nbytes) == before
    out = conversation.generate(ids + text[:5], max_tokens=5)
    assert (out.tokens, out.stats.reused_tokens) == (text[5:10], len(ids) + 4)
    check_rows(conversation)


def test_checkpoints_go_before_a_prompt_is_refused():
    ids, text = golden_text("e2b", "long")
    prompt = ids + MODEL_TURN
    conversation = Conversation(pair_of("e2b"), guard=ScriptedGuard())
    conversation.generate(prompt, max_tokens=2)
    history = conversation.history
    assert history._checkpoints

    def admits(needed: int) -> None:
        if history._checkpoints:
            raise MemoryRefusal("no; shrink")

    conversation.guard = ScriptedGuard(admits=admits)
    following = prompt + text[:9] + MODEL_TURN
    out = conversation.generate(following, max_tokens=2)
    assert out.tokens == cold("e2b", following, max_tokens=2)


def test_what_a_prompt_needs_is_what_its_buffers_take():
    """New buffers, growing ones, and none where the room is there."""
    pair, (ids, _) = replace(pair_of("e2b"), max_context=100_000), golden_text("e2b", "long")
    conversation = Conversation(pair, guard=ScriptedGuard())
    history = conversation.history
    take(conversation, ids, chunks=1, max_tokens=5)
    scratch = conversation.guard.needed[-1] - history.nbytes
    assert 0 < scratch < 64 * 2**20
    take(conversation, ids, chunks=1, max_tokens=5)
    assert conversation.guard.needed[-1] == scratch, "nothing new"
    small = history.nbytes
    take(conversation, ids, chunks=1, max_tokens=5000)
    grown = history.nbytes - small
    assert grown > 0 and grown <= conversation.guard.needed[-1] - scratch <= 2 * history.nbytes


def test_an_absurd_request_is_refused_instead_of_ending_the_process():
    """The real guard on this machine; MLX's CPU backend does not survive an allocation that fails."""
    pair, (ids, text) = replace(pair_of("e2b"), max_context=2**31), golden_text("e2b", "long")
    conversation = Conversation(pair)
    with pytest.raises(MemoryRefusal, match=r"needs [\d.]+ GB more, and [\d.]+ GB can be taken"):
        conversation.generate(ids, max_tokens=2**31 - 1000)
    assert conversation.generate(ids, max_tokens=5).tokens == text[:5]


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_commands_say_why_a_reply_stopped(monkeypatch, capsys, command):
    guards = [ScriptedGuard(["none"] * 3 + ["stop"])]
    monkeypatch.setattr(mlx_mtp.conversation, "Guard", guards.pop)
    pair, options = mlx_mtp.load("demo"), ReplyOptions(9, 0, (), None, {})
    if command == "generate":
        _print_as_it_comes(pair, "def f", options.request(pair))
    else:
        Session(pair, Talk("demo", options, "plain"), Interrupts()).say("hello")
    said = capsys.readouterr().err
    assert f"({STOPPED})" in said and " tok · " in said
