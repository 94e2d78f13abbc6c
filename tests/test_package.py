"""Importing the package is cheap and quiet, and its public names are what they say."""

import pkgutil
import resource
import subprocess
import sys
from types import FunctionType

import pytest

import mlx_mtp


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_importing_the_package_loads_no_heavy_module():
    loaded = run_python("import sys, mlx_mtp; print(*sys.modules)").split()
    for heavy in ("mlx.core", "mlx_lm", "transformers", "numpy", "rich", "typer", "jinja2"):
        assert heavy not in loaded


def test_the_command_line_starts_without_mlx_or_rich():
    loaded = run_python("import sys, mlx_mtp.cli; print(*sys.modules)").split()
    for heavy in ("mlx.core", "mlx_lm", "transformers", "numpy", "rich", "prompt_toolkit"):
        assert heavy not in loaded


def test_version_costs_less_than_300_ms():
    """Processor time, so that a busy machine does not decide."""
    command = [sys.executable, "-c", "from mlx_mtp.cli import main; main()", "--version"]

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, f"mlx-mtp {mlx_mtp.__version__}\n")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) < 0.3


def test_the_package_is_the_command_too():
    command = [sys.executable, "-m", "mlx_mtp", "chat", "--no-such-option"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (
        done.returncode == 2 and "python -m mlx_mtp chat" in done.stderr and "--no-such-option" in done.stderr
    )


@pytest.mark.parametrize("name", [name for name in mlx_mtp.__all__ if name != "__version__"])
def test_every_public_name_is_a_function_or_class(name: str):
    assert isinstance(vars(mlx_mtp).get(name) or mlx_mtp.__getattr__(name), FunctionType | type)


def test_no_submodule_can_take_the_place_of_a_public_name():
    """Importing `mlx_mtp.x` sets the package's attribute x, so no public name may be a file's name."""
    modules = {module.name for module in pkgutil.iter_modules(mlx_mtp.__path__)}
    assert "api" in modules
    assert not modules & set(mlx_mtp.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Engine2'"):
        mlx_mtp.Engine2  # noqa: B018
    with pytest.raises(ImportError):
        from mlx_mtp import Engine2  # noqa: F401


def test_using_the_library_leaves_the_process_as_it_was():
    code = """
import os, resource, signal
before = resource.getrlimit(resource.RLIMIT_NOFILE), dict(os.environ), signal.getsignal(signal.SIGINT)
import mlx_mtp
mlx_mtp.load, mlx_mtp.generate, mlx_mtp.stream_generate, mlx_mtp.Sampling
after = resource.getrlimit(resource.RLIMIT_NOFILE), dict(os.environ), signal.getsignal(signal.SIGINT)
print(before == after)
"""
    assert run_python(code) == "True\n"
