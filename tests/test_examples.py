"""The examples beside the app's logic: types of the AppKit code, asyncio, what the Swift client says and is told."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import jsonschema
import pytest

from swift_structs import misfit, structs_of

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
APP = EXAMPLES / "macos_app"
SWIFT = EXAMPLES / "swift_client" / "Sources" / "MtpChat"


def mypy(*files: Path, stubs: Path = APP / "stubs", app: Path = APP) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "mypy", "--no-error-summary", *map(str, files)]
    environment = {**os.environ, "MYPYPATH": os.pathsep.join([str(app), str(stubs)])}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_types_of_the_app_and_of_asyncio():
    """The window's code runs on Macs only, so that this is what can be said of it here."""
    for file in (APP / "app.py", APP / "check_bundle.py", EXAMPLES / "asyncio_chat.py"):
        done = mypy(file)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("window.py", "setAccessibilityLabel_(", "setAccessibilityLabels_("),
        (
            "window.py",
            "initWithFrame_pullsDown_(NSMakeRect(0, 0, 400, 26), False)",
            "initWithFrame_pullsDown_(False)",
        ),
        ("window.py", "def give_back(", "def give_it_back("),
        ("app.py", "def soon(", "def later("),
    ],
)
def test_a_wrong_name_is_found(file, right, wrong, tmp_path):
    for path in APP.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    broken = (tmp_path / file).read_text(encoding="utf-8").replace(right, wrong)
    assert wrong in broken
    (tmp_path / file).write_text(broken, encoding="utf-8")
    done = mypy(tmp_path / "app.py", app=tmp_path)
    assert done.returncode == 1 and "error:" in done.stdout, done.stdout


def test_asyncio_runs():
    words = [sys.executable, str(EXAMPLES / "asyncio_chat.py"), "demo"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
    assert len(re.findall(r"^\d  \(\d+ tokens", done.stdout, re.M)) == 3
    assert re.search(r"^stopped: cancelled after \d+ tokens$", done.stdout, re.M)


def swift(name: str) -> str:
    return (SWIFT / name).read_text(encoding="utf-8")


def test_what_the_swift_client_says_and_is_told():
    """Its arguments, request and structs, as they stand in the source, against our server: what it would decode."""
    structs = structs_of(swift("Server.swift")) | structs_of(swift("ChatStream.swift"))
    assert {"ServerEvent", "ChatRequest", "ChatChunk", "Choice", "Delta", "Usage", "Mtp", "Detail"} <= set(
        structs
    )
    arguments = re.findall(
        r'"([^"]+)"', re.search(r"static let arguments = \[(.*?)\]", swift("Server.swift"))[1]
    )
    call = [sys.executable, "-c", "from mlx_mtp.cli import main; main()", "serve", "demo", *arguments]
    with subprocess.Popen(call, stdout=subprocess.PIPE, text=True) as server:
        try:
            listening, ready = (json.loads(server.stdout.readline()) for _ in range(2))
            assert [misfit(structs, "ServerEvent", event) for event in (listening, ready)] == [None, None]
            assert [listening["event"], ready["event"]] == ["listening", "ready"]
            request = request_of(structs, listening["model"])
            check_request(listening, request)
            chunks = streamed(listening, request)
            assert [misfit(structs, "ChatChunk", chunk) for chunk in chunks] == [None] * len(chunks)
            assert "".join(one["delta"].get("content") or "" for chunk in chunks for one in chunk["choices"])
            assert chunks[-1]["usage"]["mtp"]["drafted"] > 0
            refused = streamed({**listening, "token": "not the token"}, request)
            assert misfit(structs, "ErrorBody", refused) is None and misfit(structs, "ChatChunk", refused)
        finally:
            server.send_signal(signal.SIGTERM)  # Process.terminate()
        assert server.wait(60) == 0


def request_of(structs, model: str) -> dict:
    """A request with the fields that ChatRequest encodes."""
    values = {
        "model": model,
        "messages": [{"role": "user", "content": "What is MLX?"}],
        "max_tokens": 48,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert {field.key for field in structs["ChatRequest"]} == set(values)
    assert [field.key for field in structs["StreamOptions"]] == ["include_usage"]
    assert {field.key for field in structs["Message"]} == {"role", "content"}
    assert misfit(structs, "ChatRequest", values) is None
    return values


def headers(server: dict) -> dict[str, str]:
    return {"Authorization": f"Bearer {server['token']}", "Content-Type": "application/json"}


def check_request(server: dict, request: dict) -> None:
    """By the server's own description, every field of which is known to it."""
    address = server["url"].removesuffix("/v1") + "/openapi.json"
    with urllib.request.urlopen(
        urllib.request.Request(address, headers=headers(server)), timeout=60
    ) as reply:
        api = json.load(reply)
    schema = api["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"][
        "schema"
    ]
    jsonschema.validate(request, {**schema, "components": api["components"]})
    assert set(request) <= set(schema["properties"])


def streamed(server: dict, request: dict):
    """All chunks, or the error's body."""
    assert 'server.url.appendingPathComponent("chat/completions")' in swift("ChatStream.swift")
    address = f"{server['url']}/chat/completions"
    asked = urllib.request.Request(address, json.dumps(request).encode(), headers(server))
    try:
        with urllib.request.urlopen(asked, timeout=60) as reply:
            lines = [line.decode().rstrip("\n") for line in reply if line.startswith(b"data: ")]
    except urllib.error.HTTPError as error:
        return json.load(error)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
