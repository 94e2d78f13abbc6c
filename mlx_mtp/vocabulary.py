"""Whether a tokenizer's ids fit a model's vocabulary."""

from pathlib import Path
from typing import Any

from mlx_mtp.errors import CheckpointError
from mlx_mtp.model_files import LARGEST_TOKENIZER, read_json


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Refuse a folder whose tokenizer.json is missing, unreadable or has ids beyond the model's embedding.

    A tokenizer with fewer tokens than the embedding has rows is fine: embeddings are padded. Parses the file
    as JSON only, about half a second for 262 144 tokens.
    """
    path = folder / "tokenizer.json"
    largest = largest_id(read_json(path, largest=LARGEST_TOKENIZER))
    if largest is None:
        raise CheckpointError(f"{path}: must list its tokens under model.vocab; download the model again")
    if largest >= vocab_size:
        raise CheckpointError(
            f"{path}: token ids must be below config.json's vocab_size {vocab_size}, got {largest}; "
            "use the tokenizer.json published with this model"
        )


def largest_id(tokenizer: Any) -> int | None:
    """The highest id among the vocabulary and the added tokens, None where the file lists none."""
    model = tokenizer.get("model") if isinstance(tokenizer, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        ids = [value for value in vocab.values() if isinstance(value, int)]
    else:  # Unigram: the id is the place in the list
        ids = [len(vocab) - 1] if isinstance(vocab, list) and vocab else []
    added = tokenizer.get("added_tokens") if isinstance(tokenizer, dict) else None
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and isinstance(token.get("id"), int):
            ids.append(token["id"])
    return max(ids, default=None)
