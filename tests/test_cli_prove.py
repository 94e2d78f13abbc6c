"""`mlx-mtp prove`: it says yes where texts are equal, no where they are not, and tells rounding from mistakes."""

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_mtp
from cli_runs import one_line, run_main, write_chat_pair
from mlx_mtp import Sampling, flips
from mlx_mtp.cli import proof
from mlx_mtp.cli.proof_prompts import proof_prompts
from mlx_mtp.flips import Flip, first_flip, forced_logits

PROMPT = [2, 300, 301, 302, 303]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_chat_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def pair(model):
    return mlx_mtp.load(model)


def plain_text(pair, sampling: Sampling, tokens: int = 24) -> list[int]:
    row = proof.without_end(pair, sampling)
    return mlx_mtp.generate(pair, PROMPT, max_tokens=tokens, sampling=row, num_draft_tokens=0).tokens


def test_it_holds_for_a_sound_pair_and_mlx_lm_agrees(model):
    done = run_main("prove", model, "--prompts", "2", "--tokens", "20", "--json", "--against", "mlx-lm")
    found = json.loads(done.stdout)
    assert done.returncode == 0
    assert found["holds"] is True
    assert found["promise"] == "a"
    played = {(c["sampling"], c["num_draft_tokens"]) for c in found["compared"]}
    assert played == {(s, k) for s in ("greedy", "model defaults") for k in (1, 4, "auto")}
    assert all(c["tokens"] == 2 * 20 and not c["parts"] for c in found["compared"])
    outside = found["against_mlx_lm"]
    assert outside["tokens"] == outside["agreed"] == 2 * 20
    assert outside["largest_difference"] < 1e-4


def test_a_token_changed_by_drafting_is_a_no(model, monkeypatch):
    """A driver that spoils one token of drafted texts: prove must see it, name it, and exit with 1."""
    honest = mlx_mtp.generate

    def spoiled(pair, prompt, *, num_draft_tokens, **options):
        out = honest(pair, prompt, num_draft_tokens=num_draft_tokens, **options)
        if num_draft_tokens:
            out.tokens[7] = (out.tokens[7] + 1) % 512
        return out

    monkeypatch.setattr(mlx_mtp, "generate", spoiled)
    done = run_main("prove", model, "--prompts", "1", "--tokens", "12")
    said = done.stdout.decode()
    assert done.returncode == 1
    assert "token 7" in said
    assert "NOT explained by rounding" in said
    assert said.endswith("it does NOT hold\n")


def test_a_port_that_mlx_lm_disagrees_with_is_a_no(model, tmp_path):
    """Our text is played on one target and checked against another one's weights."""
    from mlx_mtp.against_mlx_lm import agreement

    pair = mlx_mtp.load(model)
    texts = [plain_text(pair, Sampling(temperature=0.0))]
    other = replace(pair, target=replace(pair.target, norm=pair.target.norm * 1.2))
    assert agreement(pair, model, [PROMPT], texts).passes
    assert not agreement(other, model, [PROMPT], texts).passes


def test_forced_logits_choose_the_text_itself_in_passes_of_any_size(pair):
    text = plain_text(pair, Sampling(temperature=0.0))
    for rows in (1, 3, 5, 16):
        logits = forced_logits(pair, PROMPT, text, rows=rows)
        logits[:, mx.array(sorted(pair.prompt_format.eos_ids))] = -mx.inf
        assert logits.shape[0] == len(text) + 1
        assert mx.argmax(logits, axis=-1).tolist()[:-1] == text


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_flip_without_any_rounding_is_not_legitimate(pair, temperature):
    sampling = proof.without_end(pair, Sampling(temperature=temperature, top_k=64, top_p=0.95, seed=1))
    off = plain_text(pair, sampling)
    on = [*off[:10], (off[10] + 1) % 512, *off[11:]]
    flip = first_flip(pair, PROMPT, off, on, sampling, rows=5)
    assert flip is not None
    assert (flip.index, flip.off_token, flip.on_token) == (10, off[10], on[10])
    assert flip.difference == 0
    assert flip.gap > 0
    assert not flip.legitimate


@pytest.mark.parametrize(("temperature", "scale"), [(0.0, 0.5), (1.0, 3.0)])
def test_a_flip_where_passes_round_differently_is_legitimate(pair, temperature, scale, monkeypatch):
    """Logits of wide passes get noise; the token that they then choose was close enough for that noise to choose it."""
    sampling = proof.without_end(pair, Sampling(temperature=temperature, seed=1))
    off = plain_text(pair, sampling)[:11]
    honest = flips.logits_of
    for seed in range(100):

        def noisy(target, hidden, seed=seed):
            logits = honest(target, hidden)
            noise = mx.random.normal(logits.shape, key=mx.random.key(seed)) * scale
            return logits + noise if hidden.shape[1] > 1 else logits

        monkeypatch.setattr(flips, "logits_of", noisy)
        logits = forced_logits(pair, PROMPT, off[:10], rows=5)[-1]
        wide = flips._adjusted(pair, PROMPT, off[:10], logits, sampling)
        chosen = int(flips._shortfall(wide, len(PROMPT) + 10, sampling).argmin())
        if chosen != off[10]:
            break
    flip = first_flip(pair, PROMPT, off, [*off[:10], chosen], sampling, rows=5)
    assert flip is not None
    assert flip.difference > 0.1
    assert flip.legitimate


def test_equal_texts_have_no_flip(pair):
    text = plain_text(pair, Sampling(temperature=0.0))
    assert first_flip(pair, PROMPT, text, list(text), Sampling(temperature=0.0), rows=5) is None


@pytest.mark.parametrize(
    ("gap", "difference", "legitimate"), [(0.2, 0.1, True), (0.21, 0.1, False), (0.0, 0.0, True)]
)
def test_the_rule_of_a_legitimate_flip(gap, difference, legitimate):
    assert Flip(0, 1, 2, gap, difference).legitimate is legitimate


@pytest.mark.parametrize(
    ("filters", "beyond"),
    [
        ({"top_k": 2}, [0.0, 0.0, 1.0, 2.0]),
        ({"min_p": float(np.exp(-1.5))}, [0.0, 0.0, 0.5, 1.5]),
        ({}, [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_distance_from_the_filters_is_in_logits(filters, beyond):
    scaled = np.array([3.0, 2.0, 1.0, 0.0], np.float32)
    assert flips._beyond_filters(scaled, Sampling(**filters)) == pytest.approx(beyond)
    assert flips._beyond_filters(scaled[::-1], Sampling(**filters)) == pytest.approx(beyond[::-1])


def test_distance_from_top_p_is_the_mass_before_a_token():
    scaled = np.log(np.array([0.1, 0.5, 0.4], np.float32))
    assert flips._beyond_filters(scaled, Sampling(top_p=0.85)) == pytest.approx([0.05, 0.0, 0.0], abs=1e-6)


def test_half_of_the_prompts_go_past_the_window(pair):
    lengths = [len(ids) for ids in proof_prompts(pair, 20, 8)]
    assert len(lengths) == 20
    assert all(length + 8 >= 1.25 * pair.target.text.sliding_window for length in lengths[1::2])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--prompts", "0"), "--prompts"),
        (("--prompts", "1000"), "--prompts"),
        (("--tokens", "1"), "--tokens"),
        (("--against", "vllm"), "mlx-lm"),
    ],
)
def test_wrong_usage_is_refused(model, words, said):
    done = run_main("prove", model, *words)
    assert done.returncode == 2
    assert said in one_line(done.stderr)


def test_without_a_drafter_there_is_nothing_to_prove(model):
    done = run_main("prove", model, "--drafter", "none")
    assert done.returncode == 3
    assert "nothing to prove" in one_line(done.stderr)


def test_importing_mlx_lm_leaves_the_open_file_limit_alone():
    code = """
import resource
before = resource.getrlimit(resource.RLIMIT_NOFILE)
from mlx_mtp.against_mlx_lm import file_limits_kept
with file_limits_kept():
    import mlx_lm
print(resource.getrlimit(resource.RLIMIT_NOFILE) == before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "True\n", done.stderr
    assert resource.setrlimit.__module__ == "resource"
