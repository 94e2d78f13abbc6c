"""Where the report was made: machine, versions, power; and which promise of equality holds there."""

import platform
import subprocess
from dataclasses import asdict

import mlx.core as mx

from mlx_mtp.dtypes import activation_dtype
from mlx_mtp.machine import free_bytes, pressure_level
from mlx_mtp.report.activations import dtype_name
from mlx_mtp.report.protocol import Deadline, Found
from mlx_mtp.report.setting import GREEDY, Setting, play
from mlx_mtp.versions import find_versions

PMSET_SECONDS = 10


def machine(setting: Setting, found: Found, deadline: Deadline) -> None:
    """The machine as it describes itself, without its name; nothing here identifies a person."""
    found["machine"] = asdict(setting.machine)
    found["python"] = platform.python_version()
    found["versions"] = {finding.tested.package: finding.version for finding in find_versions()}
    found["device"] = str(mx.default_device())
    found["device_info"] = dict(mx.device_info())
    dtype, reason = activation_dtype(setting.machine, mx.bfloat16)
    found["activation_dtype"] = {"dtype": dtype_name(dtype), "reason": reason}
    found["free_bytes"], found["pressure"] = free_bytes(), pressure_level()
    if setting.machine.system == "Darwin":
        found["power"] = power(_pmset("batt"), _pmset(""))


def power(battery: str, settings: str) -> Found:
    """`pmset -g batt` and `pmset -g` -> on mains or battery, low power mode; None where they do not say.

    Their formats are from the manual page and from memory; never run on a Mac.
    """
    on_mains = "'AC Power'" in battery if "drawing from" in battery else None
    modes = [line.split() for line in settings.splitlines()]
    low = [words[1] for words in modes if len(words) > 1 and words[0] in ("lowpowermode", "powermode")]
    return {"on_mains": on_mains, "low_power_mode": low[0] == "1" if low else None}


def _pmset(what: str) -> str:
    command = ["/usr/bin/pmset", "-g", *([what] if what else [])]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=PMSET_SECONDS).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def exactness(setting: Setting, found: Found, deadline: Deadline) -> None:
    """Whether a row is computed alike in passes of every size, and whether MTP's text was that of plain decoding."""
    pair = setting.the_pair
    derived, tax = pair.exactness(), pair.exactness_tax()
    found["promise"], found["backend"] = derived.promise, derived.backend
    found["rows_invariant"] = not derived.refuting
    found["operations"] = sum(row.count for row in derived.rows)
    found["against"] = [asdict(row) for row in (*derived.breaking, *derived.unknown)]
    found["compared"] = {probed.what: probed.equal for probed in derived.probed}
    found["tax"] = asdict(tax)
    if pair.drafter is None:
        return
    found["replies"], found["replies_equal"], found["first_differences"] = 0, 0, []
    for ids in setting.prompt_tokens().values():
        deadline.check()
        plain, drafted = (play(pair, ids, k=k, tokens=setting.tokens, sampling=GREEDY).tokens for k in (0, 4))
        found["replies"] += 1
        found["replies_equal"] += plain == drafted
        if plain != drafted:
            pairs = enumerate(zip(plain, drafted, strict=False))
            found["first_differences"].append(next((i for i, (a, b) in pairs if a != b), len(plain)))
