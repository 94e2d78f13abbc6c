"""The command line on a machine that a file describes: python simulated_machine.py FILE WORDS..."""

import sys
from pathlib import Path

from mlx_mtp import machine


def main() -> None:
    """Everything asks `machine` when it runs, so that replacing its answer first reaches all of it."""
    described = machine.read_machine(Path(sys.argv[1]))
    machine.this_machine = lambda: described
    sys.argv = ["mlx-mtp", *sys.argv[2:]]
    from mlx_mtp.cli import main as run

    run()


if __name__ == "__main__":
    main()
