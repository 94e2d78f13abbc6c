"""Tokens to text: the same text for every grouping of the tokens, ends exactly where it should."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlx_mtp.errors import ParameterError
from mlx_mtp.prompt import load_prompt_format
from mlx_mtp.stream import MAX_STOP_CHARS, MAX_STOPS, Piece, StopFinder, TextStream, check_stops
from mlx_mtp.tokenizer import Tokenizer
from tiny_tokenizer import write_tokenizer

EOS = 1
PAD, BOS, TURN, END_OF_TURN, CHANNEL, END_OF_CHANNEL = 0, 2, 4, 5, 6, 7
CALL, END_OF_CALL, TOOL_RESPONSE, QUOTE = 11, 12, 13, 15
EOS_IDS = (EOS, END_OF_TURN, TOOL_RESPONSE)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_prompt_format(folder, eos_ids=()).tokenizer


def joined(pieces: list[Piece], channel: str) -> str:
    return "".join(piece.text for piece in pieces if piece.channel == channel)


def play(
    stream: TextStream, tokens: list[int], cuts: list[int] | None = None, reason: str = "length"
) -> tuple[list[Piece], int, str | None]:
    """Push `tokens` in groups that end at `cuts`, then finish -> all pieces, tokens used, finish reason."""
    pieces: list[Piece] = []
    used = 0
    for start, end in pairwise([0, *sorted(set(cuts or [])), len(tokens)]):
        pushed = stream.push(tokens[start:end])
        pieces += pushed.pieces
        used += pushed.used
        if pushed.finish_reason:
            break
    finished = stream.finish(reason)
    assert stream.finish("error").pieces == (), "nothing is left after the end"
    return pieces + list(finished.pieces), used, finished.finish_reason


def answer(tokenizer: Tokenizer, tokens: list[int], stop: Any = (), cuts: list[int] | None = None) -> str:
    stream = TextStream(tokenizer, stop=check_stops(stop), eos_ids=EOS_IDS)
    return joined(play(stream, tokens, cuts)[0], "answer")


every_token = st.lists(st.integers(0, 511), max_size=40)
some_stops = st.lists(
    st.sampled_from(["e", "the ", "ab", "abc", "bcd", " \n", "🐢", "\ufffd", "is is"]), max_size=4
)
some_cuts = st.lists(st.integers(0, 40), max_size=10)


@given(every_token, some_stops, some_cuts)
@settings(max_examples=250, deadline=None)
def test_grouping_changes_nothing(
    tokenizer: Tokenizer, tokens: list[int], stop: list[str], cuts: list[int]
) -> None:
    """Every channel's text, tokens used and reason, for arbitrary ids: bytes, control tokens, EOS and all."""
    cuts = [cut for cut in cuts if cut <= len(tokens)]
    results = []
    for grouping in ([], cuts, list(range(len(tokens)))):
        stream = TextStream(tokenizer, stop=tuple(stop), eos_ids=EOS_IDS)
        pieces, used, reason = play(stream, tokens, grouping)
        results.append(([joined(pieces, channel) for channel in ("answer", "thought", "tool")], used, reason))
    assert results[0] == results[1] == results[2]


@given(st.lists(st.integers(19, 511), max_size=40), some_cuts)
@settings(max_examples=200, deadline=None)
def test_text_equals_decoding_at_once(tokenizer: Tokenizer, tokens: list[int], cuts: list[int]) -> None:
    """Ordinary tokens only, invalid UTF-8 among them."""
    cuts = [cut for cut in cuts if cut <= len(tokens)]
    assert answer(tokenizer, tokens, cuts=cuts) == tokenizer.decode(tokens)


@given(st.text(max_size=30).filter(lambda text: "▁" not in text))
@settings(max_examples=200, deadline=None)
@example("🐢🐢 é 中文 \u200d👩‍💻")
def test_no_character_is_shown_in_parts(tokenizer: Tokenizer, text: str) -> None:
    """Most characters are several byte tokens here: each appears when its last byte has come, none as U+FFFD."""
    stream = TextStream(tokenizer, eos_ids=EOS_IDS)
    shown = ""
    for token in tokenizer.encode(text):
        shown += "".join(piece.text for piece in stream.push([token]).pieces)
        assert text.startswith(shown)
    assert shown == text


def test_a_character_cut_off_at_the_end_is_dropped(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("ok 🐢")
    assert answer(tokenizer, tokens[:-1]) == "ok "
    assert answer(tokenizer, [*tokens[:-1], EOS]) == "ok "
    assert answer(tokenizer, [*tokens[:-1], CHANNEL, END_OF_CHANNEL, *tokenizer.encode("x")]) == "ok x"


def test_invalid_bytes_become_one_replacement_character(tokenizer: Tokenizer) -> None:
    lead = tokenizer.encode("é")[0]
    assert answer(tokenizer, [lead, *tokenizer.encode("a")]) == "\ufffda"


def test_leading_space_is_kept(tokenizer: Tokenizer) -> None:
    """Gemma's first "▁" is a space like others: the reply goes on from the prompt's newline."""
    assert answer(tokenizer, tokenizer.encode(" two  spaces ")) == " two  spaces "


# ---- ends ----


@pytest.mark.parametrize("eos", EOS_IDS)
@pytest.mark.parametrize("at", range(5))
def test_eos_anywhere_in_a_round_ends_the_reply(tokenizer: Tokenizer, eos: int, at: int) -> None:
    """Fault 56: EOS is used, gives no text, and what was drafted after it is not used."""
    words = tokenizer.encode("one two three four")
    assert len(words) >= 4
    tokens = [*words[:at], eos, *words[at:]]
    stream = TextStream(tokenizer, eos_ids=EOS_IDS)
    pushed = stream.push(tokens)
    assert joined(list(pushed.pieces), "answer") == tokenizer.decode(words[:at])
    assert (pushed.used, pushed.finish_reason) == (at + 1, "stop")
    assert stream.push([words[0]]) == stream.finish("length"), (
        "nothing more is used, and the first reason stays"
    )
    assert stream.push([words[0]]).used == 0


def test_a_control_token_is_an_end_only_if_told_so(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, eos_ids=[99])
    assert stream.push([EOS, END_OF_TURN, PAD, BOS, TURN]).pieces == ()
    assert stream.finish_reason is None
    assert stream.push([99]).finish_reason == "stop", "an ordinary token may be an end"


@pytest.mark.parametrize("reason", ["length", "cancelled", "error"])
def test_finish_lets_go_of_what_is_held_back(tokenizer: Tokenizer, reason: str) -> None:
    stream = TextStream(tokenizer, stop=("END.",), eos_ids=EOS_IDS)
    pushed = stream.push(tokenizer.encode("text EN"))
    assert joined(list(pushed.pieces), "answer") == "text "
    finished = stream.finish(reason)
    assert (finished.pieces, finished.used, finished.finish_reason) == ((Piece("EN", "answer"),), 0, reason)


def test_eos_lets_go_of_what_is_held_back(tokenizer: Tokenizer) -> None:
    assert answer(tokenizer, [*tokenizer.encode("text EN"), EOS], stop="END") == "text EN"


# ---- stop strings ----


def first_stop(text: str, stops: list[str]) -> tuple[str, int | None]:
    """By definition: read character by character until the text ends in a stop -> text before it, characters read."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], end
    return text, None


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4),
    st.lists(st.integers(0, 30), max_size=8),
)
@settings(max_examples=400, deadline=None)
@example("aabaaab", ["aaab"], [1, 2, 3, 4, 5, 6])
@example("abcd", ["abcd", "bc"], [3])
def test_stop_finder_agrees_with_the_definition(text: str, stops: list[str], cuts: list[int]) -> None:
    finder = StopFinder(tuple(stops))
    expected, end = first_stop(text, stops)
    shown, stopped = "", False
    for start, stop in pairwise([0, *sorted({cut for cut in cuts if cut <= len(text)}), len(text)]):
        part, stopped = finder.push(text[start:stop])
        shown += part
        assert expected.startswith(shown), "nothing is shown that a stop string takes back"
        if stopped:
            break
    assert stopped == (end is not None)
    assert shown + finder.flush() == expected


def test_text_is_held_back_no_longer_than_needed() -> None:
    finder = StopFinder(("abc", "xx"))
    assert [finder.push(char)[0] for char in "aabxab!"] == ["", "a", "", "ab", "x", "", "ab!"]


def test_stop_over_tokens_and_rounds_counts_the_tokens_used(tokenizer: Tokenizer) -> None:
    """Fault 57: the token that completes the stop is the last one used; what follows can be rewound."""
    tokens = tokenizer.encode("one two.\nEnd of it")
    for completing in range(len(tokens)):
        if ".\nEn" in tokenizer.decode(tokens[: completing + 1]):
            break
    for cut in range(len(tokens) + 1):
        stream = TextStream(tokenizer, stop=(".\nEn", "never"), eos_ids=EOS_IDS)
        pieces, used, reason = play(stream, tokens, [cut])
        assert joined(pieces, "answer") == "one two"
        assert (used, reason) == (completing + 1, "stop")


def test_stops_count_in_the_answer_only(tokenizer: Tokenizer) -> None:
    encode = tokenizer.encode
    tokens = [
        CHANNEL,
        *encode("thought\nSTOP"),
        END_OF_CHANNEL,
        *encode("ST"),
        CHANNEL,
        END_OF_CHANNEL,
        *encode("OP!"),
    ]
    stream = TextStream(tokenizer, stop=("STOP",), eos_ids=EOS_IDS)
    pieces, used, reason = play(stream, tokens)
    assert (joined(pieces, "answer"), joined(pieces, "thought")) == ("STOP!", "STOP")
    assert (used, reason) == (len(tokens), "length")


@pytest.mark.parametrize(
    "bad", ["", [""], ["ok", ""], [1], 5, b"x", [None], {"a"}, {"a": 1}, "x" * (MAX_STOP_CHARS + 1)]
)
def test_bad_stops_are_refused(tokenizer: Tokenizer, bad: Any) -> None:
    """Fault 48."""
    with pytest.raises(ParameterError, match="stop") as caught:
        check_stops(bad)
    assert "; " in str(caught.value)
    with pytest.raises(ParameterError):
        TextStream(tokenizer, stop=bad, eos_ids=())


def test_stops_are_a_string_or_several() -> None:
    assert check_stops("a") == ("a",)
    assert check_stops(["a", "b"]) == ("a", "b")
    assert check_stops(()) == check_stops([]) == check_stops(None) == ()
    assert len(check_stops(["x"] * MAX_STOPS)) == MAX_STOPS
    with pytest.raises(ParameterError, match=f"at most {MAX_STOPS} stop strings"):
        check_stops(["x"] * (MAX_STOPS + 1))


# ---- channels ----


def pieces_of(tokenizer: Tokenizer, tokens: list[int], **options: Any) -> list[Piece]:
    return play(TextStream(tokenizer, eos_ids=EOS_IDS, **options), tokens)[0]


def test_thoughts_have_their_channel(tokenizer: Tokenizer) -> None:
    encode = tokenizer.encode
    tokens = [CHANNEL, *encode("thought\nLet me see.\n"), END_OF_CHANNEL, *encode("Paris."), EOS]
    assert pieces_of(tokenizer, tokens) == [Piece("Let me see.\n", "thought"), Piece("Paris.", "answer")]
    shown = pieces_of(tokenizer, tokens, thought_channel=False)
    assert shown == [Piece("thought\nLet me see.\nParis.", "answer")]


def test_a_thoughts_name_line_is_swallowed_however_it_arrives(tokenizer: Tokenizer) -> None:
    name = [token for char in "thought\nx" for token in tokenizer.encode(char)]
    stream = TextStream(tokenizer, eos_ids=EOS_IDS)
    pieces = [piece for token in [CHANNEL, *name, END_OF_CHANNEL] for piece in stream.push([token]).pieces]
    assert pieces == [Piece("x", "thought")]


def test_an_empty_or_unfinished_thought_is_no_answer(tokenizer: Tokenizer) -> None:
    encode = tokenizer.encode
    assert pieces_of(tokenizer, [CHANNEL, *encode("thought\n"), END_OF_CHANNEL, *encode("hi")]) == [
        Piece("hi", "answer")
    ]
    assert pieces_of(tokenizer, [CHANNEL, *encode("thought"), END_OF_CHANNEL, *encode("hi")]) == [
        Piece("hi", "answer")
    ]
    assert pieces_of(tokenizer, [CHANNEL, *encode("tho")]) == []
    assert pieces_of(tokenizer, [CHANNEL, *encode("thought\nhm")]) == [Piece("hm", "thought")]
    assert pieces_of(tokenizer, [CHANNEL, *encode("thought\nhm"), EOS]) == [Piece("hm", "thought")]


def test_tool_calls_are_verbatim(tokenizer: Tokenizer) -> None:
    encode = tokenizer.encode
    call = [CALL, *encode("call:f{a:"), QUOTE, *encode("x"), QUOTE, *encode("}"), END_OF_CALL]
    tokens = [*encode("Wait."), *call, *call, TOOL_RESPONSE, *encode("drafted")]
    text = '<|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|>'
    assert pieces_of(tokenizer, tokens) == [Piece("Wait.", "answer"), Piece(text * 2, "tool")]


def test_control_tokens_give_no_text(tokenizer: Tokenizer) -> None:
    tokens = [token for control in range(16, 19) for token in (control, *tokenizer.encode("a"))]
    assert pieces_of(tokenizer, [PAD, BOS, TURN, QUOTE, END_OF_CHANNEL, END_OF_CALL, *tokens]) == [
        Piece("aaa", "answer")
    ]


def test_only_its_own_token_closes_a_channel(tokenizer: Tokenizer) -> None:
    thought = [CHANNEL, *tokenizer.encode("thought\na"), END_OF_CALL, *tokenizer.encode("b")]
    assert pieces_of(tokenizer, thought) == [Piece("ab", "thought")]
    call = [CALL, *tokenizer.encode("a"), END_OF_CHANNEL, *tokenizer.encode("b")]
    assert pieces_of(tokenizer, call) == [Piece("<|tool_call>a<channel|>b", "tool")]


def test_typed_control_text_stays_text(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("<|channel>thought\n<turn|>")
    assert pieces_of(tokenizer, tokens) == [Piece("<|channel>thought\n<turn|>", "answer")]


def test_work_per_token_does_not_grow(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token is looked up once, and what is held back stays shorter than the longest stop string."""
    looked_up = []
    token_bytes = tokenizer.token_bytes
    monkeypatch.setattr(tokenizer, "token_bytes", lambda token: looked_up.append(token) or token_bytes(token))
    tokens = tokenizer.encode("the sky is blue and " * 300)
    stream = TextStream(tokenizer, stop=("blue and and", "zzzz"), eos_ids=EOS_IDS)
    shown = 0
    seen = 0
    for token in tokens:
        shown += sum(len(piece.text) for piece in stream.push([token]).pieces)
        seen += len(token_bytes(token))
        assert seen - shown < len("blue and and")
    assert looked_up == tokens
