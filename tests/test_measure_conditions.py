"""Heat, power, load and energy: what systems say is read rightly, and samples are marked by it."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bench_runs import IDLE
from mlx_mtp.measure import conditions_linux, conditions_macos, energy
from mlx_mtp.measure.conditions import LOADED, POWER, SLEPT, THROTTLED, Moment, between, look

STAT = "cpu  49449 10 12663 211526 660 0 82 114 7 7\ncpu0 20344 0 5488 111198 96 0 11 58 0 0\n"
PRESSURE = "some avg10=65.71 avg60=57.84 avg300=28.27 total=120411977\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
BATT = (
    "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=4653155)\t81%; discharging; 5:02 remaining\n"
)
SETTINGS = "System-wide power settings:\nCurrently in use:\n sleep              1\n lowpowermode         1\n womp 1\n"
BATTERY = '+-o AppleSmartBattery\n  "PowerTelemetryData" = {"SystemPowerIn"=0,"SystemLoad"=8312,"BatteryPower"=8312}\n'
GPU = '"PerformanceStatistics" = {"In use system memory"=1,"Device Utilization %"=37,"Renderer Utilization %"=36}\n'


def test_linux_text():
    assert conditions_linux.parse_busy(STAT, 100) == (49449 + 10 + 12663 + 82 + 114) / 100
    assert conditions_linux.parse_busy("intr 5\n", 100) is None
    assert conditions_linux.parse_pressure(PRESSURE) == 120.411977
    assert conditions_linux.parse_power({"BAT0": "1\n"}) is None
    assert conditions_linux.parse_power({"AC": "1\n"}) == "AC"
    assert conditions_linux.parse_power({"ADP1": "0\n", "BAT0": "1\n"}) == "battery"


def test_linux_files(tmp_path):
    proc, system = tmp_path / "proc", tmp_path / "sys"
    for path, text in {
        proc / "stat": STAT,
        proc / "loadavg": "3.35 1.75 0.75 7/135 15184\n",
        system / "devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "3\n",
        system / "devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": "4\n",
        system / "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "3000000\n",
        system / "class/power_supply/AC/online": "1\n",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    seen = conditions_linux.read(proc, system)
    assert (seen.throttled, seen.hertz, seen.power, seen.load, seen.waited_s) == (7, 3e9, "AC", 3.35, None)


def test_macos_text():
    assert conditions_macos.parse_thermal("com.apple.system.thermalpressurelevel 0\n") == "nominal"
    assert conditions_macos.parse_thermal("com.apple.system.thermalpressurelevel 2\n") == "heavy"
    assert conditions_macos.parse_thermal("com.apple.system.thermalpressurelevel 9\n") == "sleeping"
    assert conditions_macos.parse_thermal("") is None
    assert conditions_macos.parse_power(BATT) == "battery"
    assert conditions_macos.parse_power("Now drawing from 'AC Power'\n") == "AC"
    assert conditions_macos.parse_power("") is None
    assert conditions_macos.parse_low_power(SETTINGS) is True
    assert conditions_macos.parse_low_power(SETTINGS.replace("mode         1", "mode         0")) is False
    assert conditions_macos.parse_low_power("sleep 1\n") is None
    assert conditions_macos.parse_gpu_busy(GPU) == 37
    assert conditions_macos.parse_gpu_busy("") is None
    raw = conditions_macos.LOAD_FORMAT.pack(300, 100, 5000, 50)
    assert conditions_macos.parse_ticks(raw, 100) == 4.5


def moment(own: float = 0.0, steady: float = 0.0, wall: float | None = None, **changes) -> Moment:
    return Moment(replace(IDLE, **changes), own, steady, steady if wall is None else wall)


@pytest.mark.parametrize(
    ("before", "after", "marks"),
    [
        (moment(busy_s=10.0), moment(own=2.0, steady=2.0, busy_s=12.2), ()),
        (moment(busy_s=10.0), moment(own=2.0, steady=2.0, busy_s=13.4), (LOADED,)),
        (moment(thermal="nominal"), moment(steady=1.0, thermal="nominal"), ()),
        (moment(thermal="nominal"), moment(steady=1.0, thermal="heavy"), (THROTTLED,)),
        (moment(thermal="moderate"), moment(steady=1.0, thermal="nominal"), (THROTTLED,)),
        (moment(throttled=3), moment(steady=1.0, throttled=3), ()),
        (moment(throttled=3), moment(steady=1.0, throttled=4), (THROTTLED,)),
        (moment(), moment(steady=1.0, wall=1.5), ()),
        (moment(), moment(steady=1.0, wall=60.0), (SLEPT,)),
        (moment(power="AC"), moment(steady=1.0, power="battery"), (POWER,)),
        (moment(low_power=False), moment(steady=1.0, low_power=True), (POWER,)),
    ],
)
def test_samples_are_marked(before, after, marks):
    assert between(before, after, processors=2).marks == marks


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_another_program_is_seen_and_our_own_work_is_not():
    def work(length: float) -> tuple[float, float]:
        """Processors used by others and by this process, while it works."""
        before, stop = look(), time.perf_counter() + length
        while time.perf_counter() < stop:
            pass
        after = look()
        others = between(before, after).others
        assert others is not None
        return others, (after.own_s - before.own_s) / (after.steady - before.steady)

    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.3)
        others, own = work(0.6)
    finally:
        busy.kill()
        busy.wait()
    # Alone on one processor the two share it; whatever else runs here only adds to the others.
    assert others > 0.35
    assert own > 0.1
    assert others + own <= (os.cpu_count() or 1) + 0.15, "our own work was counted as others'"


def test_power_meter_of_a_macbook(monkeypatch):
    assert energy.parse_battery(BATTERY) == 8.312
    assert energy.parse_battery("+-o nothing\n") is None
    monkeypatch.setattr("mlx_mtp.machine_macos.run_text", lambda *command: BATTERY)
    meter = energy.find_meter("Darwin")
    assert meter.read is not None and "whole machine" in meter.scope
    assert meter.read().watts == 8.312
    monkeypatch.setattr("mlx_mtp.machine_macos.run_text", lambda *command: "")
    desktop = energy.find_meter("Darwin")
    assert desktop.read is None and "without root" in desktop.scope


def test_energy_counters_of_linux(tmp_path: Path):
    assert energy.find_meter("Linux", tmp_path).read is None
    for number, joules in ((0, 5_000_000), (1, 7_000_000)):
        folder = tmp_path / f"intel-rapl:{number}"
        folder.mkdir()
        (folder / "energy_uj").write_text(f"{joules}\n")
        (folder / "max_energy_range_uj").write_text("262143328850\n")
    (tmp_path / "intel-rapl:0:0").mkdir()
    meter = energy.find_meter("Linux", tmp_path)
    assert meter.read is not None
    before = meter.read()
    assert before.joules == 12.0
    (tmp_path / "intel-rapl:0/energy_uj").write_text("9000000\n")
    assert energy.joules_between(before, meter.read()) == 4.0


def test_joules_from_readings():
    counted = [energy.Reading(joules, None, at, 100.0) for joules, at in ((90.0, 0.0), (5.0, 1.0))]
    assert energy.joules_between(*counted) == 15.0, "the counter began again"
    drawn = [energy.Reading(None, watts, at) for watts, at in ((10.0, 0.0), (20.0, 30.0), (20.0, 5.0))]
    assert energy.joules_between(drawn[0], drawn[1]) == 450.0
    assert energy.joules_between(drawn[0], drawn[2]) is None, (
        "a meter renewed every few seconds says nothing of five"
    )
