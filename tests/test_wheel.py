"""The wheel holds everything the program reads, and works from a folder that is not this checkout."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LARGEST_WHEEL = 25 * 2**20


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the sources with this environment's setuptools: no network, nothing left."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in ("mlx_mtp", "metal"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=300)
    [built] = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def files_under(folder: Path, pattern: str = "*") -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob(pattern) if path.is_file()}


def test_every_module_is_listed_and_typed(names):
    modules = {f"mlx_mtp/{name}" for name in files_under(ROOT / "mlx_mtp", "*.py")}
    assert modules <= names
    assert "mlx_mtp/py.typed" in names


def test_metal_sources_are_inside_and_nowhere_else(names):
    sources = files_under(ROOT / "metal", "*.metal") | {"README.md"}
    assert {f"mlx_mtp/metal/{name}" for name in sources} <= names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mlx_mtp"}


def test_the_demo_pair_is_inside_and_small(wheel, names):
    for part in ("target", "drafter"):
        present = files_under(ROOT / "mlx_mtp" / "demo" / part)
        assert {"config.json", "model.safetensors"} <= present
        assert {f"mlx_mtp/demo/{part}/{name}" for name in present} <= names
    assert "mlx_mtp/demo/target/tokenizer.json" in names
    assert wheel.stat().st_size <= LARGEST_WHEEL


def test_the_prompts_of_the_bench_are_inside(names):
    prompts = files_under(ROOT / "mlx_mtp" / "measure" / "prompts")
    assert len(prompts) == 10
    assert {f"mlx_mtp/measure/prompts/{name}" for name in prompts} <= names


def test_licence_and_command_are_declared(wheel):
    with zipfile.ZipFile(wheel) as archive:
        [info] = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(f"{info}/METADATA").decode()
        assert "License-Expression: Apache-2.0" in metadata
        assert b"mlx-mtp = mlx_mtp.cli:main" in archive.read(f"{info}/entry_points.txt")
        assert b"TERMS AND CONDITIONS" in archive.read(f"{info}/licenses/LICENSE")


def test_installed_wheel_answers_from_another_folder(wheel, tmp_path):
    """Unpacked first on the path and run elsewhere: resources are read from the wheel's own copy."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    metal_files = sorted(files_under(ROOT / "metal", "*.metal"))
    assert metal_files
    code = f"""
import sys
sys.path.insert(0, {str(site)!r})
from importlib.resources import files
import mlx_mtp
assert mlx_mtp.__file__.startswith({str(site)!r}), mlx_mtp.__file__
assert "Metal" in (files("mlx_mtp.metal") / "README.md").read_text()
from mlx_mtp.kernels.source import metal_source
for file in {metal_files!r}:
    assert metal_source(file), file
pair = mlx_mtp.load("demo")
assert pair.kernel_table and all(row.reason for row in pair.kernel_table)
print(mlx_mtp.generate(pair, "def add(a, b):", max_tokens=4).tokens)
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split(",")) == 4


@pytest.mark.slow
def test_wheel_installs_into_a_fresh_environment(wheel, tmp_path):
    """Every dependency from the package index, then the command itself from an empty folder."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    command = tmp_path / "venv" / "bin"
    subprocess.run([command / "python", "-m", "pip", "install", "-q", wheel], check=True, timeout=900)
    done = subprocess.run(
        [command / "mlx-mtp", "generate", "demo", "What is MLX?", "--max-tokens", "8"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
