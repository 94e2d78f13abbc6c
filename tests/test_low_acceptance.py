"""A drafter that is hardly ever right: said, parked under auto, and never a change to the text (faults 29 and 30)."""

import json
import re
import shutil
from importlib.resources import files
from pathlib import Path

import mlx.core as mx
import pytest

from cli_runs import run_main, write_chat_pair
from mlx_mtp import Sampling, generate, load
from mlx_mtp.fit import ENOUGH_DRAFTS, Fit
from mlx_mtp.policy import PROBE_EVERY, AutoPolicy
from pairs import golden_pair, random_drafter
from talks import golden_text
from tiny_checkpoints import edit_tensors

PROMPT = [5, 77, 130, 9]
GREEDY = Sampling(temperature=0.0)


def test_a_miswired_pair_is_said_and_its_text_is_the_targets() -> None:
    """Fault 29 with a fixed number: a warning, and drafting goes on as it was asked for."""
    pair = golden_pair("31b", drafter=random_drafter("31b"))
    plain = generate(pair, PROMPT, max_tokens=80, sampling=GREEDY, num_draft_tokens=0)
    early = generate(pair, PROMPT, max_tokens=40, sampling=GREEDY, num_draft_tokens=4)
    assert early.stats.drafted < ENOUGH_DRAFTS and early.stats.warning is None
    out = generate(pair, PROMPT, max_tokens=80, sampling=GREEDY, num_draft_tokens=4)
    assert out.tokens == plain.tokens
    assert "drafts were right" in str(out.stats.warning) and "; use the model's own" in str(out.stats.warning)
    assert not out.stats.parked and set(out.stats.num_draft_tokens) == {4}


def test_auto_parks_a_miswired_pair_in_every_later_reply() -> None:
    """Fault 29: what one request found holds for the next ones, which waste no tries."""
    pair = golden_pair("31b", drafter=random_drafter("31b"))
    generate(pair, PROMPT, max_tokens=80, sampling=GREEDY, num_draft_tokens=8)
    out = generate(pair, PROMPT, max_tokens=50, sampling=GREEDY)
    assert out.stats.parked and out.stats.drafted == 0
    assert str(out.stats.reason).startswith("parked: only ") and out.stats.warning is not None


def test_a_sound_pair_is_not_blamed() -> None:
    """On a text for which the golden drafter was fitted, also with more drafts than can be right."""
    pair = golden_pair("31b")
    ids, text = golden_text("31b", "long")
    drafted = 0
    for k in (15, 15, 4, "auto"):
        out = generate(pair, ids, max_tokens=48, num_draft_tokens=k)
        assert out.tokens == text and out.stats.warning is None
        drafted += out.stats.drafted
    assert drafted > ENOUGH_DRAFTS


def tuned(folder: Path, how_much: float | None) -> Path:
    """The demo pair with the target's embedding changed by noise, or (None) with another token in every row."""
    demo = Path(str(files("mlx_mtp.demo")))
    for part in ("target", "drafter"):
        shutil.copytree(demo / part, folder / part)
    name = "model.embed_tokens.weight"
    table = mx.load(str(demo / "target" / "model.safetensors"))[name].astype(mx.float32)
    if how_much is None:
        table = table[mx.random.permutation(table.shape[0], key=mx.random.key(3))]
    else:
        table += how_much * mx.std(table) * mx.random.normal(table.shape, key=mx.random.key(3))
    edit_tensors(folder / "target" / "model.safetensors", {name: table.astype(mx.bfloat16)})
    return folder / "target"


@pytest.mark.parametrize(("how_much", "is_warned"), [(0.3, False), (None, True)])
def test_a_fine_tuned_target_works_with_the_stock_drafter(
    tmp_path: Path, how_much: float | None, is_warned: bool
) -> None:
    """Fault 30: the text is the tuned target's own; only one that is far from the original is warned of."""
    pair = load(tuned(tmp_path, how_much))
    pair.rounds.compiled = False  # seconds of a C++ compiler would show nothing more
    options = {"max_tokens": 32, "sampling": GREEDY}
    drafted = generate(pair, "def main(", num_draft_tokens=8, **options)
    assert drafted.tokens == generate(pair, "def main(", num_draft_tokens=0, **options).tokens
    assert drafted.stats.drafted >= (ENOUGH_DRAFTS if is_warned else 1)
    assert (drafted.stats.warning is not None) == is_warned
    if is_warned:
        assert "fine-tuned far from the one it was made for" in str(drafted.stats.warning)


def test_the_warning_reaches_a_person(tmp_path: Path) -> None:
    """A random drafter, by `generate` and in its figures; not before there were enough drafts."""
    target = write_chat_pair(tmp_path)
    words = ("generate", target, "Hi", "--seed", "1", "--temperature", "0", "--mtp", "8")
    run = run_main(*words, "--max-tokens", "60")
    assert run.returncode == 0 and run.stderr.decode().count("warning: only ") == 1
    short = run_main(*words, "--max-tokens", "5", "--json")
    assert json.loads(short.stdout)["stats"]["warning"] is None and b"warning" not in short.stderr


def observe(fit: Fit, verified: int, accepted: int, rounds: int) -> None:
    for _ in range(rounds):
        fit.observe(verified, [accepted])


def test_what_follows_a_wrong_draft_is_not_held_against_the_drafter() -> None:
    """Every second first draft right, 15 asked for: 1 in 30 drafts is right, and the drafter is fine."""
    fit = Fit()
    for _ in range(100):
        fit.observe(15, [1])
        fit.observe(15, [0])
    assert fit.warning is None
    observe(fit, 15, 0, 30)
    assert fit.warning is not None


@pytest.mark.parametrize(("rounds", "is_warned"), [(49, False), (50, True)])
def test_the_number_of_drafts_for_a_verdict(rounds: int, is_warned: bool) -> None:
    fit = Fit()
    observe(fit, 4, 0, rounds)
    assert (fit.warning is not None) == is_warned


@pytest.mark.parametrize(("right", "is_warned"), [(9, True), (10, False)])
def test_the_rate_for_a_verdict(right: int, is_warned: bool) -> None:
    """One draft a round, 200 of them: below 5 % is warned of."""
    fit = Fit()
    observe(fit, 1, 1, right)
    observe(fit, 1, 0, ENOUGH_DRAFTS - right)
    assert (fit.warning is not None) == is_warned


def test_a_warning_is_taken_back() -> None:
    fit = Fit()
    observe(fit, 4, 0, 50)
    observe(fit, 4, 4, 1)
    assert fit.warning is not None
    observe(fit, 4, 1, 1)
    assert fit.warning is None


def test_rows_without_a_part_do_not_count() -> None:
    fit = Fit()
    for _ in range(100):
        fit.observe(4, [])
        fit.observe(0, [0, 0])
    assert fit.warning is None and fit.hint == ""


def test_auto_probes_a_parked_pair_and_drafts_again_when_it_fits() -> None:
    fit = Fit()
    observe(fit, 4, 0, 50)
    policy = AutoPolicy(fit=fit)
    assert policy.parked
    drafts = []
    for _ in range(2 * PROBE_EVERY + 2):
        verified = policy.plan(0).draft
        drafts.append(verified)
        policy.observe(verified, [0], 0.01)
    assert [i for i, k in enumerate(drafts) if k] == [PROBE_EVERY, 2 * PROBE_EVERY]
    for _ in range(3 * PROBE_EVERY):
        verified = policy.plan(0).draft
        policy.observe(verified, [verified], 0.01)
    assert fit.warning is None and not policy.parked and policy.plan(0).draft > 0


def test_auto_says_early_that_none_was_right() -> None:
    """Long before a verdict: parked for the usual reason, with what there is to see so far."""
    policy = AutoPolicy()
    for _ in range(200):
        verified = policy.plan(0).draft
        policy.observe(verified, [0], 0.01 * (1 + 0.2 * verified))
    assert policy.parked and re.search(r"; 0 of \d+ drafts were right so far$", str(policy.reason))
