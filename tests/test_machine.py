"""What a machine is and how much memory it has free, from text in the form that macOS and Linux print."""

import json
import platform
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_mtp import machine, machine_linux, machine_macos
from mlx_mtp.errors import MachineError
from mlx_mtp.machine import Machine, check_machine, free_bytes, pressure_level, read_machine, this_machine

MACHINES = Path(__file__).parent / "machines"
GIB, MIB = 2**30, 2**20

SYSCTL_MAC = """\
hw.memsize: 34359738368
machdep.cpu.brand_string: Apple M2 Pro
kern.hv_vmm_present: 0
sysctl.proc_translated: 0
"""
SYSCTL_OLDER = "hw.memsize: 8589934592\nmachdep.cpu.brand_string: Apple M1\nkern.hv_vmm_present: 0\n"
SYSCTL_VM = """\
hw.memsize: 7516192768
machdep.cpu.brand_string: Apple M1 (Virtual)
kern.hv_vmm_present: 1
sysctl.proc_translated: 0
"""
SYSCTL_ROSETTA = """\
hw.memsize: 17179869184
machdep.cpu.brand_string: VirtualApple @ 2.50GHz
kern.hv_vmm_present: 0
sysctl.proc_translated: 1
"""
IOREG = """\
+-o AGXAcceleratorG14X  <class AGXAcceleratorG14X, id 0x100000563, registered, matched, active, busy 0>
    {
      "IOClass" = "AGXAcceleratorG14X"
      "MetalPluginName" = "AGXMetalG14X"
      "gpu-core-count" = 19
      "model" = "Apple M2 Pro"
    }
"""
VM_STAT = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10000.
Pages active:                            600000.
Pages inactive:                          590000.
Pages speculative:                         5000.
Pages throttled:                              0.
Pages wired down:                        150000.
Pages purgeable:                           2000.
"Translation faults":                 987654321.
Pages copy-on-write:                   12345678.
Pages zero filled:                    456789012.
Pages reactivated:                      3456789.
Pages purged:                            456789.
File-backed pages:                       300000.
Anonymous pages:                         895000.
Pages stored in compressor:              700000.
Pages occupied by compressor:            200000.
Decompressions:                         9876543.
Compressions:                          12345678.
Pageins:                               23456789.
Pageouts:                                 56789.
Swapins:                                      0.
Swapouts:                                     0.
"""


def described(name: str) -> Machine:
    return read_machine(MACHINES / f"{name}.json")


def test_sysctl_and_ioreg_of_a_mac() -> None:
    facts = machine_macos.parse_facts(SYSCTL_MAC, IOREG)
    assert facts == ("Apple M2 Pro", 19, 32 * GIB, False, False)
    # Macs without the translation or virtualisation names, and no GPU in the registry
    assert machine_macos.parse_facts(SYSCTL_OLDER, "") == ("Apple M1", None, 8 * GIB, False, False)
    assert machine_macos.parse_facts(SYSCTL_VM, "").is_virtual
    assert machine_macos.parse_facts(SYSCTL_ROSETTA, "").is_translated
    with pytest.raises(MachineError, match="memsize"):
        machine_macos.parse_facts("", IOREG)


def test_vm_stat_counts_what_others_can_give_back() -> None:
    assert machine_macos.parse_vm_stat(VM_STAT) == (10_000 + 300_000 + 2_000) * 16_384
    assert machine_macos.parse_vm_stat(VM_STAT.replace("16384", "4096")) == 312_000 * 4096
    for cut in ("", VM_STAT.replace("page size of", ""), VM_STAT.replace("File-backed pages", "Other")):
        with pytest.raises(MachineError, match="vm_stat"):
            machine_macos.parse_vm_stat(cut)


def test_footprint_is_the_eighth_number_of_rusage_info_v0() -> None:
    numbers = [10, 20, 30, 40, 50, 60, 70, 123 * MIB, 90, 100]
    assert machine_macos.parse_rusage(struct.pack("=16s10Q", b"\xff" * 16, *numbers)) == 123 * MIB
    assert machine_macos.RUSAGE_FORMAT.size == 96


def test_pressure_words_of_macos() -> None:
    assert [machine_macos.level_of(n) for n in (1, 2, 4)] == ["normal", "warning", "critical"]
    assert machine_macos.level_of(3) == machine_macos.level_of(9) == "critical"


def on_a_mac(monkeypatch: pytest.MonkeyPatch, arch: str, sysctl: str, budget: int | None) -> Machine:
    """`this_machine` where the system's answers are these."""

    def metal() -> int | None:
        assert arch == "arm64", "MLX cannot be imported by an Intel Python"
        return budget

    monkeypatch.setattr(machine.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(machine.platform, "machine", lambda: arch)
    monkeypatch.setattr(machine.platform, "mac_ver", lambda: ("15.5", ("", "", ""), arch))
    monkeypatch.setattr(machine_macos, "metal_budget", metal)
    monkeypatch.setattr(
        machine_macos, "run_text", lambda command, *rest: IOREG if command.endswith("ioreg") else sysctl
    )
    return this_machine.__wrapped__()


def test_a_mac_is_put_together_from_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = on_a_mac(monkeypatch, "arm64", SYSCTL_MAC, 22 * GIB)
    assert found == Machine(
        system="Darwin",
        arch="arm64",
        os_version="15.5",
        chip="Apple M2 Pro",
        gpu_cores=19,
        memory_bytes=32 * GIB,
        gpu_budget_bytes=22 * GIB,
        has_metal=True,
        is_translated=False,
        is_virtual=False,
    )
    assert found.generation == 2
    check_machine(found)


@pytest.mark.parametrize(
    ("arch", "sysctl", "says"),
    [
        ("x86_64", SYSCTL_ROSETTA, "Rosetta"),
        ("x86_64", SYSCTL_MAC.replace("Apple M2 Pro", "Intel(R) Core(TM) i7"), "Apple silicon"),
        ("arm64", SYSCTL_VM, "virtual machine"),
        ("arm64", SYSCTL_MAC, "no Metal device"),
    ],
)
def test_macs_that_cannot_run_models_say_why(
    monkeypatch: pytest.MonkeyPatch, arch: str, sysctl: str, says: str
) -> None:
    found = on_a_mac(monkeypatch, arch, sysctl, None)
    assert not found.has_metal
    with pytest.raises(MachineError, match=says):
        check_machine(found)


def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.platform, "system", lambda: "Windows")
    with pytest.raises(MachineError, match="Windows"):
        this_machine.__wrapped__()


def test_generations_of_chips() -> None:
    def generation(chip: str) -> int | None:
        fields = json.loads((MACHINES / "m1_8.json").read_text())
        return Machine(**{**fields, "chip": chip}).generation

    assert [generation(f"Apple {name}") for name in ("M1", "M2 Pro", "M4 Max", "M5", "M10 Ultra")] == [
        1,
        2,
        4,
        5,
        10,
    ]
    assert [generation(name) for name in ("Apple A18 Pro", "AMD EPYC", "VirtualApple @ 2.50GHz")] == [
        None
    ] * 3


def test_simulated_machines() -> None:
    refused = {"macos_vm": "virtual machine", "rosetta": "Rosetta"}
    names = sorted(path.stem for path in MACHINES.glob("*.json"))
    assert len(names) >= 11
    for name in names:
        found = described(name)
        if name in refused:
            with pytest.raises(MachineError, match=refused[name]):
                check_machine(found)
            continue
        check_machine(found)
        assert found.has_metal == (found.system == "Darwin")
        assert found.gpu_budget_bytes is None or 0.6 < found.gpu_budget_bytes / found.memory_bytes < 0.9
    assert described("m4_max_128").memory_bytes == 128 * GIB


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"chip": None}, "chip must be"),
        ({"chip": "M1\x1b[2J"}, "chip must be"),
        ({"system": "Windows"}, "system must be"),
        ({"memory_bytes": "16 GB"}, "memory_bytes must be"),
        ({"memory_bytes": True}, "memory_bytes must be"),
        ({"memory_bytes": -1}, "memory_bytes must be"),
        ({"memory_bytes": 1e10}, "memory_bytes must be"),
        ({"gpu_cores": 0}, "gpu_cores must be"),
        ({"has_metal": 1}, "has_metal must be"),
        ({"gpu_budget_bytes": None}, "null without"),
        ({"wings": 2}, "wings is not a field"),
    ],
)
def test_bad_descriptions_are_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    fields = json.loads((MACHINES / "m1_16.json").read_text())
    file = tmp_path / "machine.json"
    file.write_text(json.dumps({**fields, **change}))
    with pytest.raises(MachineError, match=says):
        read_machine(file)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"\xff\xfe\x00", b"{}", b"[" * 100_000])
def test_files_that_describe_nothing_are_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "machine.json"
    file.write_bytes(content)
    with pytest.raises(MachineError):
        read_machine(file)
    with pytest.raises(MachineError):
        read_machine(tmp_path / "not there.json")


def linux(folder: Path, *, available_kib: int = 900_000, cgroup: str = "0::/\n") -> tuple[Path, Path]:
    """A made-up /proc and /sys/fs/cgroup of a machine of 1000 MiB."""
    proc, root = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    root.mkdir()
    (proc / "meminfo").write_text(
        f"MemTotal:        1024000 kB\nMemFree:           12345 kB\nMemAvailable:   {available_kib} kB\n"
        "HugePages_Total:       0\n"
    )
    (proc / "self/cgroup").write_text(cgroup)
    return proc, root


def limit(folder: Path, maximum: str, used: int, cache: int, *, v1: bool = False) -> None:
    """Write a control group's files; half of the page cache is active."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
    (folder / names[0]).write_text(f"{maximum}\n")
    (folder / names[1]).write_text(f"{used}\n")
    cached = f"inactive_file {cache // 2}\nactive_file {cache // 2}\n"
    if v1:  # the same words without total_ leave out what children have cached
        cached = f"inactive_file 1\nactive_file 2\ntotal_inactive_file {cache // 2}\ntotal_active_file {cache // 2}\n"
    (folder / "memory.stat").write_text(f"anon {used - cache}\n{cached}")


def test_linux_without_a_limit(tmp_path: Path) -> None:
    proc, root = linux(tmp_path)
    assert machine_linux.memory_limit(proc, root) == 1000 * MIB
    assert machine_linux.free_memory(proc, root) == 900_000 * 1024
    limit(root / "a", "max", 7, 0)
    limit(root / "memory/b", str(2**63 - 4096), 7, 0, v1=True)  # how v1 writes "none"
    (proc / "self/cgroup").write_text("4:memory:/b\n0::/a\n")
    assert machine_linux.memory_limit(proc, root) == 1000 * MIB


def test_linux_in_a_limited_group_of_version_2(tmp_path: Path) -> None:
    """The limit of a group above counts too, and page cache counts as free."""
    proc, root = linux(tmp_path, cgroup="0::/pod/box\n")
    limit(root / "pod", str(400 * MIB), 100 * MIB, 60 * MIB)
    limit(root / "pod/box", "max", 90 * MIB, 60 * MIB)
    assert machine_linux.memory_limit(proc, root) == 400 * MIB
    assert machine_linux.free_memory(proc, root) == (400 - 100 + 60) * MIB


def test_linux_in_a_container_that_sees_only_its_own_group(tmp_path: Path) -> None:
    """The path in /proc is the host's; the container's files are at the top."""
    for number, v1 in enumerate((True, False)):
        line = "5:hugetlb:/docker/abc\n4:memory,x:/docker/abc\n0::/\n" if v1 else "0::/docker/abc\n"
        proc, root = linux(tmp_path / str(number), cgroup=line)
        limit(root / "memory" if v1 else root, str(300 * MIB), 250 * MIB, 20 * MIB, v1=v1)
        assert machine_linux.memory_limit(proc, root) == 300 * MIB
        assert machine_linux.free_memory(proc, root) == 70 * MIB


def test_pressure_on_linux(tmp_path: Path) -> None:
    levels = []
    for number, available in enumerate((500_000, 60_000, 10_000)):
        levels.append(machine_linux.pressure(*linux(tmp_path / str(number), available_kib=available)))
    assert levels == ["normal", "warning", "critical"]


def test_processors_of_linux() -> None:
    x86 = "processor\t: 0\nmodel name\t: AMD EPYC 9R14\nflags\t\t: fpu hypervisor\n\nprocessor\t: 1\nmodel name\t: x\n"
    assert machine_linux.parse_cpuinfo(x86) == ("AMD EPYC 9R14", True)
    arm = "processor\t: 0\nBogoMIPS\t: 243.75\nCPU part\t: 0xd4f\n"
    assert machine_linux.parse_cpuinfo(arm) == ("0xd4f", False)
    assert machine_linux.parse_cpuinfo("") == ("unknown processor", False)


def test_this_machine() -> None:
    found = this_machine()
    assert found.system == platform.system() and found is this_machine()
    assert found.has_metal == mx.metal.is_available()
    assert 0 < free_bytes() <= found.memory_bytes
    assert pressure_level() in ("normal", "warning", "critical")


GROWS = """
from mlx_mtp.machine import footprint_bytes, this_machine
this_machine()
before = footprint_bytes()
held = bytearray(b"x") * (64 * 2**20)
grown = footprint_bytes() - before
del held
after = footprint_bytes() - before
import sys
print(grown, after, "mlx" in sys.modules, "mlx.core" in sys.modules)
"""


def test_the_footprint_follows_what_is_taken_and_given_back_and_needs_no_mlx() -> None:
    done = subprocess.run([sys.executable, "-c", GROWS], capture_output=True, text=True, check=True)
    grown, after, *imported = done.stdout.split()
    assert 63 * MIB <= int(grown) <= 70 * MIB
    assert int(after) <= 4 * MIB
    assert imported == ["False", "False"] or platform.system() == "Darwin"  # a Mac's budget is asked of MLX
