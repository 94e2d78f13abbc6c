"""Machines, packages and homes that do not suit, as a person meets them: through `load` and the command line."""

import os
from importlib import metadata
from pathlib import Path
from unittest import mock

import pytest

from cli_runs import environment, one_line, run_cli, run_main, write_chat_pair
from mlx_mtp import load, machine, store, versions
from mlx_mtp import pair as pair_module
from mlx_mtp.errors import MachineError
from mlx_mtp.machine import read_machine

MACHINES = Path(__file__).parent / "machines"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with `target` and, beside it, `drafter`."""
    write_chat_pair(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "why"), [("rosetta", "translated by Rosetta"), ("macos_vm", "this virtual machine")]
)
def test_a_mac_without_metal(folder: Path, name: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 65: refused with the reason before a file is opened."""
    there = read_machine(MACHINES / f"{name}.json")
    for module in (machine, pair_module):
        monkeypatch.setattr(module, "this_machine", lambda: there)
    with pytest.raises(MachineError, match=why) as caught:
        load(folder / "nowhere")
    assert caught.value.exit_code == 3 and "; " in str(caught.value)
    for words in (("generate", folder / "nowhere", "Hi"), ("chat", "demo"), ("chat",)):
        run = run_main(*words)
        assert run.returncode == 3 and why in one_line(run.stderr)


def with_version(monkeypatch: pytest.MonkeyPatch, package: str, version: str | None) -> None:
    def version_of(name: str) -> str:
        if name != package:
            return real(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    real = metadata.version
    monkeypatch.setattr(versions.metadata, "version", version_of)


@pytest.mark.parametrize(
    ("package", "version"),
    [("mlx", "0.32.0"), ("mlx", "0.9"), ("jinja2", "3.1.5"), ("numpy", "1.25.9"), ("safetensors", "0.4.99")],
)
def test_a_package_too_old(folder: Path, package: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 66: said before a file is opened, with the command that helps."""
    with_version(monkeypatch, package, version)
    with pytest.raises(
        MachineError, match=rf"got {version}; run: pip install --upgrade '{package}>="
    ) as caught:
        load(folder / "nowhere")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("version", ["0.33.0", "0.33.0.dev20270101+abc", "1.0"])
def test_arithmetic_newer_than_tested(folder: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_version(monkeypatch, "mlx", version)
    (warning,) = load(folder / "target").warnings
    assert (
        f"mlx {version} is newer than the 0.32 that was tested" in warning
        and "pip install 'mlx==0.32.*'" in warning
    )


def test_a_package_that_says_no_version_is_left_to_itself(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Applications' bundles leave the metadata out; `doctor` shows it, `load` goes on."""
    with_version(monkeypatch, "mlx", None)
    assert load(folder / "target").warnings == ()
    (found,) = versions.find_versions(["mlx"])
    assert not found.works and "is not installed" in str(found.trouble)
    with_version(monkeypatch, "jinja2", "unknown")
    assert versions.check_versions() == ()


def test_every_minimum_is_that_of_the_package() -> None:
    needed = (Path(versions.__file__).parent.parent / "pyproject.toml").read_text()
    for tested in versions.TESTED:
        at_least = ".".join(map(str, tested.minimum))
        assert any(f'"{tested.package}{extra}>={at_least}' in needed for extra in ("", "[cpu]")), (
            tested.package
        )


@pytest.mark.parametrize("place", ["missing", "a file"])
def test_a_home_that_cannot_be_written(folder: Path, place: str) -> None:
    """Fault 72: a conversation all the same, with one warning."""
    home = folder / "home" / "none"
    if place == "a file":
        home.parent.write_text("")
    else:
        home.parent.symlink_to(folder / "gone" / "gone")
    run = run_cli(
        "chat", folder / "target", "--max-tokens", "3", "--seed", "1", stdin=b"Hi\n", HOME=str(home)
    )
    said = run.stderr.decode()
    assert run.returncode == 0 and "Traceback" not in said
    assert said.count("not kept for the next run") == 1 and said.count("tok/s") == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"mlx_mtp": 99, "key": null, "value": "demo"}'])
def test_a_damaged_record_of_the_model_used_last(folder: Path, content: bytes) -> None:
    """Fault 75: said, kept aside, and asked as if there were none."""
    variables = {"HOME": str(folder), "HF_HOME": str(folder / "hub")}
    with mock.patch.dict(os.environ, environment(**variables), clear=True):
        path = store.make_folder(store.data_folder()) / store.LAST_MODEL
    path.write_bytes(content)
    run = run_main("chat", **variables)
    said = run.stderr.decode()
    assert run.returncode == 2 and "Traceback" not in said and "no model was named" in said
    assert said.count("kept aside as last-model.json.corrupt") == 1
    assert path.with_name("last-model.json.corrupt").read_bytes() == content
    assert b"kept aside" not in run_main("chat", **variables).stderr
