"""`mlx-mtp tune` as a person or a script runs it: what is shown, kept, shared and refused."""

import json
from pathlib import Path

import pexpect
import pytest

from cli_runs import COMMAND, environment, one_line, run_main
from mlx_mtp.clean import clean_for_terminal
from mlx_mtp.profiles import LARGEST_BYTES
from tiny_checkpoints import drafter_config, published_names, random_tensors, target_config, write_checkpoint
from tiny_tokenizer import write_tokenizer


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """An exported profile of the demo pair, timed once for all tests here."""
    folder = tmp_path_factory.mktemp("tuned")
    done = run_main("tune", "demo", "--export", folder / "demo.json", HOME=str(folder))
    assert done.returncode == 0, done.stderr.decode()
    said, text = done.stderr.decode(), done.stdout.decode()
    assert "demo.json" in said and "exactness tax: not measured" in text and "timed now" in text
    assert text == clean_for_terminal(text) and "\x1b" not in text
    return json.loads((folder / "demo.json").read_text())


def written(folder: Path, content: object) -> Path:
    path = folder / "given.json"
    path.write_text(json.dumps(content))
    return path


def fields(stdout: bytes) -> dict:
    """The only thing on stdout is one JSON object."""
    return json.loads(stdout)


def test_a_shared_profile_is_taken_kept_and_shown(profile: dict, tmp_path: Path) -> None:
    given = written(tmp_path, profile)
    taken = run_main("tune", "demo", "--import", given, "--json")
    found = fields(taken.stdout)
    assert taken.returncode == 0 and found["schema"] == "mlx-mtp tune 1"
    assert (found["began_with"], found["measured"]) == ("the file", False)
    ratios = profile["times"]["widths"]["1"]["ratios"]
    curve = {str(point["drafts"]): point for point in found["curve"]}
    assert {k: curve[k]["break_even"] for k in ratios} == pytest.approx(ratios)
    assert found["plain_seconds"] == pytest.approx(profile["times"]["widths"]["1"]["plain_seconds"])
    assert [choice["acceptance"] for choice in found["choices"]] == [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
    shown = fields(run_main("tune", "demo", "--show", "--json").stdout)  # kept for the next run
    assert shown["began_with"] == "a profile" and shown["curve"] == found["curve"]
    text = run_main("tune", "demo", "--show").stdout.decode()
    assert "times kept from earlier runs" in text and "break-even" in text


def test_nothing_timed_shows_what_is_expected_and_exports_nothing(tmp_path: Path) -> None:
    done = run_main("tune", "demo", "--show")
    text = done.stdout.decode()
    assert done.returncode == 0 and "nothing was timed yet" in text and "without --show" in text
    refused = run_main("tune", "demo", "--show", "--export", tmp_path / "none.json")
    assert refused.returncode == 2 and b"nothing was timed here yet" in refused.stderr
    assert refused.stdout == b"" and not (tmp_path / "none.json").exists()


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("key", {"chip": "Apple M9 \x1b[2J"}, "another chip (Apple M9"),
        ("key", {"mlx": "0.1"}, "another mlx (0.1"),
        ("key", {"checkpoint": "0"}, "another checkpoint (0"),
        ("key", {"kernels": "abc"}, "another kernels (abc"),
        ("times", {"widths": {"1": {"plain_seconds": None, "ratios": {"99": 2.0}}}}, "99 is not in 1 .. 15"),
        ("times", {"widths": {"0": {"plain_seconds": None, "ratios": {}}}}, "0 is not in 1 .. 4096"),
        ("times", {"widths": {"1": {"plain_seconds": -1, "ratios": {}}}}, "-1 is not in"),
    ],
)
def test_a_foreign_or_impossible_profile_is_refused_with_its_reason(
    profile: dict, tmp_path: Path, part: str, change: dict, reason: str
) -> None:
    given = written(tmp_path, profile | {part: profile[part] | change})
    done = run_main("tune", "demo", "--import", given)
    said = done.stderr.decode()
    assert done.returncode == 2 and done.stdout == b"" and said.count(reason) == 1 and "\x1b" not in said
    assert "nothing was timed yet" in run_main("tune", "demo", "--show").stdout.decode()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--import", "{tmp}/missing.json"), "is none"),
        (("--import", "{tmp}"), "is none"),
        (("--import", "{tmp}/large"), "larger than 1 MB"),
        (("--text", "{tmp}/large"), "--text belongs to --experts"),
        (("--experts", "--show"), "--experts times nothing"),
        (("--import", "{tmp}/large", "--export", "x"), "leave out --show and --export"),
    ],
)
def test_words_that_mean_nothing_are_refused_before_anything_is_opened(
    tmp_path: Path, words: tuple[str, ...], reason: str
) -> None:
    (tmp_path / "large").write_bytes(b" " * (LARGEST_BYTES + 1))
    done = run_main("tune", "no-such-model", *(word.format(tmp=tmp_path) for word in words))
    assert done.returncode == 2 and reason in one_line(done.stderr) and done.stdout == b""


def test_without_a_drafter_there_is_nothing_to_compare() -> None:
    done = run_main("tune", "demo", "--drafter", "none")
    assert done.returncode == 2 and b"without a drafter" in done.stderr and done.stdout == b""


def test_a_damaged_profile_is_kept_aside_and_said_once(profile: dict, tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path / "data")}
    run_main("tune", "demo", "--import", written(tmp_path, profile), **home)
    (kept,) = (tmp_path / "data" / "mlx-mtp" / "profiles").iterdir()
    content = json.loads(kept.read_text())
    content["value"]["widths"]["1"]["ratios"]["16"] = 3.0  # more drafts than there can be
    kept.write_text(json.dumps(content))
    done = run_main("tune", "demo", "--show", **home)
    assert done.returncode == 0 and done.stderr.decode().count("kept aside as") == 1
    assert "nothing was timed yet" in done.stdout.decode()
    assert kept.with_name(kept.name + ".corrupt").exists()
    assert b"kept aside" not in run_main("tune", "demo", "--show", **home).stderr


# Experts


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random mixture with a tokenizer, and its drafter beside it."""
    folder = tmp_path_factory.mktemp("a4b")
    changes = {"vocab_size": 512, "vocab_size_per_layer_input": 512, "max_position_embeddings": 256}
    target, drafter = target_config("a4b"), drafter_config("a4b")
    target["text_config"] |= changes
    target["vocab_size"] = 512
    drafter["text_config"] |= changes | {"vocab_size_per_layer_input": 0}
    eos = write_tokenizer(folder / "target", 512)
    target["eos_token_id"] = target["text_config"]["eos_token_id"] = list(eos)
    tensors = published_names(random_tensors(target), "model.language_model.")
    write_checkpoint(folder / "target", target, tensors)
    write_checkpoint(folder / "drafter", drafter, published_names(random_tensors(drafter), "model."))
    return folder / "target"


def test_experts_are_counted_on_a_text_and_kept_for_auto(mixture: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Rows of a text, one after another. " * 5)
    done = run_main("tune", mixture, "--experts", "--text", text, "--json")
    found = fields(done.stdout)
    assert done.returncode == 0 and (found["schema"], found["text"]) == ("mlx-mtp experts 1", "file")
    by_rows = found["by_rows"]
    assert list(by_rows) == [str(rows) for rows in range(1, 17)]
    assert by_rows["1"]["distinct"] == found["experts_per_token"] == by_rows["1"]["independent"]
    distinct = [own["distinct"] for own in by_rows.values()]
    assert distinct == sorted(distinct) and distinct[-1] <= found["experts"]
    shown = fields(run_main("tune", mixture, "--show", "--json").stdout)
    assert shown["distinct_experts"] == {rows: own["distinct"] for rows, own in by_rows.items()}
    said = run_main("tune", mixture, "--experts", "--text", text)
    assert "if independent" in said.stdout.decode() and "26B-A4B" in said.stderr.decode()


@pytest.mark.parametrize(("content", "reason"), [(b"", "empty"), (b"\xff\xfe\x00", "UTF-8")])
def test_a_text_without_text_is_refused(mixture: Path, tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "text").write_bytes(content)
    done = run_main("tune", mixture, "--experts", "--text", tmp_path / "text")
    assert done.returncode == 2 and reason in one_line(done.stderr) and done.stdout == b""


def test_a_dense_model_has_none() -> None:
    done = run_main("tune", "demo", "--experts")
    assert done.returncode == 2 and done.stdout == b""
    assert "demo is a dense model" in done.stderr.decode() and "26b" in done.stderr.decode()


def test_a_chat_times_rounds_after_its_first_reply_and_then_listens() -> None:
    command = [*COMMAND[1:], "chat", "demo", "--max-tokens", "4", "--plain"]
    chat = pexpect.spawn(COMMAND[0], command, env=environment(TERM="xterm"), encoding="utf-8", timeout=120)
    chat.expect("lists the commands")
    chat.send("def f(\r")
    chat.expect("tok/s")  # the whole reply and its figures come first
    chat.expect("timing rounds with 0 drafts")
    chat.send("/mtp\r")  # typed meanwhile: timing ends, and the line is read
    chat.expect("MTP is auto")
    chat.send("\x04")
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0
