"""`mlx-mtp serve` as a process: what it says, how it ends, and whose end it follows."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cli_runs import COMMAND, environment, run_main

WITHIN_S = 60.0
DEMO = ("serve", "demo", "--port", "0", "--context", "512")


@contextmanager
def started(*words: str, command: list[str] = COMMAND, **options: Any) -> Iterator[subprocess.Popen[str]]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment()}
    with subprocess.Popen([*command, *words], **(pipes | options)) as process:
        try:
            yield process
        finally:
            process.kill()


def event(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.stderr.read() if process.stderr else ""
    return json.loads(line)


def ask(url: str, path: str, value: dict[str, Any] | None = None, **headers: str) -> tuple[int, Any]:
    data = None if value is None else json.dumps(value).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=WITHIN_S) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def complete(url: str, tokens: int = 3, **headers: str) -> tuple[int, Any]:
    return ask(url, "/completions", {"prompt": "def f", "max_tokens": tokens, "temperature": 0}, **headers)


def test_it_says_where_it_listens_and_a_signal_ends_it():
    """64: a stop of the process in between changes nothing."""
    with started(*DEMO) as process:
        told = event(process)
        assert told["event"] == "listening" and told["port"] > 0 and "token" not in told
        assert event(process) == {"event": "ready", "model": "demo"}
        before = complete(told["url"], 30)
        assert before[0] == 200
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGCONT)
        assert complete(told["url"], 30)[1]["choices"] == before[1]["choices"]
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=WITHIN_S)
    assert (process.returncode, out) == (0, "")
    assert "mlx-mtp serves demo at http://127.0.0.1:" in err and "POST /v1/completions 200" in err
    assert "def f" not in err and "Traceback" not in err


def test_ctrl_c_and_a_token_for_this_launch(tmp_path):
    with started(*DEMO, "--launch-token") as process:
        told = event(process)
        event(process)
        assert complete(told["url"])[0] == 401
        assert complete(told["url"], Authorization=f"Bearer {told['token']}")[0] == 200
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 130 and told["token"] not in err


def test_a_key_from_stdin_and_a_folders_name():
    demo = Path(__file__).parent.parent / "mlx_mtp" / "demo" / "target"
    words = ("serve", str(demo), "--port", "0", "--key-file", "-", "--drafter", "none")
    with started(*words, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write("a-key-from-stdin\n")
        process.stdin.close()
        told = event(process)
        assert told["model"] == "target", "no path of this machine is told"
        event(process)
        bearer = {"Authorization": "Bearer a-key-from-stdin"}
        assert [model["id"] for model in ask(told["url"], "/models", **bearer)[1]["data"]] == ["target"]
        assert ask(told["url"], "/models")[0] == 401


def test_73_whoever_stops_reading_stdout_ends_nothing():
    with started(*DEMO) as process:
        told = event(process)
        assert process.stdout is not None
        process.stdout.close()
        deadline = time.monotonic() + WITHIN_S
        while ask(told["url"].removesuffix("/v1"), "/health")[0] != 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert complete(told["url"])[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(WITHIN_S) == 0
        assert process.stderr is not None and "Broken" not in process.stderr.read()


def test_it_ends_with_the_program_that_started_it():
    parent = textwrap.dedent(
        f"""
        import subprocess, sys
        child = subprocess.Popen({[*COMMAND, *DEMO, "--exit-with-parent"]!r}, stdout=subprocess.PIPE, text=True)
        print(child.pid, child.stdout.readline(), end="", flush=True)
        child.stdout.readline()
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", parent], capture_output=True, text=True, timeout=WITHIN_S, env=environment()
    )
    pid, told = done.stdout.split(" ", 1)
    url = json.loads(told)["url"]
    deadline = time.monotonic() + WITHIN_S
    while True:
        try:
            ask(url, "/models")
        except (urllib.error.URLError, ConnectionError):
            break
        assert time.monotonic() < deadline, f"process {pid} goes on without its parent"
        time.sleep(0.1)


def refused(*words: str) -> str:
    done = run_main("serve", *words)
    assert b"Traceback" not in done.stderr and done.stdout == b""
    return f"{done.returncode} {' '.join(done.stderr.decode().split())}"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("demo", "--host", "0.0.0.0"), "2 mlx-mtp: others could use this server"),
        (("demo", "--port", "70000"), "2 mlx-mtp: a port is a number"),
        (("demo", "--width", "0"), "2 mlx-mtp: a batch is 1"),
        (("demo", "--queue", "0"), "2 mlx-mtp: --queue and --max-tokens"),
        (("demo", "--grace", "-1"), "2 mlx-mtp: --grace is"),
        (("demo", "--mtp", "many"), "2 mlx-mtp: MTP is auto"),
        (("demo", "--allow-origin", "evil"), "2 mlx-mtp: an origin looks like"),
        (("demo", "--key-file", "/no/such/file"), "2 mlx-mtp: the key cannot be read"),
        (("demo", "--key-file", "/dev/null"), "2 mlx-mtp: the key in /dev/null is empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_refused_before_a_model_is_read(words, says):
    assert refused(*words).startswith(says)


def test_83_a_port_in_use_and_a_model_that_cannot_be_loaded(tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 cannot be used" in refused("demo", "--port", str(port))
    folder = tmp_path / "none"
    folder.mkdir()
    words = [*COMMAND, "serve", str(folder), "--port", str(port), "--drafter", "none"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=WITHIN_S, env=environment())
    assert done.returncode == 3 and "Traceback" not in done.stderr and done.stdout == ""


def test_without_the_extra_it_says_what_to_install(tmp_path):
    hide = (
        "import sys; sys.modules['uvicorn'] = None; sys.argv[0] = 'mlx-mtp'\n"
        "from mlx_mtp.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", hide, "serve", "demo"],
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        env=environment(),
    )
    assert done.returncode == 3 and "pip install 'mlx-mtp[server]'" in " ".join(done.stderr.split())


def test_the_command_line_starts_without_the_servers_packages():
    code = "import sys, mlx_mtp.cli, mlx_mtp; print(sorted({'starlette', 'uvicorn', 'h11'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WITHIN_S)
    assert done.stdout == "[]\n"
