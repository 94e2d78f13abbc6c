"""Small operations of every kind to be tested and raced, and broken kernels."""

from dataclasses import replace

from mlx_mtp.kernels.families import FAMILIES, Family, key_of
from mlx_mtp.kernels.operations import Operation, Subject, operations_of
from mlx_mtp.kernels.race import Raced, Time
from mlx_mtp.kernels.results import Outcome
from mlx_mtp.kernels.self_test import Checked
from mlx_mtp.kernels.specimens import Description
from mlx_mtp.pair import Pair

SIZES = (2, 5)  # rows
RIGHT = Checked(("scalar", "matrix"), "right", are_equal=True)
SCALAR, UNEQUAL = Checked(("scalar",), "right"), replace(RIGHT, are_equal=False)
WRONG = Checked((), "1 row: 3 of 9 values are wrong")
PLACE = Operation("project", (2816, 2112), "4-bit affine, groups of 64, bfloat16")
OTHER = Operation("attend", (8, 1, 512, 0), "K/V, bfloat16")
FORMS: dict[str, Description] = {
    "4-bit": {"shape": [72, 704], "bits": 4, "group_size": 64, "mode": "affine", "scales": "bfloat16"},
    "nvfp4": {"shape": [72, 96], "bits": 4, "group_size": 16, "mode": "nvfp4", "scales": "uint8"},
    "dense": {"shape": [72, 96]},
}
for _form in FORMS.values():
    _form["dtype"] = "bfloat16"


def by_name(pair: Pair) -> dict[str, tuple[Operation, Subject]]:
    """The first operation of each kind."""
    found: dict[str, tuple[Operation, Subject]] = {}
    for operation, subject in operations_of(pair.target, pair.drafter).items():
        found.setdefault(operation.name, (operation, subject))
    return found


def clustered() -> Description:
    return {
        "centroids": {**FORMS["4-bit"], "shape": [32, 128]},
        "members": [32, 8],
        "top_k": 8,
        "table": {**FORMS["4-bit"], "shape": [256, 128]},
        "dtype": "bfloat16",
    }


def family(name: str, subject: Subject) -> Family:
    return FAMILIES[key_of(name, subject)]


def raced(**times: list[float]) -> Raced:
    """Microseconds of each arm at 1, 4 and 8 rows; nothing scatters."""
    return Raced(
        {
            rows: {arm: Time(own[i], 0.01) for arm, own in times.items()}
            for i, rows in enumerate((1, 4, 8)[: len(next(iter(times.values())))])
        }
    )


def outcome(operation: Operation, tested: Checked = RIGHT, ours: float = 50.0) -> Outcome:
    """Raced at 1, 4 and 8 rows against stock operations that take 100."""
    times = raced(stock=[100.0] * 3, **{body: [ours] * 3 for body in tested.bodies})
    return Outcome(operation, tested, times if tested.passed else None)
