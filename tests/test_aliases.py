"""The table of aliases: whole, honest about where ids were read, and in step with estimates and documentation."""

import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.utils import validate_repo_id

from mlx_mtp.aliases import (
    ALIASES,
    BITS,
    QUOTED,
    SIZES,
    Alias,
    alias_of,
    assistants_of,
    find_alias,
    stock_assistant,
)
from mlx_mtp.memory import estimate_memory
from mlx_mtp.published_configs import published_target

ROOT = Path(__file__).parent.parent
# What a conversion holds beside the text model: vision and audio towers in bf16, at most this many bytes.
TOWERS = 1.25e9
by_name = pytest.mark.parametrize("alias", ALIASES, ids=lambda alias: alias.name)


def test_every_size_has_every_precision_once() -> None:
    assert [alias.name for alias in ALIASES] == [f"{size}:{bits}" for size in SIZES for bits in BITS]
    assert all(alias.name == f"{alias.size}:{words}" for alias in ALIASES for words in [precision(alias)])
    assert len({alias.target for alias in ALIASES}) == len(ALIASES)


def precision(alias: Alias) -> str:
    return next(words for words, bits in BITS.items() if bits == alias.bits)


@by_name
def test_an_alias_names_a_target_its_drafter_and_where_each_was_read(alias: Alias) -> None:
    for repo_id in (alias.target, alias.drafter):
        validate_repo_id(repo_id)
        assert f"gemma-4-{alias.shape}-it" in repo_id.casefold()
    assert "assistant" in alias.drafter and "assistant" not in alias.target
    for source in (alias.source, alias.drafter_source):
        assert source.startswith("https://") or source == QUOTED
    assert not alias.verified  # turn this on for an id only once it has been opened on the hub


@by_name
def test_targets_trained_for_quantisation_have_the_drafters_trained_with_them(alias: Alias) -> None:
    assert ("-qat-" in alias.target) == ("-qat-" in alias.drafter) == (alias.bits < 16)
    assert assistants_of(alias.target) == alias.drafter == assistants_of(alias.target.upper())


@by_name
def test_the_published_size_is_that_of_the_layout_we_estimate_with(alias: Alias) -> None:
    """A wrong `mlp_bits` would be off by 0.8 GB (E2B) to 10 GB (31B)."""
    if alias.download_gb is None:
        return
    weights = estimate_memory(alias.name, drafter=None).weights
    towers = 0 if alias.size == "12b" else TOWERS
    assert -0.1e9 <= alias.download_gb * 1e9 - weights <= towers + 0.1e9


def test_uniform_four_bits_would_not_explain_the_published_sizes() -> None:
    for name in ("12b:4bit", "31b:4bit"):
        alias = find_alias(name)
        assert alias is not None and alias.download_gb is not None
        uniform = estimate_memory(name, bits=4, mlp_bits=4, drafter=None).weights
        assert alias.download_gb * 1e9 - uniform > 3 * TOWERS


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("e4b", "e4b:4bit"),
        ("E4B:8BIT", "e4b:8bit"),
        ("26b-a4b", "26b:4bit"),
        ("26B-A4B:bf16", "26b:bf16"),
        ("31b:bf16", "31b:bf16"),
    ],
)
def test_names_are_found_in_any_case(text: str, name: str) -> None:
    alias = find_alias(text)
    assert alias is not None and alias.name == name


@pytest.mark.parametrize(
    "text", ["", ":", "e4b:", ":4bit", "e4b:3bit", "e4b:4bit:4bit", "e4b ", "e3b", "demo", "4bit"]
)
def test_there_are_no_others(text: str) -> None:
    assert find_alias(text) is None


@pytest.mark.parametrize(
    ("target", "drafter"),
    [
        ("google/gemma-4-E4B-it", "google/gemma-4-E4B-it-assistant"),
        ("google/gemma-4-26b-a4b-it", "google/gemma-4-26B-A4B-it-assistant"),
        (
            "google/gemma-4-31B-it-qat-q4_0-unquantized",
            "google/gemma-4-31B-it-qat-q4_0-unquantized-assistant",
        ),
        ("mlx-community/gemma-4-e4b-it-4bit", "mlx-community/gemma-4-E4B-it-assistant-bf16"),
        ("mlx-community/gemma-4-12B-it-OptiQ-4bit", "mlx-community/gemma-4-12B-it-assistant-bf16"),
        ("mlx-community/gemma-4-12B-it-qat-mxfp8", "mlx-community/gemma-4-12B-it-qat-assistant-4bit"),
        ("mlx-community/gemma-4-26B-A4B-it-qat-q4_0-mlx-aligned", find_alias("26b").drafter),  # type: ignore[union-attr]
    ],
)
def test_other_conversions_of_the_two_publishers_find_theirs(target: str, drafter: str) -> None:
    assert assistants_of(target) == drafter


@pytest.mark.parametrize(
    "repo_id",
    [
        "google/gemma-4-E4B",  # pre-trained only
        "google/gemma-4-E4B-it-assistant",
        "mlx-community/gemma-4-31B-it-uncensored-heretic-4bit",
        "mlx-community/diffusiongemma-26B-A4B-it-4bit",
        "someone/gemma-4-E4B-it",
        "google/gemma-4-E4B-it/../x",
        "google/gemma-3-4b-it",
        "",
    ],
)
def test_nothing_is_promised_about_models_of_others(repo_id: str) -> None:
    assert assistants_of(repo_id) is None


def test_ids_lead_back_to_their_alias() -> None:
    for alias in ALIASES:
        assert alias_of(alias.target) == alias_of(alias.target.casefold()) == alias
        assert alias_of(alias.drafter) is None
    assert alias_of("google/gemma-4-26B-A4B-it") == find_alias("26b:bf16")


@pytest.mark.parametrize("size", SIZES)
def test_stock_assistants_are_the_table_s(size: str) -> None:
    four, sixteen = find_alias(f"{size}:4bit"), find_alias(f"{size}:bf16")
    assert four is not None and sixteen is not None
    assert published_target(four.shape)["text_config"]  # a shape that estimates and pairing know
    assert stock_assistant(four.shape, is_qat=True) == four.drafter
    assert stock_assistant(four.shape) == sixteen.drafter


def test_docs_models_md_holds_these_tables() -> None:
    """After a change of the table: `python docs/write_models.py`."""
    code = (
        "import write_models as w; p = w.PAGE.read_text(encoding='utf-8'); raise SystemExit(p != w.filled(p))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "docs",
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'docs'}", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr or "docs/models.md is not what write_models.py writes"


def test_names_are_read_without_mlx_or_the_hub_s_library() -> None:
    """`mlx-mtp --version` and help import these modules."""
    code = "import sys, mlx_mtp.hub; print(sorted({'mlx', 'huggingface_hub', 'numpy'} & set(sys.modules)))"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert ran.stdout.strip() == "[]"
