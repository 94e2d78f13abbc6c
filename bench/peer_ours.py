"""Our arm of peers.py: the stream that `generate` and chat read, with its text and statistics."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
from peer_arm import Clock, Job, Play, Reply, run_arm
from peer_watch import BUILD, watching

import mlx_mtp
import mlx_mtp.decode
from mlx_mtp.checkpoint import read_drafter, read_target
from mlx_mtp.conversation import Conversation
from mlx_mtp.drafter import make_drafter
from mlx_mtp.pair import Pair
from mlx_mtp.round import Rounds
from mlx_mtp.sampling import Sampling
from mlx_mtp.target import make_target

GREEDY = Sampling(temperature=0.0)
WATCHING = partial(watching, (mlx_mtp.decode, "_build", BUILD))
TESTS = Path(__file__).resolve().parent.parent / "tests"


def open_pair(job: Job) -> Pair:
    """The pair, its end-of-turn ids ignored so that every reply has the same length."""
    if (Path(job.target) / "tokenizer.json").is_file():
        dtype = mx.float32 if job.float32 else None
        pair = mlx_mtp.load(job.target, drafter=job.drafter, dtype=dtype)
        return replace(pair, prompt_format=replace(pair.prompt_format, eos_ids=frozenset()))
    return without_tokenizer(Path(job.target), Path(job.drafter))


def without_tokenizer(target_folder: Path, drafter_folder: Path) -> Pair:
    """A pair of the tests, which have no tokenizer of their own, in float32 with the tests' tiny one."""
    sys.path.insert(0, str(TESTS))
    from pairs import prompt_format

    checkpoint, small = read_target(target_folder), read_drafter(drafter_folder)
    target = make_target(checkpoint.config, checkpoint.tensors)
    drafter = make_drafter(small.config, small.tensors)
    return Pair(
        name=target_folder.parent.name,
        target=target,
        drafter=drafter,
        prompt_format=prompt_format(),
        sampling=GREEDY,
        max_context=checkpoint.config.text.max_position_embeddings,
        rounds=Rounds(target, drafter),
    )


def open_arm(job: Job) -> Play:
    conversation = Conversation(open_pair(job))

    def play(ids: list[int], clock: Clock) -> Reply:
        conversation.clear()
        chunks = conversation.stream(ids, max_tokens=job.tokens, sampling=GREEDY, num_draft_tokens=job.drafts)
        taken = [next(chunks)]
        clock.start()
        taken.extend(chunks)
        mx.synchronize()
        clock.stop()
        stats = taken[-1].stats
        return Reply([token for chunk in taken for token in chunk.tokens], stats.rounds, stats.accepted)

    return play


if __name__ == "__main__":
    run_arm(open_arm, ("mlx-mtp", "mlx"), WATCHING)
