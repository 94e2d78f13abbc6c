"""Parameters that make no sense (faults 43 to 51), and logits from which nothing can be chosen (52, 53)."""

import math

import mlx.core as mx
import pytest

import mlx_mtp.round
from mlx_mtp import Sampling, generate, generate_batch
from mlx_mtp.conversation import Conversation
from mlx_mtp.errors import ParameterError
from mlx_mtp.pair import Pair
from mlx_mtp.sampling import fold_seed, sampling_arrays
from pairs import golden_pair

PROMPT = [5, 77, 130, 9]
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return golden_pair("31b")


def is_refused(error: pytest.ExceptionInfo[ParameterError], *parts: object) -> bool:
    """One line that says the rule, what was got and, after a semicolon, the remedy."""
    message = str(error.value)
    assert (error.value.code, error.value.exit_code) == ("parameter", 2)
    assert "\n" not in message and len(message.split("; ")) >= 2 and not message.endswith(".")
    return all(str(part) in message for part in parts)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", value) for value in (math.nan, -0.1, math.inf, -math.inf, 101.0, "1", None)],
        *[("top_k", value) for value in (-1, 1.5, True, "3", None)],
        *[("top_p", value) for value in (0, 0.0, -0.5, 1.0001, math.nan, "x", 10**400)],
        *[("min_p", value) for value in (-0.1, 1.1, math.nan)],
        *[("repetition_penalty", value) for value in (0.0, -1.0, math.inf, math.nan)],
        *[("presence_penalty", value) for value in (-101.0, math.nan, math.inf)],
        *[("frequency_penalty", value) for value in (101.0, math.nan, -math.inf)],
        *[("seed", value) for value in (1.0, "7", True)],
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ParameterError) as error:
        Sampling(**{name: value})
    assert is_refused(error, name, repr(value)[:60])


def test_the_ends_of_every_range_are_allowed() -> None:
    Sampling(temperature=0, top_k=0, top_p=1e-9, min_p=0, presence_penalty=-100, frequency_penalty=100)
    Sampling(temperature=100, top_k=10**12, top_p=1, min_p=1, repetition_penalty=100, seed=-(2**80))


@pytest.mark.parametrize("max_tokens", [0, -1, 1.0, "5", True, None])
def test_a_reply_has_at_least_one_token(pair: Pair, max_tokens: object) -> None:
    with pytest.raises(ParameterError) as error:
        generate(pair, PROMPT, max_tokens=max_tokens, sampling=GREEDY)
    assert is_refused(error, "max_tokens", repr(max_tokens))


def test_a_huge_max_tokens_is_what_the_context_holds(pair: Pair) -> None:
    prompt = [i * 7 % 256 for i in range(pair.max_context - 3)]
    reply = generate(pair, prompt, max_tokens=10**15, sampling=GREEDY, num_draft_tokens=4)
    assert (len(reply.tokens), reply.finish_reason) == (3, "length")


@pytest.mark.parametrize(
    "bias", [{256: 1.0}, {-1: 1.0}, {99_999_999: 1.0}, {"7": 1.0}, {7: math.nan}, {7: "x"}], ids=str
)
def test_a_bias_outside_the_vocabulary_is_refused_before_any_work(pair: Pair, bias: dict) -> None:
    with pytest.raises(ParameterError) as error:
        Conversation(pair).stream(PROMPT, sampling=Sampling(logit_bias=bias))
    assert is_refused(error, "logit_bias")
    with pytest.raises(ParameterError):
        generate_batch(pair, [PROMPT, PROMPT], sampling=[GREEDY, Sampling(logit_bias=bias)])


@pytest.mark.parametrize("stop", ["", ["ok", ""], [3], 3, [None], {"a": 1}], ids=repr)
def test_a_stop_is_a_string_with_something_in_it(pair: Pair, stop: object) -> None:
    with pytest.raises(ParameterError) as error:
        Conversation(pair).stream(PROMPT, stop=stop)
    assert is_refused(error, "stop")


@pytest.mark.parametrize("k", [16, 100, -1, 2.0, "many", True, None])
def test_a_number_of_drafts_out_of_range_is_refused(pair: Pair, k: object) -> None:
    with pytest.raises(ParameterError) as error:
        Conversation(pair).stream(PROMPT, num_draft_tokens=k)
    assert is_refused(error, "num_draft_tokens", repr(k))


def test_every_whole_number_is_a_seed(pair: Pair) -> None:
    for small in (0, 1, 2**32 - 1):
        assert fold_seed(small) == small
    for seed in (-1, 2**32, 2**63, 2**64, 2**64 + 5, -(2**90)):
        assert 0 <= fold_seed(seed) < 2**32
    assert fold_seed(2**64) == fold_seed(0) and fold_seed(2**64 + 5) == 5
    assert len({fold_seed(seed << shift) for seed in range(1, 100) for shift in (0, 40)}) == 198
    texts = [
        generate(pair, PROMPT, max_tokens=8, sampling=Sampling(seed=seed), num_draft_tokens=k).tokens
        for seed in (-2, 2**64 - 2)
        for k in (0, 2)
    ]
    assert texts[0] == texts[1] == texts[2] == texts[3]


def test_a_random_seed_is_told_and_repeats_the_text(pair: Pair) -> None:
    first, second = (generate(pair, PROMPT, max_tokens=12, sampling=Sampling()) for _ in range(2))
    assert first.stats.seed != second.stats.seed
    again = generate(
        pair, PROMPT, max_tokens=12, sampling=Sampling(seed=first.stats.seed), num_draft_tokens=0
    )
    assert again.tokens == first.tokens


def test_more_drafts_than_tokens_left_never_overshoot(pair: Pair) -> None:
    plain = generate(pair, PROMPT, max_tokens=8, sampling=GREEDY, num_draft_tokens=0).tokens
    for max_tokens in range(1, 9):
        reply = generate(pair, PROMPT, max_tokens=max_tokens, sampling=GREEDY, num_draft_tokens=15)
        assert reply.tokens == plain[:max_tokens] and reply.finish_reason == "length"


@pytest.mark.parametrize("broken", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("k", [0, 3])
def test_broken_logits_in_mid_stream_end_the_reply_and_drop_its_cache(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, broken: float, k: int
) -> None:
    whole = generate(pair, PROMPT, max_tokens=20, sampling=GREEDY, num_draft_tokens=0).tokens
    sound, rounds = mlx_mtp.round.logits_of, []

    def breaking(target: object, hidden: mx.array) -> mx.array:
        rounds.append(hidden.shape)
        logits = sound(target, hidden)
        return logits if len(rounds) < 6 else mx.full(logits.shape, broken)

    conversation = Conversation(pair)
    with monkeypatch.context() as patch:
        patch.setattr(mlx_mtp.round, "logits_of", breaking)
        reply = conversation.generate(PROMPT, max_tokens=20, sampling=GREEDY, num_draft_tokens=k)
    assert reply.finish_reason == "error"
    assert 1 <= len(reply.tokens) < 20 and reply.tokens == whole[: len(reply.tokens)]
    assert conversation.history.rows == 0
    after = conversation.generate(PROMPT, max_tokens=20, sampling=GREEDY, num_draft_tokens=k)
    assert after.tokens == whole and after.stats.reused_tokens == 0


@pytest.mark.parametrize("setting", [GREEDY, Sampling(seed=1), Sampling(top_k=20, seed=1)], ids=str)
def test_a_bias_that_forbids_every_token_is_an_error_and_not_token_0(pair: Pair, setting: Sampling) -> None:
    nothing = Sampling(
        temperature=setting.temperature,
        top_k=setting.top_k,
        seed=1,
        logit_bias=dict.fromkeys(range(256), -math.inf),
    )
    for reply in (
        generate(pair, PROMPT, max_tokens=5, sampling=nothing),
        generate_batch(pair, [PROMPT, PROMPT], max_tokens=5, sampling=[setting, nothing])[1],
    ):
        assert (reply.tokens, reply.finish_reason) == ([], "error")


def test_a_broken_row_leaves_the_others_of_its_batch_alone(pair: Pair) -> None:
    nothing = Sampling(seed=1, logit_bias=dict.fromkeys(range(256), -math.inf))
    rows = [Sampling(seed=4), nothing, Sampling(seed=5)]
    replies = generate_batch(pair, [PROMPT] * 3, max_tokens=10, sampling=rows, num_draft_tokens=2)
    assert replies[1].finish_reason == "error"
    for row in (0, 2):
        alone = generate(pair, PROMPT, max_tokens=10, sampling=rows[row], num_draft_tokens=0)
        assert replies[row].tokens == alone.tokens


def test_top_k_is_cut_to_the_vocabulary() -> None:
    assert sampling_arrays(Sampling(top_k=10**12), 256)["top_k"].item() == 256
    assert sampling_arrays(Sampling(top_k=0), 256)["top_k"].item() == 256
