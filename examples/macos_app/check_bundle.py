"""Whether a built app holds what MLX and mlx-mtp need, where they look for it: python check_bundle.py APP.

Looks at files only, so that it runs on any system; `selfcheck()`, which the app asks when it starts, also computes.
"""

import sys
from pathlib import Path

METAL_MAGIC = b"MTLB"  # a Metal library begins with it


def problems_of(app: Path) -> list[str]:
    """What is missing or in the wrong place, in words."""
    return [*mlx_problems(app), *our_problems(app)]


def mlx_problems(app: Path) -> list[str]:
    """One libmlx, the Metal library beside it, and the extension module where its @loader_path/lib leads there."""
    libraries = sorted(app.rglob("libmlx.dylib"))
    if len(libraries) != 1:
        where = ", ".join(str(path.relative_to(app)) for path in libraries) or "nowhere"
        return [f"libmlx.dylib must be in the bundle once, and is in {where}"]
    found = []
    library = libraries[0]
    metal = library.parent / "mlx.metallib"
    if not metal.is_file():
        found.append(f"mlx.metallib must be beside libmlx.dylib, in {library.parent.relative_to(app)}")
    elif metal.read_bytes()[:4] != METAL_MAGIC:
        found.append(f"{metal.relative_to(app)} is no Metal library")
    cores = [path for path in app.rglob("core*.so") if path.parent.name == "mlx"]
    if [path.parent / "lib" for path in cores] != [library.parent]:
        places = ", ".join(str(path.relative_to(app)) for path in cores) or "nowhere"
        found.append(
            f"mlx's core module must be in the folder above {library.parent.name}, and is in {places}"
        )
    return found


def our_problems(app: Path) -> list[str]:
    """Metal sources and the demo pair, as files: what is inside a zip cannot be opened by MLX."""
    packages = [path for path in app.rglob("mlx_mtp") if path.is_dir()]
    if len(packages) != 1:
        return [f"the folder mlx_mtp must be in the bundle once, and is there {len(packages)} times"]
    found = []
    if not any((packages[0] / "metal").glob("*.metal")):
        found.append("mlx_mtp/metal has no Metal sources")
    for part in ("target", "drafter"):
        if not (packages[0] / "demo" / part / "model.safetensors").is_file():
            found.append(f"mlx_mtp/demo/{part} has no weights")
    return found


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit('usage: python check_bundle.py "dist/MTP Chat.app"')
    found = problems_of(Path(sys.argv[1]))
    print("\n".join(found) or "the bundle is complete")
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
