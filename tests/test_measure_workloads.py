"""The prompts that are measured: eight of each kind, as long as a context asks, through any template."""

import hashlib
from dataclasses import replace

import pytest

import mlx_mtp
from mlx_mtp.errors import ParameterError
from mlx_mtp.measure.harbour_log import harbour_log
from mlx_mtp.measure.workloads import (
    AS_WRITTEN,
    PROMPT_SET,
    PROMPTS_EACH,
    WORKLOADS,
    prompt_set_hash,
    workload_prompts,
)


@pytest.fixture(scope="module")
def pair():
    return mlx_mtp.load("demo")


def text_of(pair, ids: list[int]) -> str:
    return pair.prompt_format.tokenizer.decode(ids)


def test_the_prompts_are_those_of_their_version():
    """Whoever changes a prompt raises PROMPT_SET: figures of other prompts are not compared with these."""
    assert (PROMPT_SET, prompt_set_hash()) == (1, "6cdecd6c3d0adba1")


@pytest.mark.parametrize("workload", WORKLOADS)
def test_eight_different_prompts_each(pair, workload):
    prompts = workload_prompts(pair, workload, PROMPTS_EACH, AS_WRITTEN)
    assert len({tuple(ids) for ids in prompts}) == PROMPTS_EACH == 8
    assert all(30 < len(ids) < 600 for ids in prompts)


@pytest.mark.parametrize("context", [512, 4096, 16_384])
def test_prompts_fill_their_context(pair, context):
    for workload in WORKLOADS:
        for ids in workload_prompts(pair, workload, 8 if context == 512 else 2, context):
            assert min(0.99 * context, context - 8) <= len(ids) <= context, "1 % or a word"


def test_a_prompt_that_is_longer_by_itself_stays_as_it_is(pair):
    assert workload_prompts(pair, "tool_call", 1, 100) == workload_prompts(pair, "tool_call", 1, AS_WRITTEN)


def test_the_log_comes_first_and_the_question_last(pair):
    [ids] = workload_prompts(pair, "code", 1, 512)
    text = text_of(pair, ids)
    assert text.index("Monday of week 1") < text.index("Write a Python class `Schedule`")
    [ids] = workload_prompts(pair, "summary", 1, AS_WRITTEN)
    assert text_of(pair, ids).index("Monday of week 1") < text_of(pair, ids).index("Summarise the log above")


def test_functions_and_their_results_go_through_the_template_or_become_text(pair):
    [with_tools] = workload_prompts(pair, "agent_loop", 1, AS_WRITTEN)
    calls = {
        pair.prompt_format.tokenizer.token_id(name)
        for name in ("<|tool_call>", "<|tool_response>", "<|tool>")
    }
    assert None not in calls and calls <= set(with_tools)
    template = pair.prompt_format.template.replace("tools", "nothing")
    plain = replace(pair, prompt_format=replace(pair.prompt_format, template=template))
    for workload in ("agent_loop", "tool_call"):
        [ids] = workload_prompts(plain, workload, 1, AS_WRITTEN)
        assert not calls & set(ids)
        assert "You may call these functions" in text_of(plain, ids)
    bare = replace(pair, prompt_format=replace(pair.prompt_format, template=None))
    [ids] = workload_prompts(bare, "agent_loop", 1, AS_WRITTEN)
    assert "Result: 1 failed, 14 passed" in text_of(bare, ids)


def test_the_log_is_the_same_everywhere_and_does_not_repeat_itself():
    log = harbour_log(9000)
    assert hashlib.sha256(log.encode()).hexdigest()[:16] == HASH_OF_THE_LOG
    assert len(log.split()) == 9000
    assert log.startswith(harbour_log(100))
    entries = log.split("\n\n")
    assert len(set(entries)) == len(entries) > 150
    windows = [tuple(log.split()[i : i + 40]) for i in range(8000)]
    assert len(set(windows)) == len(windows)


def test_unknown_workloads_are_refused(pair):
    with pytest.raises(ParameterError, match="code, prose, chat"):
        workload_prompts(pair, "haiku", 1, AS_WRITTEN)


HASH_OF_THE_LOG = "f942f1ef770fa970"
