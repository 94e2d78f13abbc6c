"""A machine that sleeps, or a process that is stopped, while it generates: the same text, and no wrong lesson."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from mlx_mtp.conversation import Conversation
from mlx_mtp.policy import AutoPolicy
from mlx_mtp.sampling import Sampling
from pairs import golden_pair
from talks import golden_text

PAUSE_S = 7200.0
ROUNDS = 400  # enough that one round of trying more or less in the second half says little


def play(policy: AutoPolicy, *, pause_at: int | None = None, traced: bool) -> list[int]:
    """How many drafts were verified in each round; one lasts two hours more; those that are `traced` are not timed.

    MTP pays: a draft adds a tenth of a plain round's time, and three of four or more are right.
    """
    played, pending, known = [], 0, set()
    for i in range(ROUNDS):
        plan = policy.plan(pending)
        seconds = 0.010 + 0.001 * plan.verify + (PAUSE_S if i == pause_at else 0)
        is_timed = plan in known or not traced
        known.add(plan)
        right = min(plan.verify, (3, 4, 2, 4)[i % 4])
        policy.observe(plan.verify, [right], seconds if is_timed else None)
        played.append(plan.verify)
        pending = plan.draft
    return played


def settled(played: list[int]) -> int:
    """The number of drafts in the second half; at most a twelfth of it goes into timing another one."""
    half = played[len(played) // 2 :]
    [(k, rounds)] = Counter(half).most_common(1)
    assert rounds >= 11 / 12 * len(half), played
    return k


@pytest.mark.parametrize("traced", [False, True])
def test_one_round_of_two_hours_teaches_nothing(traced):
    usual = play(AutoPolicy(), traced=traced)
    assert usual.count(0) < 10 and settled(usual) in (3, 4, 5)
    for pause_at in range(80):
        policy = AutoPolicy()
        played = play(policy, pause_at=pause_at, traced=traced)
        assert played.count(0) < 10 and not policy.parked and policy.reason is None, (pause_at, played)
        assert settled(played) == settled(usual), (pause_at, played)


def test_rounds_that_really_take_long_are_believed():
    """Sixteen rows may take sixteen times as long as one: that is no pause, and drafting does not pay."""
    policy = AutoPolicy()
    for _ in range(100):
        plan = policy.plan(policy.plan(0).draft)
        policy.observe(plan.verify, [plan.verify], 0.010 * (1 + 1.5 * plan.verify))
    assert policy.parked


GENERATE = """
import json, sys
from mlx_mtp.conversation import Conversation
from mlx_mtp.sampling import Sampling
from pairs import golden_pair
from talks import golden_text
ids, _ = golden_text("e2b", "long")
tokens = []
for chunk in Conversation(golden_pair("e2b")).stream(
    ids, max_tokens=300, sampling=Sampling(temperature=1.0, seed=3), num_draft_tokens="auto"
):
    tokens += chunk.tokens
    print(len(tokens), flush=True)
print(json.dumps({"tokens": tokens, "tps": chunk.stats.generation_tps, "finish": chunk.finish_reason}))
"""


def test_a_process_that_is_stopped_goes_on_with_the_same_text():
    ids, _ = golden_text("e2b", "long")
    options = {"max_tokens": 300, "sampling": Sampling(temperature=1.0, seed=3)}
    expected = Conversation(golden_pair("e2b")).generate(ids, **options, num_draft_tokens=0).tokens
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    child = subprocess.Popen(
        [sys.executable, "-c", GENERATE], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert child.stdout is not None
    try:
        while int(child.stdout.readline()) < 40:
            pass
        child.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        time.sleep(2)
        child.send_signal(signal.SIGCONT)
        said = child.stdout.read().splitlines()
        lasted = time.monotonic() - stopped
    finally:
        child.kill()
        child.wait()
    done = json.loads(said[-1])
    assert (done["tokens"], done["finish"]) == (expected, "length")
    assert done["tps"] < 300 / 2, f"it was stopped within the reply, for 2 of {lasted:.1f} s"
