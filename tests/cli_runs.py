"""A tiny random pair that can chat, and the command line run on it as a person would run it."""

import io
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

from mlx_mtp import Sampling, generate, load
from mlx_mtp.cli import main
from tiny_checkpoints import drafter_config, published_names, random_tensors, target_config, write_checkpoint
from tiny_tokenizer import write_tokenizer

COMMAND = [sys.executable, "-c", "from mlx_mtp.cli import main; main()"]
VOCAB = 512  # half of it single bytes, so that the random model writes every control character
CONTEXT = 512


def write_chat_pair(folder: Path) -> Path:
    """target/ with tokenizer and template beside drafter/ -> the target's folder."""
    changes = {"vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB, "max_position_embeddings": CONTEXT}
    target = target_config("e2b")
    target["text_config"] |= changes
    target["vocab_size"] = VOCAB
    drafter = drafter_config("e2b")
    drafter["text_config"] |= changes | {"vocab_size_per_layer_input": 0}
    path = folder / "target"
    eos = write_tokenizer(path, VOCAB)
    target["eos_token_id"] = target["text_config"]["eos_token_id"] = list(eos)
    write_checkpoint(path, target, published_names(random_tensors(target), "model.language_model."))
    write_checkpoint(folder / "drafter", drafter, published_names(random_tensors(drafter), "model."))
    return path


def babble(model: Path, *, temperature: float = 3.0, tokens: int = 300) -> tuple[str, ...]:
    """Words after `generate MODEL` for a reply of at least `tokens` tokens with ESC among its characters."""
    pair = load(model)
    for seed in range(50):
        sampling = Sampling(temperature=temperature, seed=seed)
        options = {"max_tokens": tokens, "sampling": sampling, "num_draft_tokens": 0}
        out = generate(pair, [{"role": "user", "content": "Why?"}], **options)
        if out.finish_reason == "length" and "\x1b" in out.text:
            words = {
                "--max-tokens": tokens,
                "--seed": seed,
                "--temperature": temperature,
                "--top-k": 0,
                "--top-p": 1,
            }
            return ("Why?", "--mtp", "off", *(str(part) for item in words.items() for part in item))
    raise AssertionError("no seed gives such a reply")


def environment(**changes: str | None) -> dict[str, str]:
    """This process's variables with some set or (None) removed; no terminal is promised, and HOME is the test's own.

    Commands remember the model used last: neither in the folders of whoever runs the tests nor in another test's.
    """
    home: dict[str, str | None] = {
        "HOME": str(Path(os.environ["XDG_DATA_HOME"]).parent),  # set by conftest for each test
        "XDG_DATA_HOME": None,
        "XDG_CACHE_HOME": None,
    }
    merged = {**os.environ, "TERM": "dumb", **home, **changes}
    return {name: value for name, value in merged.items() if value is not None}


def run_cli(
    *words: str | Path, stdin: bytes = b"", **variables: str | None
) -> subprocess.CompletedProcess[bytes]:
    """`mlx-mtp WORDS` with piped stdin, stdout and stderr."""
    command = [*COMMAND, *map(str, words)]
    return subprocess.run(
        command, input=stdin, capture_output=True, timeout=300, env=environment(**variables)
    )


def run_main(
    *words: str | Path, stdin: bytes = b"", screen: io.BytesIO | None = None, **variables: str | None
) -> subprocess.CompletedProcess[bytes]:
    """The same within this process, which saves starting one: for what depends on neither signals nor streams."""
    words = tuple(map(str, words))
    outputs = (screen or io.BytesIO(), io.BytesIO())
    out, err = (io.TextIOWrapper(output, encoding="utf-8", write_through=True) for output in outputs)
    given = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    streams = mock.patch.multiple(sys, argv=["mlx-mtp", *words], stdin=given, stdout=out, stderr=err)
    with streams, mock.patch.dict(os.environ, environment(**variables), clear=True):
        try:
            main()
        except SystemExit as left:
            code = left.code
    assert isinstance(code, int)
    return subprocess.CompletedProcess(words, code, out.buffer.getvalue(), err.buffer.getvalue())


def one_line(stderr: bytes) -> str:
    """The only line of a refusal: no traceback, no second line."""
    text = stderr.decode()
    assert text.startswith("mlx-mtp: "), text
    assert text.count("\n") == 1, text
    return text.removeprefix("mlx-mtp: ").rstrip()
