"""Many clients at once on `mlx-mtp serve demo`: is anything lost, and is every text that of its own solo run?

    python bench/server_load.py --clients 32 --requests 2000 [--part 1/4]

Some requests are read to the end, streamed or whole, some with log_probs, which change nothing; some are cancelled in
the middle, some leave before the first byte, some are nonsense. Whatever was read has to be the text, or its beginning,
that the library writes alone, cold and without drafts. Afterwards nothing may run or wait, and the server has to end by
itself with 0. Only loopback is used. Prints a JSON object; the exit code is 1 if anything was lost. Needs the extra
`server`, and httpx.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import httpx

from mlx_mtp import generate, load
from mlx_mtp.machine import footprint_bytes

PROMPTS = (
    "What is MLX?",
    "What is MTP?",
    "What is Gemma?",
    "def quicksort(items):",
    "import json",
    "class Stack:",
    "for line in open(path):",
    "Write a function that adds two numbers.",
)
Fate = Literal["read", "cancelled", "gone", "nonsense"]
FATES: tuple[Fate, ...] = ("read",) * 16 + ("cancelled",) * 2 + ("gone", "nonsense")
LOG_PROBS_SHARE = 0.2
WITHIN_S = 120.0


@dataclass(frozen=True, slots=True)
class Case:
    """What has one right text."""

    prompt: str
    is_chat: bool
    temperature: float
    seed: int
    max_tokens: int

    @property
    def body(self) -> dict[str, Any]:
        asked = {"messages": self.messages} if self.is_chat else {"prompt": self.prompt}
        return {**asked, "temperature": self.temperature, "seed": self.seed, "max_tokens": self.max_tokens}

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.prompt}]

    @property
    def path(self) -> str:
        return "/chat/completions" if self.is_chat else "/completions"


@dataclass(slots=True)
class Tally:
    """What became of the requests."""

    fates: Counter[str] = field(default_factory=Counter)
    retries: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0


def make_cases(rng: random.Random) -> list[Case]:
    """Few enough that each can be written alone first."""
    return [
        Case(prompt, is_chat, temperature, rng.randrange(100), rng.choice((4, 8, 12, 24)))
        for prompt in PROMPTS
        for is_chat in (False, True)
        for temperature in (0.0, 1.0)
    ]


def solo_texts(cases: list[Case]) -> dict[Case, str]:
    """Cold and without drafts, each alone."""
    pair = load("demo")
    texts = {}
    for case in cases:
        sampling = replace(pair.sampling, temperature=case.temperature, seed=case.seed)
        prompt = case.messages if case.is_chat else case.prompt
        options = {"sampling": sampling, "max_tokens": case.max_tokens, "num_draft_tokens": 0}
        texts[case] = generate(pair, prompt, **options).text
    return texts


async def ask(
    client: httpx.AsyncClient, case: Case, fate: Fate, rng: random.Random, right: str, tally: Tally
) -> None:
    """One request to its end, whatever its end is; 429 is waited for."""
    body = case.body | {"mtp": rng.choice(("auto", "off", 1, 3))}
    if rng.random() < LOG_PROBS_SHARE:
        body |= {"logprobs": True, "top_logprobs": 5} if case.is_chat else {"logprobs": 5}
    if fate == "nonsense":
        bad = rng.choice(({"temperature": -1}, {"stop": [1]}, {"model": "/etc"}, {"max_tokens": 0}))
        answer = await client.post(case.path, json=body | bad)
        if answer.status_code not in (400, 404):
            tally.wrong.append(f"nonsense was answered {answer.status_code}")
        return
    is_stream = fate == "cancelled" or rng.random() < 0.5
    while True:
        began = time.monotonic()
        status, text, usage = await _one(client, case, body, fate, rng, is_stream=is_stream)
        if status != 429:
            break
        tally.retries += 1
        await asyncio.sleep(rng.uniform(0.02, 0.2))
    if fate == "gone":
        return
    if status != 200:
        tally.wrong.append(f"{case}: status {status}, {text[:200]}")
    elif (fate == "read" and text != right) or not right.startswith(text):
        tally.wrong.append(f"{case}: {text!r}, alone it is {right!r}")
    if usage is not None:
        tally.seconds.append(time.monotonic() - began)
        tally.tokens += usage["completion_tokens"]
        tally.drafted += usage["mtp"]["drafted"]
        tally.accepted += usage["mtp"]["accepted"]


async def _one(
    client: httpx.AsyncClient,
    case: Case,
    body: dict[str, Any],
    fate: Fate,
    rng: random.Random,
    *,
    is_stream: bool,
) -> tuple[int, str, dict[str, Any] | None]:
    """-> status, text so far (or the error's body) and usage where the answer was read to its end."""
    if fate == "gone":
        try:
            await asyncio.wait_for(client.post(case.path, json=body), rng.uniform(0.001, 0.05))
        except asyncio.TimeoutError:
            pass
        return 0, "", None
    if not is_stream:
        answer = await client.post(case.path, json=body)
        if answer.status_code != 200:
            return answer.status_code, answer.text, None
        value = answer.json()
        choice = value["choices"][0]
        return 200, choice["message"]["content"] if case.is_chat else choice["text"], value["usage"]
    asked = body | {"stream": True, "stream_options": {"include_usage": True}}
    most = rng.randrange(1, 6) if fate == "cancelled" else None
    async with client.stream("POST", case.path, json=asked) as answer:
        if answer.status_code != 200:
            return answer.status_code, (await answer.aread()).decode(), None
        return 200, *await _read_stream(answer, most)


async def _read_stream(answer: httpx.Response, most: int | None) -> tuple[str, dict[str, Any] | None]:
    text, events = "", 0
    usage: dict[str, Any] | None = None
    async for line in answer.aiter_lines():
        if not line.startswith("data: "):
            continue
        if line == "data: [DONE]":
            return text, usage
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            return f"an error came: {event['error']['message']}", None
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            text += choice.get("delta", {}).get("content") or choice.get("text") or ""
        events += 1
        if most is not None and events >= most:
            return text, None
    return text + " (the stream ended without [DONE])", None


async def run(
    url: str, key: str, plan: list[tuple[Case, Fate, int]], texts: dict[Case, str], clients: int
) -> Tally:
    """All requests of the plan, so many at a time."""
    tally, left = Tally(), iter(plan)

    async def worker() -> None:
        async with httpx.AsyncClient(
            base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=WITHIN_S, trust_env=False
        ) as client:
            for case, fate, seed in left:
                try:
                    await ask(client, case, fate, random.Random(seed), texts[case], tally)
                except httpx.HTTPError as error:
                    tally.wrong.append(f"{case} {fate}: {error!r}")
                tally.fates[fate] += 1

    await asyncio.gather(*(worker() for _ in range(clients)))
    return tally


def idle_after(url: str) -> float:
    """Seconds until nothing runs or waits any more."""
    began = time.monotonic()
    while True:
        health = httpx.get(url.removesuffix("/v1") + "/health", trust_env=False).raise_for_status().json()
        if health["running"] == health["waiting"] == 0:
            return time.monotonic() - began
        if time.monotonic() - began > 30:
            raise SystemExit(f"requests still run after all have been read: {health}")
        time.sleep(0.05)


def measure(requests: int, clients: int, part: tuple[int, int], seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    cases = make_cases(rng)
    plan = [(rng.choice(cases), rng.choice(FATES), rng.randrange(2**31)) for _ in range(requests)]
    plan = plan[part[0] - 1 :: part[1]]
    texts = solo_texts(cases)
    command = [sys.executable, "-c", "from mlx_mtp.cli import main; main()", "serve", "demo", "--port", "0"]
    with subprocess.Popen(
        [*command, "--launch-token", "--exit-with-parent"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        told = json.loads(server.stdout.readline())
        server.stdout.readline()
        # Its log is read while it runs, or it would wait for a reader.
        log = asyncio.run(_with_log(server, told, plan, texts, clients))
        code = server.wait(30)
    tally, lines, seconds, idle = log
    tracebacks = sum("Traceback" in line for line in lines)
    ordered = sorted(tally.seconds) or [0.0]
    return {
        "requests": len(plan),
        "clients": clients,
        "fates": dict(tally.fates),
        "retries after 429": tally.retries,
        "wrong": tally.wrong[:20],
        "tracebacks": tracebacks,
        "exit code": code,
        "idle after s": round(idle, 3),
        "seconds": round(seconds, 1),
        "requests a second": round(len(plan) / seconds, 1),
        "tokens a second": round(tally.tokens / seconds, 1),
        "drafts kept": round(tally.accepted / max(tally.drafted, 1), 3),
        "median s": round(ordered[len(ordered) // 2], 3),
        "p99 s": round(ordered[int(len(ordered) * 0.99)], 3),
        "client MiB": footprint_bytes() >> 20,
        "ok": not tally.wrong and not tracebacks and code == 0 and sum(tally.fates.values()) == len(plan),
    }


async def _with_log(
    server: "subprocess.Popen[str]",
    told: dict[str, Any],
    plan: list[tuple[Case, Fate, int]],
    texts: dict[Case, str],
    clients: int,
) -> tuple[Tally, list[str], float, float]:
    assert server.stderr is not None
    reading = asyncio.create_task(asyncio.to_thread(server.stderr.readlines))
    began = time.monotonic()
    tally = await run(told["url"], told["token"], plan, texts, clients)
    seconds = time.monotonic() - began
    idle = await asyncio.to_thread(idle_after, told["url"])
    server.terminate()
    return tally, await reading, seconds, idle


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--part", default="1/1", help="i/n: every n-th request, from the i-th on")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    first, _, of = asked.part.partition("/")
    found = measure(asked.requests, asked.clients, (int(first), int(of)), asked.seed)
    print(json.dumps(found, indent=1))
    sys.exit(0 if found["ok"] else 1)


if __name__ == "__main__":
    main()
