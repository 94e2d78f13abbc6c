"""Text <-> token ids, with control tokens inert: no text, whatever it says, encodes to a control id."""

import codecs
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

from mlx_mtp.config_fields import shown_name
from mlx_mtp.errors import CheckpointError, PromptError
from mlx_mtp.model_files import LARGEST_TOKENIZER, own_file

MAX_TEXT_CHARS = 1 << 22  # 16 characters a token at Gemma's longest context; refused before any slow work

# Some checkpoints list tool and channel markers as ordinary added tokens; their shape gives them away.
_CONTROL_SHAPE = re.compile(r"<\|.+>|<.+\|>", re.DOTALL)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """A checkpoint's tokenizer.json; `control_ids` are the tokens that text can never produce.

    Raises CheckpointError where the file is damaged or decodes in a way that cannot be streamed.
    """

    def __init__(self, inner: tokenizers.Tokenizer, *, source: str = "tokenizer.json") -> None:
        self._inner = inner
        unknown = inner.token_to_id("<unk>")
        controls = {
            index: token
            for index, token in inner.get_added_tokens_decoder().items()
            if token.special or _CONTROL_SHAPE.fullmatch(token.content)
        }
        inner.add_special_tokens([_as_special(token) for token in controls.values()])
        inner.encode_special_tokens = True  # "encode them as ordinary text"
        inner.no_truncation()
        inner.no_padding()
        self.vocab_size: int = inner.get_vocab_size(with_added_tokens=True)
        self.special_ids = frozenset(controls)
        self.control_ids = self.special_ids - {unknown}  # text without byte fallback may contain <unk>
        self.controls: dict[str, tokenizers.AddedToken] = {t.content: t for t in controls.values()}
        self._bytes: dict[int, bytes] = {}
        self._byte_fallback = _check_decoder(inner, source)

    def encode(self, text: str) -> list[int]:
        """-> ids [n] of `text`, never a control id; they decode to `text` again (but "▁" to a space)."""
        check_text(text)
        ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        if self.control_ids.isdisjoint(ids):
            return ids
        # Some vocabularies reach a control token by ordinary merges; spell those out.
        return [part for i in ids for part in (self._spelled(i) if i in self.control_ids else (i,))]

    def decode(self, ids: Iterable[int]) -> str:
        """-> the text of `ids`; control tokens give none, nor does a character cut off at the end."""
        data = b"".join(self.token_bytes(i) for i in ids if i not in self.special_ids)
        return codecs.getincrementaldecoder("utf-8")("replace").decode(data)

    def token_id(self, text: str) -> int | None:
        """-> the id of the token that is written `text`, or None."""
        index: int | None = self._inner.token_to_id(text)
        return index

    def token_text(self, index: int) -> str:
        """-> how the vocabulary writes token `index`; "" where it has no such id."""
        return self._inner.id_to_token(index) or ""

    def token_bytes(self, index: int) -> bytes:
        """-> the UTF-8 bytes that token `index` adds to a text, perhaps a part of a character."""
        known = self._bytes.get(index)
        if known is None:
            token = self.token_text(index)
            byte = _BYTE_TOKEN.fullmatch(token) if self._byte_fallback else None
            known = bytes([int(byte[1], 16)]) if byte else self._inner.decoder.decode([token]).encode()
            self._bytes[index] = known
        return known

    def _spelled(self, index: int) -> list[int]:
        """-> ids that spell a control token's text one character at a time."""
        spelled = [self._inner.encode(char, add_special_tokens=False).ids for char in self.token_text(index)]
        ids = [part for one in spelled for part in one]
        if not self.control_ids.isdisjoint(ids):
            raise CheckpointError(
                f"the tokenizer makes the single characters of {self.token_text(index)!r} control tokens; "
                "download the model again"
            )
        return ids


def read_tokenizer(folder: Path) -> Tokenizer:
    """-> the tokenizer in `folder`/tokenizer.json; raises CheckpointError where it is missing or damaged."""
    path = folder / "tokenizer.json"
    if own_file(folder, path.name) is None:
        raise CheckpointError(f"{path} is missing: a model needs its tokenizer; download the model again")
    if path.stat().st_size > LARGEST_TOKENIZER:
        raise CheckpointError(
            f"{path}: must be at most {LARGEST_TOKENIZER >> 20} MB; download the model again"
        )
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises nothing more specific
        raise CheckpointError(
            f"{path} is damaged: {shown_name(str(error)[:200])}; download the model again"
        ) from error
    return Tokenizer(inner, source=str(path))


def check_text(text: str) -> None:
    """Raise PromptError where `text` is too long to be a prompt or holds half a surrogate pair."""
    if len(text) > MAX_TEXT_CHARS:
        raise PromptError(
            f"a prompt has at most {MAX_TEXT_CHARS:,} characters, got {len(text):,}; shorten the text"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"text must be valid Unicode, got a lone surrogate U+{ord(text[error.start]):04X} "
            f"at character {error.start}; re-encode the text as UTF-8"
        ) from None


def _as_special(token: tokenizers.AddedToken) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=True,
    )


def _check_decoder(inner: tokenizers.Tokenizer, source: str) -> bool:
    """-> whether <0xNN> tokens are bytes; refuses decoders whose text is not the sum of the tokens' texts."""
    decoder: Any = inner.decoder
    if decoder is None or decoder.decode(["▁a", "▁b"]) != decoder.decode(["▁a"]) + decoder.decode(["▁b"]):
        raise CheckpointError(
            f"{source}: the decoder must turn each token into text on its own, as Gemma's does; "
            "use the tokenizer published with the model"
        )
    return bool(decoder.decode(["<0x41>"]) == "A")
