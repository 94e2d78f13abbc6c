"""Chats in asyncio: several replies at once, one stopped early, on one engine. python asyncio_chat.py [MODEL]"""

import asyncio
import sys

from mlx_mtp import Engine, MtpError, Sampling

QUESTIONS = ("What is MLX?", "What is a drafter?", "What does lossless mean here?")
GREEDY = Sampling(temperature=0.0)


async def reply_to(engine: Engine, number: int, question: str) -> None:
    """One reply, each line of it printed as soon as it is whole."""
    line = ""
    handle = engine.submit([{"role": "user", "content": question}], max_tokens=64, sampling=GREEDY)
    async for chunk in handle:  # the event loop goes on meanwhile; leaving the loop cancels the reply
        *lines, line = (line + chunk.text).split("\n")
        for whole in lines:
            print(f"{number}  {whole}")
    print(f"{number}  {line}")
    stats = (await handle).stats
    print(f"{number}  ({stats.generation_tokens} tokens, {stats.tokens_per_round:.1f} a round)")


async def stopped_early(engine: Engine) -> None:
    """A reply is cancelled after a tenth of a second; within a round it ends, and its text is kept."""
    handle = engine.submit("import os", max_tokens=1000, sampling=GREEDY)
    asyncio.get_running_loop().call_later(0.1, handle.cancel)
    result = await handle
    print(f"stopped: {result.finish_reason} after {len(result.tokens)} tokens")


async def main(model: str) -> None:
    # Loading takes a while, so it happens on another thread; closing waits for the round that runs.
    engine = await asyncio.to_thread(Engine, model)
    try:
        await asyncio.gather(*(reply_to(engine, i, question) for i, question in enumerate(QUESTIONS, 1)))
        await stopped_early(engine)
    finally:
        await asyncio.to_thread(engine.close)


if __name__ == "__main__":
    try:
        asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "demo"))
    except MtpError as error:
        raise SystemExit(f"error: {error}") from None
