"""Which versions of the packages below us were tested: too old is refused, newer than tested is said."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata

from mlx_mtp.errors import MachineError

Release = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tested:
    """One package: the first release that works, and the series of the newest release our tests have run with."""

    package: str
    minimum: Release  # as in pyproject.toml
    newest: Release  # a prefix: (0, 32) stands for every 0.32.x
    is_arithmetic: bool = False  # a newer release may compute otherwise


TESTED = (
    Tested("mlx", (0, 32, 1), (0, 32), is_arithmetic=True),
    Tested("mlx-lm", (0, 31), (0, 32)),
    Tested("tokenizers", (0, 21), (0, 23)),
    Tested("safetensors", (0, 5), (0, 8)),
    Tested("huggingface_hub", (1, 0), (2,)),
    Tested("jinja2", (3, 1, 6), (3, 1)),
    Tested("numpy", (1, 26), (2,)),
)
RUNNING = ("mlx", "tokenizers", "safetensors", "jinja2", "numpy")  # what a model that is on disk needs
EVERYTHING = tuple(tested.package for tested in TESTED)


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of one package: its version (None: not installed) and what is wrong with it, if anything."""

    tested: Tested
    version: str | None
    trouble: str | None
    works: bool


def check_versions(packages: Sequence[str] = RUNNING) -> tuple[str, ...]:
    """Raise MachineError where a package is too old; -> warnings of arithmetic newer than was tested."""
    findings = find_versions(packages)
    for finding in findings:
        # Without a version it may still be there: an application's bundle often leaves the metadata out.
        if finding.version is not None and not finding.works:
            raise MachineError(str(finding.trouble))
    return tuple(
        finding.trouble
        for finding in findings
        if finding.trouble is not None and finding.works and finding.tested.is_arithmetic
    )


def find_versions(
    packages: Sequence[str] = EVERYTHING, version_of: Callable[[str], str] | None = None
) -> tuple[Finding, ...]:
    """One finding for each of `packages`, in the order of `TESTED`; `version_of` instead of the installed."""
    ask = version_of or metadata.version
    return tuple(_find(tested, ask) for tested in TESTED if tested.package in packages)


def release_of(version: str) -> Release | None:
    """The leading numbers of a version: "0.33.0.dev1+cpu" -> (0, 33, 0); None where it begins with none."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else None


def _find(tested: Tested, version_of: Callable[[str], str]) -> Finding:
    name, at_least = tested.package, _text(tested.minimum)
    upgrade = f"run: pip install --upgrade '{name}>={at_least}'"
    try:
        version = version_of(name)
    except metadata.PackageNotFoundError:
        return Finding(
            tested, None, f"{name} {at_least} or later is needed, and is not installed; {upgrade}", False
        )
    release = release_of(version)
    if release is None:
        return Finding(
            tested, version, f"{name} has a version that says nothing, {version!r}; {upgrade}", True
        )
    if _padded(release) < _padded(tested.minimum):
        return Finding(
            tested, version, f"{name} {at_least} or later is needed, got {version}; {upgrade}", False
        )
    if release[: len(tested.newest)] > tested.newest:
        trouble = (
            f"{name} {version} is newer than the {_text(tested.newest)} that was tested; if replies look wrong, "
            f"run: pip install '{name}=={_text(tested.newest)}.*'"
        )
        return Finding(tested, version, trouble, True)
    return Finding(tested, version, None, True)


def _padded(release: Release) -> Release:
    return (*release, 0, 0, 0)[:3]


def _text(release: Release) -> str:
    return ".".join(map(str, release))
