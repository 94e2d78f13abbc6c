"""What words for a model mean, and which drafter it gets; nothing here opens a socket."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import validate_repo_id
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlx_mtp.aliases import ALIASES, SIZES, find_alias
from mlx_mtp.errors import CheckpointError, MtpError, PairError, ParameterError
from mlx_mtp.hub import ModelName, demo_folder, drafter_for, parse_name, shape_of
from mlx_mtp.published_configs import SIZES as SHAPES
from mlx_mtp.published_configs import published_drafter, published_target
from tiny_checkpoints import target_config


@pytest.fixture(autouse=True)
def empty_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Relative names are looked for in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_config(folder: Path, raw: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


# --- what words mean


@pytest.mark.parametrize("alias", ALIASES, ids=lambda alias: alias.name)
def test_an_alias_stands_for_its_target(alias: Any) -> None:
    name = parse_name(alias.name.upper())
    assert (name.kind, name.repo_id, name.alias, name.folder) == ("hub", alias.target, alias, None)
    assert name.revision is None and name.warnings == ()


def test_ids_and_revisions() -> None:
    assert parse_name("org/a.model_1").repo_id == "org/a.model_1"
    for name in (parse_name("org/name@refs/pr/1"), parse_name("org/name", "refs/pr/1")):
        assert (name.repo_id, name.revision) == ("org/name", "refs/pr/1")
    assert parse_name("org/name@v1", "v1").revision == "v1"
    assert parse_name("e4b@0123abc").revision == "0123abc"


@pytest.mark.parametrize(
    "revision",
    ["", "../main", "a..b", "/main", "main/", "a//b", "-f", "a b", "a\n", "é", "x" * 256, "@", "a\x00"],
)
def test_what_is_no_revision_is_refused(revision: str) -> None:
    with pytest.raises(ParameterError, match="a branch, a tag or a commit"):
        parse_name("org/name", revision)
    with pytest.raises(ParameterError):
        parse_name(f"e4b@{revision}")


def test_a_revision_is_for_models_on_the_hub_and_given_once(tmp_path: Path) -> None:
    for name in ("demo", str(tmp_path), "."):
        with pytest.raises(ParameterError, match="leave it out"):
            parse_name(name, "main")
    with pytest.raises(ParameterError, match="give one"):
        parse_name("org/name@v1", "v2")


def test_folders_are_written_as_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    for text in ("./m", "../" + tmp_path.name + "/m", f"{tmp_path}/m", "~/m"):
        name = parse_name(text)
        assert name.kind == "folder" and name.folder is not None and name.folder.resolve() == tmp_path / "m"
    assert parse_name(Path("m")).kind == "folder"
    assert parse_name(".").folder == Path(".")


@pytest.mark.parametrize("words", ["e4b", "org/name", "mlx-community/gemma-4-E4B-it-bf16"])
def test_a_folder_never_stands_in_for_a_model_on_the_hub(words: str, tmp_path: Path) -> None:
    (tmp_path / words).mkdir(parents=True)
    name = parse_name(words)
    assert name.kind == "hub" and name.folder is None
    assert len(name.warnings) == 1 and f"./{words}" in name.warnings[0]
    assert parse_name(f"./{words}").kind == "folder"


def test_an_unknown_word_lists_the_aliases_and_the_closest(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"did you mean e4b\? .*e2b, e4b, 12b, 26b, 31b"):
        parse_name("e4")
    with pytest.raises(CheckpointError, match="did you mean 26b"):
        parse_name("26")
    with pytest.raises(CheckpointError, match="e4b:4bit or e4b:8bit or e4b:bf16"):
        parse_name("e4b:6bit")
    with pytest.raises(CheckpointError) as refusal:
        parse_name("zzzzzz")
    assert "did you mean" not in str(refusal.value)
    (tmp_path / "mine").mkdir()
    with pytest.raises(CheckpointError, match=r"the folder of that name here is \./mine"):
        parse_name("mine")


@pytest.mark.parametrize(
    "text",
    [
        "a/b/c",
        "/../x"[1:],
        "a b/c",
        "org/",
        "org/" + "x" * 97,
        "org/na--me",
        "org/x.git",
        "-o/n",
        "ä/n",
    ],
)
def test_what_can_be_no_id_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError):
        parse_name(text)


def test_an_address_is_shortened_to_the_id() -> None:
    for text in (
        "https://huggingface.co/org/name",
        "huggingface.co/org/name/tree/main",
        "https://hf.co/org/name?x=1",
    ):
        with pytest.raises(CheckpointError, match=r"write org/name$"):
            parse_name(text)


@pytest.mark.parametrize(
    ("path", "instead"),
    [
        ("./e4b", "write e4b:4bit for mlx-community/"),
        ("models/26b:8bit", None),
        ("/models/26b:8bit", "write 26b:8bit for mlx-community/"),
        ("./org/name", "write org/name for the model on the hub"),
        ("/srv/google/gemma-4-E4B-it", "write google/gemma-4-E4B-it for the model on the hub"),
        ("/srv/models", "such as e4b"),
        ("~/nothing", "such as e4b"),
        ("./a b/c d", "such as e4b"),
    ],
)
def test_a_missing_path_suggests_what_may_have_been_meant(path: str, instead: str | None) -> None:
    """Fault 1."""
    with pytest.raises(CheckpointError, match=instead or "a model id on the hub must be"):
        parse_name(path)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="give the folder that holds config"):
        parse_name("./model.safetensors")


def test_paths_that_no_system_takes_are_refused() -> None:
    for text in ("/" + "x" * 5000, "./a\x00b", "~\x00/x", "~" + "n" * 300 + "/x", "./" + "y" * 300):
        with pytest.raises(CheckpointError) as refusal:
            parse_name(text)
        assert "check the path" in str(refusal.value)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.one_of(st.text(max_size=40), st.from_regex(r"[~./@:a-zA-Z0-9_-]{0,30}", fullmatch=True)))
@example("e4b@")
@example("\ud800/x")
@example("~\x00")
@example("https://huggingface.co//")
def test_whatever_is_typed_is_a_name_or_an_error_of_ours(text: str) -> None:
    try:
        name = parse_name(text)
    except MtpError as refusal:
        assert len(str(refusal)) > 20
        return
    if name.kind == "hub":
        assert name.repo_id is not None and name.folder is None
        validate_repo_id(name.repo_id)
        assert name.alias is not None or name.repo_id.count("/") == 1
        assert ".." not in f"{name.repo_id}{name.revision}"
    else:
        assert name.folder is not None and name.folder.is_dir() and name.repo_id is None


# --- which drafter


def hub_name(repo_id: str) -> ModelName:
    return parse_name(repo_id)


@pytest.mark.parametrize("alias", ALIASES, ids=lambda alias: alias.name)
def test_an_alias_brings_its_drafter(alias: Any) -> None:
    drafter = drafter_for(parse_name(alias.name), None, "auto")
    assert drafter is not None and (drafter.kind, drafter.repo_id) == ("hub", alias.drafter)
    by_id = drafter_for(parse_name(alias.target), None, "auto")
    assert by_id is not None and by_id.repo_id == alias.drafter and by_id.warnings == ()


def test_the_demo_brings_its_own() -> None:
    demo = parse_name("demo")
    assert demo.folder == demo_folder() / "target"
    drafter = drafter_for(demo, demo.folder, "auto")
    assert drafter is not None and drafter.folder == demo_folder() / "drafter"
    for name in (demo, drafter):
        assert name.folder is not None and (name.folder / "config.json").is_file()


def test_none_is_plain_decoding() -> None:
    assert drafter_for(parse_name("e4b"), None, None) is None


def test_a_folder_s_drafter_lies_beside_or_inside_it(tmp_path: Path) -> None:
    target = write_config(tmp_path / "target", target_config("e2b"))
    name = parse_name("./target")
    assert drafter_for(name, target, "auto") is None  # no published shape
    inside = write_config(target / "assistant", {})
    found = drafter_for(name, target, "auto")
    assert found is not None and found.folder == inside
    beside = write_config(tmp_path / "drafter", {})
    found = drafter_for(name, target, "auto")
    assert found is not None and (found.kind, found.folder) == ("folder", beside)


def test_a_given_drafter_is_taken(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "mine", {})
    target = parse_name("e4b")
    for given_as in (folder, str(folder), "./mine"):
        drafter = drafter_for(target, None, given_as)
        assert drafter is not None and drafter.folder is not None and drafter.folder.samefile(folder)
    by_id = drafter_for(target, None, "org/assistant@v2")
    assert by_id is not None and (by_id.repo_id, by_id.revision) == ("org/assistant", "v2")
    by_alias = drafter_for(target, None, "e2b:8bit")
    alias = find_alias("e2b:8bit")
    assert by_alias is not None and alias is not None and by_alias.repo_id == alias.drafter
    with pytest.raises(PairError, match="the drafter cannot be loaded: there is no folder"):
        drafter_for(target, None, "./nowhere")
    with pytest.raises(PairError, match="did you mean"):
        drafter_for(target, None, "e4")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_fine_tune_gets_the_stock_drafter_of_its_size_with_a_warning(shape: str, tmp_path: Path) -> None:
    """Fault 30."""
    raw = published_target(shape)
    raw["text_config"]["max_position_embeddings"] = 8192
    folder = write_config(tmp_path / "cache", raw)
    alias = next(alias for alias in ALIASES if alias.shape == shape and alias.bits == 16)
    name = hub_name("someone/gemma-4-poet")
    assert drafter_for(name, None, "auto") is None  # its shape is not known before it is there
    drafter = drafter_for(name, folder, "auto")
    assert drafter is not None and drafter.repo_id == alias.drafter
    assert "someone/gemma-4-poet" in drafter.warnings[0] and "fewer drafts" in drafter.warnings[0]


def test_a_fine_tune_of_quantisation_aware_weights_is_known_by_its_name(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "gemma-qat-poet", published_target("12b"))
    for name in (hub_name("someone/gemma-4-12B-QAT-poet"), parse_name("./gemma-qat-poet")):
        drafter = drafter_for(name, folder, "auto")
        assert drafter is not None and drafter.repo_id == "mlx-community/gemma-4-12B-it-qat-assistant-4bit"
    elsewhere = write_config(tmp_path / "my-qat-models" / "poet", published_target("12b"))
    for name in (hub_name("my-qat-models/gemma-4-12B-poet"), parse_name("./my-qat-models/poet")):
        stock = drafter_for(name, elsewhere, "auto")
        assert stock is not None and stock.repo_id == "mlx-community/gemma-4-12B-it-assistant-bf16"


def test_other_shapes_get_no_drafter(tmp_path: Path) -> None:
    name = hub_name("someone/pruned")
    pruned = published_target("e4b")
    pruned["text_config"]["layer_types"] = pruned["text_config"]["layer_types"][6:]
    pruned["text_config"]["num_hidden_layers"] -= 6
    for raw in (pruned, published_drafter("e4b"), {"model_type": "llama"}, target_config("31b")):
        assert shape_of(raw) is None
        assert drafter_for(name, write_config(tmp_path / "x", raw), "auto") is None
    assert shape_of([]) is None and shape_of({"model_type": ["gemma4"]}) is None
    (tmp_path / "x" / "config.json").unlink()
    assert drafter_for(name, tmp_path / "x", "auto") is None


def test_every_size_is_told_from_the_others() -> None:
    assert [shape_of(published_target(shape)) for shape in SHAPES] == list(SHAPES)
    assert len(SHAPES) == len(SIZES)
