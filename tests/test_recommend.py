"""The model for a machine: as the tiers say, and never one that admission would then refuse."""

from dataclasses import replace
from pathlib import Path

import pytest

from mlx_mtp.admission import GIB, admit_model, budget_bytes
from mlx_mtp.aliases import ALIASES, find_alias
from mlx_mtp.errors import MachineError, MemoryRefusal
from mlx_mtp.machine import Machine, check_machine, read_machine
from mlx_mtp.memory import estimate_memory
from mlx_mtp.recommend import CONTEXT, TIERS, estimate_on, instead_of, recommend

MACHINES = Path(__file__).parent / "machines"
# Apple's memory sizes, and what the issue asks for at 16, 32 and 64 GB and more.
EXPECTED = {
    8: "e2b:4bit",
    16: "e4b:4bit",
    18: "e4b:4bit",
    24: "12b:4bit",
    32: "26b:4bit",
    36: "26b:4bit",
    48: "26b:4bit",
    64: "31b:4bit",
    96: "31b:8bit",
    128: "31b:8bit",
    192: "31b:8bit",
    512: "31b:8bit",
}


def mac(memory: float, *, metal_share: float | None = None) -> Machine:
    """A Mac with so many GB, of which Metal recommends two thirds up to 36 GB and three quarters above, or as given."""
    share = metal_share or (2 / 3 if memory <= 36 else 3 / 4)
    return Machine(
        system="Darwin",
        arch="arm64",
        os_version="15.5",
        chip="Apple M2",
        gpu_cores=10,
        memory_bytes=int(memory * GIB),
        gpu_budget_bytes=int(memory * GIB * share),
        has_metal=True,
        is_translated=False,
        is_virtual=False,
    )


def linux(memory: float) -> Machine:
    without = {"gpu_cores": None, "gpu_budget_bytes": None, "has_metal": False}
    return replace(mac(memory), system="Linux", arch="x86_64", chip="AMD EPYC", **without)


@pytest.mark.parametrize(("memory", "name"), EXPECTED.items())
@pytest.mark.parametrize("make", [mac, linux])
def test_each_size_of_memory_has_its_model(memory: int, name: str, make: type[Machine]) -> None:
    assert recommend(make(memory)).alias.name == name


@pytest.mark.parametrize("memory", EXPECTED)
@pytest.mark.parametrize("make", [mac, linux])
def test_what_is_recommended_is_admitted_and_so_are_the_alternatives(
    memory: int, make: type[Machine]
) -> None:
    machine = make(memory)
    choice = recommend(machine)
    assert choice.estimate.total <= budget_bytes(machine)
    dtype = None if machine.has_metal else "float32"
    for alias in (choice.alias, *choice.alternatives):
        for context in (4096, CONTEXT):
            estimate = estimate_memory(alias.name, context, dtype=dtype)
            admit_model(estimate, machine, free=None, name=alias.name, context=context)
    assert choice.alias not in choice.alternatives
    left_out = [
        alias for alias in ALIASES if alias.bits == 4 and alias not in (choice.alias, *choice.alternatives)
    ]
    assert all(estimate_on(machine, alias).total > budget_bytes(machine) for alias in left_out)


@pytest.mark.parametrize("path", sorted(MACHINES.glob("*.json")), ids=lambda path: path.stem)
def test_described_machines_get_a_model_that_they_admit(path: Path) -> None:
    machine = read_machine(path)
    if machine.system == "Darwin" and not machine.has_metal:
        with pytest.raises(MachineError):  # refused before anybody asks which model
            check_machine(machine)
        return
    choice = recommend(machine)
    admit_model(choice.estimate, machine, free=None, name=choice.alias.name, context=choice.context)


def test_26b_on_16_gb_is_refused_with_the_alternative_named() -> None:
    machine = mac(16)
    with pytest.raises(MemoryRefusal) as refusal:
        admit_model(estimate_memory("26b:4bit"), machine, free=None, name="26b:4bit", context=4096)
    text = str(refusal.value)
    assert "26b:4bit needs 15." in text and "models may take 8.0 GB of this machine's 16.0 GB" in text
    assert "use e4b:4bit, which needs 6." in text


def test_the_reason_says_what_it_takes_and_of_how_much() -> None:
    choice = recommend(mac(32))
    assert "4B" in choice.reason and "8,192 tokens" in choice.reason
    assert f"{choice.estimate.total / GIB:.1f} GB" in choice.reason
    assert "20.8 GB of this machine's 32.0 GB" in choice.reason
    assert "CPU" not in choice.reason
    assert "There is no Metal here: it runs on the CPU" in recommend(linux(32)).reason


def test_what_metal_allows_counts_more_than_what_is_installed() -> None:
    """A tier that does not fit falls to the next one down."""
    assert recommend(mac(64, metal_share=0.4)).alias.name == "26b:4bit"
    assert recommend(mac(32, metal_share=0.4)).alias.name == "12b:4bit"
    assert recommend(mac(16, metal_share=0.3)).alias.name == "e2b:4bit"


def test_memory_that_is_told_a_little_short_is_that_of_the_tier() -> None:
    assert recommend(linux(31.2)).alias.name == "26b:4bit"
    assert recommend(linux(23.5)).alias.name == "12b:4bit"
    assert recommend(linux(28)).alias.name == "12b:4bit"


def test_where_little_fits_the_smallest_model_gets_a_smaller_context() -> None:
    machine = mac(16, metal_share=estimate_memory("e2b:4bit", 4096).total / (16 * GIB) + 0.0005)
    choice = recommend(machine)
    assert (choice.alias.name, choice.context, choice.alternatives) == ("e2b:4bit", 4096, ())
    assert "4,096 tokens" in choice.reason


def test_where_nothing_fits_it_says_so() -> None:
    with pytest.raises(MemoryRefusal, match=r"the smallest model, e2b:4bit, needs 3\.\d GB .* demo"):
        recommend(mac(4))
    with pytest.raises(MemoryRefusal, match="e2b:4bit needs") as refusal:
        admit_model(estimate_memory("e2b:4bit"), mac(4), free=None, name="e2b:4bit", context=4096)
    assert "use a machine with more memory" in str(refusal.value)


def test_tiers_name_aliases_from_the_most_memory_down() -> None:
    assert [least for least, _ in TIERS] == sorted((least for least, _ in TIERS), reverse=True)
    assert TIERS[-1][0] == 0
    assert all(find_alias(name) in ALIASES for _, name in TIERS)


@pytest.mark.parametrize(
    ("refused", "memory", "room", "instead"),
    [
        ("26b", 16, 8, "e4b:4bit"),
        ("26b:bf16", 64, 41, "31b:4bit"),
        ("31b", 64, 20, "26b:4bit"),  # live memory is short
        ("e4b", 16, 5, "e2b:4bit"),
        ("mlx-community/gemma-4-E4B-it-qat-4bit", 16, 8, "e2b:4bit"),  # the same model by its id
        ("someone/large", 32, 20, "26b:4bit"),
        ("e2b", 8, 3, None),
        ("e2b", 4, 3, None),
    ],
)
def test_a_refusal_names_another_model_that_fits(
    refused: str, memory: int, room: int, instead: str | None
) -> None:
    found = instead_of(refused, mac(memory), room * GIB)
    assert (found and found[0].name) == instead
    assert found is None or found[1].total <= room * GIB
