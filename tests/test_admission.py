"""Models and prompts that do not fit are refused with what they need, what there is, and what to do instead."""

import re
from pathlib import Path

import pytest

from mlx_mtp.admission import GIB, admit_model, admit_prefill, budget_bytes
from mlx_mtp.errors import MemoryRefusal
from mlx_mtp.machine import Machine, read_machine
from mlx_mtp.memory import MemoryEstimate, estimate_memory

MACHINES = Path(__file__).parent / "machines"
MACS_WITH_METAL = [
    path.stem for path in sorted(MACHINES.glob("*.json")) if read_machine(path).gpu_budget_bytes is not None
]


def machine(name: str) -> Machine:
    return read_machine(MACHINES / f"{name}.json")


def admit(alias: str, where: str, *, context: int = 4096, free: int | None = None) -> None:
    admit_model(
        estimate_memory(alias, context),
        machine(where),
        free=free,
        name=alias,
        context=context,
        estimate_at=lambda smaller: estimate_memory(alias, smaller),
    )


def refusal(alias: str, where: str, **options) -> str:
    with pytest.raises(MemoryRefusal) as caught:
        admit(alias, where, **options)
    assert (caught.value.code, caught.value.exit_code) == ("memory", 4)
    return str(caught.value)


@pytest.mark.parametrize("name", MACS_WITH_METAL)
def test_macs_keep_a_reserve(name):
    mac = machine(name)
    assert mac.gpu_budget_bytes is not None
    left = mac.memory_bytes - budget_bytes(mac)
    assert left >= min(8 * GIB, mac.memory_bytes // 2)
    assert left >= min(int(0.35 * mac.memory_bytes), 40 * GIB, mac.memory_bytes // 2)
    assert 0 < budget_bytes(mac) <= mac.gpu_budget_bytes


def test_a_small_metal_budget_is_kept_to():
    """`iogpu.wired_limit_mb` can be set below what the reserve leaves."""
    small = Machine("Darwin", "arm64", "15.5", "Apple M2 Max", 30, 32 * GIB, 4 * GIB, True, False, False)
    assert budget_bytes(small) == 4 * GIB


@pytest.mark.parametrize(
    "alias, where",
    [
        ("e2b:4bit", "m1_8"),
        ("e4b:4bit", "m1_16"),
        ("e4b:4bit", "m2_16"),
        ("26b:4bit", "m2_max_32"),
        ("31b:4bit", "m4_max_64"),
        ("31b:8bit", "m4_max_128"),
        ("31b:bf16", "m4_max_128"),
    ],
)
def test_what_is_promised_for_a_memory_size_is_admitted(alias, where):
    admit(alias, where)


@pytest.mark.parametrize(
    "alias, where, instead",
    [
        ("26b:4bit", "m2_16", "e4b:4bit"),
        ("31b:4bit", "m2_max_32", "26b:4bit"),
        ("31b:bf16", "m4_max_64", "31b:4bit"),
    ],
)
def test_a_refusal_before_a_download_names_the_figures_and_the_alternative(alias, where, instead):
    said = refusal(alias, where)
    needed = estimate_memory(alias, 4096).total / GIB
    assert said.startswith(
        f"{alias} needs {needed:.1f} GB at a context of 4,096 tokens, and models may take "
    )
    assert f"{budget_bytes(machine(where)) / GIB:.1f} GB of this machine's" in said
    assert f"use {instead}, which needs" in said and "max_context" not in said and "close" not in said
    admit(instead, where)


def test_the_context_that_a_refusal_names_fits_and_the_next_does_not():
    said = refusal("e4b:4bit", "m2_16", context=131_072)
    named = re.search(r"load it with max_context=(\d+)", said)
    assert named is not None, said
    admit("e4b:4bit", "m2_16", context=int(named[1]))
    refusal("e4b:4bit", "m2_16", context=2 * int(named[1]))


def test_the_model_itself_is_no_alternative():
    assert "use e4b:4bit" not in refusal("e4b:4bit", "m2_16", context=131_072)


def test_live_memory_refuses_what_the_machine_could_hold():
    total = estimate_memory("e4b:4bit", 4096).total
    admit("e4b:4bit", "m2_16", free=total)
    said = refusal("e4b:4bit", "m2_16", free=total - 1)
    assert f"and {(total - 1) / GIB:.1f} GB can be taken now" in said
    assert "close other programs" in said and "models may take" not in said


def test_live_alternatives_fit_into_what_is_free():
    """The recommended model is for the machine; it is named only if it also fits now."""
    small = estimate_memory("26b:4bit", 8192).total
    assert "use 26b:4bit" in refusal("31b:4bit", "m2_max_32", free=small)
    assert "use 26b:4bit" not in refusal("31b:4bit", "m2_max_32", free=small - 1)


def test_the_reserve_counts_though_more_is_free():
    assert "models may take" in refusal("26b:4bit", "m2_16", free=16 * GIB)


def test_a_machine_for_which_nothing_fits():
    tiny = Machine("Darwin", "arm64", "15.5", "Apple M1", 7, 2 * GIB, GIB, True, False, False)
    estimate = estimate_memory("e2b:4bit", 4096)
    with pytest.raises(MemoryRefusal, match=r"use a machine with more memory$"):
        admit_model(estimate, tiny, free=None, name="e2b:4bit", context=4096)


def test_exactly_the_budget_is_admitted():
    def taking(total: int) -> MemoryEstimate:
        return MemoryEstimate(total, 0, 0, 0, 0, 0, 0)

    budget = budget_bytes(machine("m2_16"))
    admit_model(taking(budget), machine("m2_16"), free=None, name="x", context=1024)
    with pytest.raises(MemoryRefusal):
        admit_model(taking(budget + 1), machine("m2_16"), free=None, name="x", context=1024)


def test_prompts_that_do_not_fit():
    admit_prefill(GIB, GIB)
    with pytest.raises(MemoryRefusal, match=r"needs 1\.5 GB more, and 1\.0 GB .* lower max_tokens$"):
        admit_prefill(3 * GIB // 2, GIB)
