"""`python -m mlx_mtp` is the command `mlx-mtp`."""

from mlx_mtp.cli import main

if __name__ == "__main__":
    main()
