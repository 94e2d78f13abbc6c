"""The py2app recipe: `python setup.py py2app` makes dist/MTP Chat.app and checks it; README.md says what to install."""

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from check_bundle import problems_of
from setuptools import setup

HERE = Path(__file__).parent
STAGED = HERE / "build" / "staged"
APP = HERE / "dist" / "MTP Chat.app"
# Whole folders: with data files, libraries or modules that are only imported by name.
PACKAGES = ["mlx", "mlx_mtp", "mlx_lm", "tokenizers", "huggingface_hub", "platformdirs", "certifi", "numpy"]
# Never used here, and large: mlx-lm names them, and imports them where its own loaders run.
EXCLUDES = ["transformers", "torch", "matplotlib", "IPython", "pytest", "tkinter"]


def package_folder(name: str) -> Path:
    """Where a package is installed, without importing it."""
    spec = find_spec(name)
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    if not places:
        raise SystemExit(f"{name} is not installed; see README.md for what the build needs")
    return Path(places[0])


def check_ours(folder: Path) -> None:
    """An editable install keeps the Metal sources elsewhere, and py2app would leave them out."""
    if not any((folder / "metal").glob("*.metal")):
        raise SystemExit(f"{folder} has no metal/*.metal: install mlx-mtp from a wheel, not with -e")


def stage_mlx(installed: Path, staged: Path) -> None:
    """A copy of mlx that py2app takes for a package.

    mlx has no __init__.py, so `packages` does not find it (ImportError: No module named 'mlx'). Taken in as a lone
    extension module it would lose the folder lib beside it, where libmlx.dylib is, and MLX looks for mlx.metallib
    beside that: "Failed to load the default metallib". In one folder everything stays where the wheel has it.
    """
    target = staged / "mlx"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(installed, target, ignore=shutil.ignore_patterns("include", "share", "__pycache__"))
    (target / "__init__.py").touch()


def options() -> dict[str, object]:
    """py2app's."""
    models = (
        HERE / "models"
    )  # put a model there, models/NAME/config.json and so on, to ship it inside the app
    return {
        "packages": PACKAGES,
        "excludes": EXCLUDES,
        "includes": ["PyObjCTools.AppHelper"],
        "resources": [str(models)] if models.is_dir() else [],
        "plist": {
            "CFBundleName": "MTP Chat",
            "CFBundleIdentifier": "org.example.mtp-chat",
            "LSMinimumSystemVersion": "14.0",
            "LSArchitecturePriority": ["arm64"],
            "NSHighResolutionCapable": True,
            "NSSupportsAutomaticTermination": False,
        },
    }


def main() -> None:
    check_ours(package_folder("mlx_mtp"))
    stage_mlx(package_folder("mlx"), STAGED)
    sys.path.insert(0, str(STAGED))
    setup(name="MTP Chat", app=["app.py"], options={"py2app": options()})
    if APP.is_dir():
        found = problems_of(APP)
        if found:
            raise SystemExit("\n".join(["the bundle is not complete:", *found]))


if __name__ == "__main__":
    main()
