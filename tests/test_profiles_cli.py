"""Profiles in commands: kept after a reply, a damaged one said once and set aside, and the text the same."""

from pathlib import Path

from cli_runs import run_main


def test_times_are_kept_after_a_reply_and_a_damaged_profile_is_said_once(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path / "data")}
    words = ("generate", "demo", "def main(", "--seed", "1", "--temperature", "0", "--max-tokens", "60")
    first = run_main(*words, **home)
    (profile,) = (tmp_path / "data" / "mlx-mtp" / "profiles").iterdir()
    profile.write_bytes(b"{")
    second = run_main(*words, **home)
    assert first.returncode == second.returncode == 0 and first.stdout == second.stdout
    assert second.stderr.decode().count("kept aside as") == 1 and first.stderr.count(b"warning") == 0
    assert profile.with_name(profile.name + ".corrupt").read_bytes() == b"{" and profile.exists()
