"""Make the environments of the peers that peers.py compares with, one folder each, from PyPI only.

    python bench/make_peer_env.py PEERS                        # all three, each in a folder of its name in PEERS
    python bench/make_peer_env.py PEERS mlx-lm mlx-vlm         # without torch, which is by far the largest

Each peer has its own environment, so that none decides which MLX or transformers another one runs with. On Linux torch
comes with its CUDA libraries unless a package index for CPU wheels is configured: allow 6 GB.
"""

import argparse
import platform
import subprocess
import sys
import venv
from pathlib import Path

MLX = "mlx" if platform.system() == "Darwin" else "mlx[cpu]"
REQUIREMENTS = {
    "mlx-lm": (MLX, "mlx-lm>=0.31", "numpy"),
    "mlx-vlm": (MLX, "mlx-vlm==0.7.*", "numpy"),
    "transformers": ("transformers>=5.5", "torch", "numpy"),
}


def python_of(peers: Path, peer: str) -> Path:
    """The interpreter of one peer's environment, made by this script or by hand."""
    return peers / peer / "bin" / "python"


def make(peers: Path, peer: str) -> None:
    """Make one environment, or bring an existing one up to date."""
    if not python_of(peers, peer).exists():
        venv.create(peers / peer, with_pip=True)
    command = [str(python_of(peers, peer)), "-m", "pip", "install", "--quiet", *REQUIREMENTS[peer]]
    if subprocess.run(command).returncode:
        sys.exit(f"{peer}: pip could not install {' '.join(REQUIREMENTS[peer])}; its message stands above")
    print(f"{peer}: {python_of(peers, peer)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peers", type=Path, help="folder to hold the environments")
    parser.add_argument("only", nargs="*", metavar="PEER", help=f"of {', '.join(REQUIREMENTS)}; all if none")
    args = parser.parse_args()
    if unknown := set(args.only) - set(REQUIREMENTS):
        parser.error(f"unknown peer {', '.join(sorted(unknown))}; known are {', '.join(REQUIREMENTS)}")
    for peer in args.only or REQUIREMENTS:
        make(args.peers, peer)


if __name__ == "__main__":
    main()
