"""What a bundle can lack is found, with a remedy, before a user finds it."""

import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_mtp.self_check as self_check
from mlx_mtp import SelfCheck, selfcheck
from mlx_mtp.errors import MachineError
from mlx_mtp.machine import read_machine

MAC = read_machine(sorted((Path(__file__).parent / "machines").glob("m*.json"))[0])


def problem(found: SelfCheck) -> self_check.Checked:
    (one,) = found.problems
    assert one.remedy and one.found and not found.is_right
    assert one.remedy in str(found)
    return one


def test_all_is_right_here(capfd):
    found = selfcheck(load_demo=True)
    assert found.is_right, str(found)
    assert [check.name for check in found.checks][-1] == "demo pair"
    assert all(check.remedy is None for check in found.checks)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.checks = ()  # type: ignore[misc]


def test_it_runs_first_in_a_fresh_process():
    code = "from mlx_mtp import selfcheck; found = selfcheck(); assert found.is_right, str(found)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


@pytest.mark.parametrize("error", [ImportError("no symbol"), OSError("libmlx.dylib: not loaded")])
def test_an_mlx_that_cannot_be_imported(monkeypatch, error):
    imports = importlib.import_module

    def broken(name: str):
        if name == "mlx.core":
            raise error
        return imports(name)

    monkeypatch.setattr(self_check.importlib, "import_module", broken)
    found = problem(selfcheck())
    assert found.name == "mlx" and str(error) in found.found and "collect-all mlx" in found.remedy


def test_a_package_that_a_bundler_left_out(monkeypatch):
    find = self_check.importlib.util.find_spec
    monkeypatch.setattr(
        self_check.importlib.util, "find_spec", lambda name: None if name == "jinja2" else find(name)
    )
    found = problem(selfcheck())
    assert found.name == "packages" and "jinja2" in found.found


def test_two_copies_of_libmlx(monkeypatch, tmp_path):
    loaded = self_check.loaded_libraries()
    monkeypatch.setattr(
        self_check, "loaded_libraries", lambda: [*loaded, tmp_path / "Frameworks/libmlx.dylib"]
    )
    selfcheck()
    found = problem(selfcheck())
    assert found.name == "copies of libmlx" and "2 copies" in found.found and "Frameworks" in found.found


def test_a_foreign_copy_is_found_before_a_second_one_ends_the_process(tmp_path):
    """In a process that has not imported mlx yet, and does not after that."""
    code = f"""
import sys, pathlib
import mlx_mtp.self_check as checks
checks.loaded_libraries = lambda: [pathlib.Path({str(tmp_path)!r}) / "libmlx.dylib"]
found = checks.selfcheck()
assert [check.name for check in found.problems] == ["copies of libmlx"], str(found)
assert "mlx.core" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


class TestMetalLibrary:
    """What MLX would find beside the libmlx that is loaded, on a Mac described by its file."""

    @pytest.fixture(autouse=True)
    def on_a_mac(self, monkeypatch, tmp_path):
        monkeypatch.setattr(self_check, "this_machine", lambda: MAC)
        monkeypatch.setattr(self_check, "loaded_libraries", lambda: [tmp_path / "libmlx.dylib"])

    def check(self) -> self_check.Checked:
        return self_check._checked("Metal library", self_check._metal_library)

    @pytest.mark.parametrize("place", [".", "Resources"])
    def test_is_found(self, tmp_path, place):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "mlx.metallib").write_bytes(b"MTLB and more")
        assert self.check().is_right

    def test_is_missing(self, tmp_path):
        found = self.check()
        assert not found.is_right and str(tmp_path) in found.found and "mlx/lib" in found.remedy

    def test_is_elsewhere(self, tmp_path):
        """A packager moved libmlx to the top of the bundle: the library in mlx/lib is not looked for."""
        (tmp_path / "mlx/lib").mkdir(parents=True)
        (tmp_path / "mlx/lib/mlx.metallib").write_bytes(b"MTLB")
        assert not self.check().is_right

    def test_is_something_else(self, tmp_path):
        (tmp_path / "mlx.metallib").write_bytes(b"version https://git-lfs")
        assert "no Metal library" in self.check().found

    def test_a_mac_that_computes_on_its_cpu_is_told(self, monkeypatch):
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
        found = self_check._checked("device", self_check._device)
        assert not found.is_right and "has a GPU" in found.found


def test_a_machine_without_metal(monkeypatch):
    def refuses(machine):
        raise MachineError(
            "models on a Mac need Metal, and MLX finds no Metal device here; log in to a desktop"
        )

    monkeypatch.setattr(self_check, "check_machine", refuses)
    found = problem(selfcheck())
    assert (found.name, found.remedy) == ("machine", "log in to a desktop")


def test_an_mlx_that_cannot_compute(monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("Failed to load the default metallib. library not found")

    monkeypatch.setattr(mx, "ones", fails)
    found = problem(selfcheck())
    assert found.name == "product" and "default metallib" in found.found


def test_sources_and_demo_files_that_are_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(self_check, "FOLDERS", (tmp_path / "metal",))
    assert problem(selfcheck()).name == "Metal sources"
    monkeypatch.undo()
    monkeypatch.setattr(self_check, "__file__", str(tmp_path / "self_check.py"))
    found = problem(selfcheck())
    assert found.name == "demo pair" and "config.json" in found.found


def test_what_nobody_has_thought_of_is_a_finding_too(monkeypatch):
    monkeypatch.setattr(self_check, "_sources", lambda: 1 / 0)
    assert "ZeroDivisionError" in problem(selfcheck()).found
