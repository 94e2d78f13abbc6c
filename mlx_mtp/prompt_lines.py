"""Files of prompts: one JSON object a line in, one a line out, and which of them were answered already."""

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mlx_mtp.errors import MtpError, ParameterError, PromptError, StorageError
from mlx_mtp.reply import Generation
from mlx_mtp.sampling import Sampling

FIELDS = ("prompt", "messages", "id", "max_tokens", "sampling", "seed", "stop", "thinking", "tools")
SETTINGS = tuple(field.name for field in fields(Sampling))
LARGEST_LINE = 32 << 20  # bytes; beyond what any context holds


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a file of prompts: its number from 1, its bytes, and the digest by which its answer is known."""

    number: int
    text: bytes

    @property
    def key(self) -> str:
        return hashlib.sha256(self.text).hexdigest()[:16]

    @property
    def id(self) -> Any:
        """The `id` that the line gives itself; None where it has none or is no object."""
        try:
            value = json.loads(self.text)
        except (ValueError, RecursionError):
            return None
        return value.get("id") if isinstance(value, dict) else None


def read_lines(path: Path) -> list[Line]:
    """The lines of a file of prompts, without those that are blank. Raises PromptError."""
    try:
        with path.open("rb") as file:
            stripped = [(number, text.strip()) for number, text in enumerate(file, 1)]
    except OSError as error:
        raise PromptError(
            f"{path} cannot be read: {error.strerror}; give a file with a JSON object a line"
        ) from None
    return [Line(number, text) for number, text in stripped if text]


def request_of(line: Line, sampling: Sampling, *, as_text: bool) -> dict[str, Any]:
    """A line -> arguments of `make_request`; `sampling` is what it leaves unsaid. Raises PromptError, ParameterError.

    A prompt becomes a user's message, unless `as_text` asks for it as it is.
    """
    asked = _object(line)
    unknown = [name for name in asked if name not in FIELDS]
    if unknown:
        raise PromptError(f"a line has {', '.join(FIELDS)}, got {unknown[0]!r}; leave it out")
    if ("prompt" in asked) == ("messages" in asked):
        raise PromptError('a line has either "prompt" or "messages"; give one of them')
    prompt = asked.pop("messages", None)
    if prompt is None:
        prompt = asked.pop("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise PromptError('"prompt" is a text that is not empty; give one, or "messages"')
        prompt = prompt if as_text else [{"role": "user", "content": prompt}]
    elif not isinstance(prompt, list):
        raise PromptError('"messages" is a list of {"role": ..., "content": ...}; give one, or "prompt"')
    asked.pop("id", None)
    own = _sampling(asked.pop("sampling", None), asked.pop("seed", None), sampling)
    return {"prompt": prompt, "sampling": own, **asked}


def _object(line: Line) -> dict[str, Any]:
    if len(line.text) > LARGEST_LINE:
        raise PromptError(f"a line holds at most {LARGEST_LINE >> 20} MiB; shorten the prompt")
    try:
        value = json.loads(line.text.decode("utf-8"))
    except UnicodeDecodeError:
        raise PromptError("the line is not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise PromptError(f"the line is not JSON ({error}); write one object a line") from None
    if not isinstance(value, dict):
        raise PromptError('a line is a JSON object; write {"prompt": "..."}')
    return value


def _sampling(given: Any, seed: Any, default: Sampling) -> Sampling:
    if given is None:
        given = {}
    if not isinstance(given, dict) or any(name not in SETTINGS for name in given):
        raise ParameterError(f'"sampling" is an object with {", ".join(SETTINGS)}; leave out anything else')
    if seed is not None:
        given = given | {"seed": seed}
    if isinstance(given.get("logit_bias"), dict):  # JSON's names are texts
        try:
            given = given | {"logit_bias": {int(token): bias for token, bias in given["logit_bias"].items()}}
        except ValueError:
            raise ParameterError('"logit_bias" has token ids for names; give numbers') from None
    return replace(default, **given)


def answer_line(line: Line, reply: Generation) -> dict[str, Any]:
    """What is written for a line whose reply has ended; one that ended for want of memory has an error, too."""
    stats = reply.stats
    answer = {
        "id": line.id,
        "line": line.number,
        "text": reply.text,
        "thought": reply.thought,
        "tool_call": reply.tool_call,
        "finish_reason": reply.finish_reason,
        "seed": stats.seed,
        "prompt_tokens": stats.prompt_tokens,
        "generation_tokens": stats.generation_tokens,
        "key": line.key,
    }
    if reply.finish_reason == "error":
        answer["error"] = {"code": "generation", "message": reply.note}
    return answer


def error_line(line: Line, error: MtpError) -> dict[str, Any]:
    """What is written for a line that cannot be answered."""
    return {
        "id": line.id,
        "line": line.number,
        "error": {"code": error.code, "message": str(error)},
        "key": line.key,
    }


class Answers:
    """The file of answers: what it holds already, and each new line written at once and whole.

    Lines with an error, and one torn by a crash, are taken out when it is opened: they are answered again.
    """

    def __init__(self, path: Path):
        self.path = path
        kept = list(self._kept())
        self._answered = Counter(value["key"] for _, value in kept)
        try:
            if path.exists():
                self._rewrite([text for text, _ in kept])
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise self._refusal(error) from None

    def take(self, line: Line) -> bool:
        """Whether `line` was answered by an earlier run; of lines that are alike each counts once."""
        if not self._answered[line.key]:
            return False
        self._answered[line.key] -= 1
        return True

    def write(self, answer: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(answer).encode() + b"\n")
        except OSError as error:
            raise self._refusal(error) from None

    def close(self) -> None:
        self._file.close()

    def _kept(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        if not self.path.exists():
            return
        for line in read_lines(self.path):
            try:
                value = json.loads(line.text)
            except (ValueError, RecursionError):
                value = None
            is_ours = isinstance(value, dict) and isinstance(value.get("key"), str)
            if not is_ours and line.text.startswith(b'{"id"') and value is None:
                continue  # torn
            if not is_ours:
                raise PromptError(
                    f"line {line.number} of {self.path} is no answer of this command; give another file to write to"
                )
            if "error" not in value:
                yield line.text, value

    def _rewrite(self, lines: list[bytes]) -> None:
        """The file with these lines, in one step, so that an interrupt loses none."""
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.writelines(line + b"\n" for line in lines)
                os.fchmod(file.fileno(), self.path.stat().st_mode & 0o777)
            os.replace(name, self.path)
        except BaseException:
            os.unlink(name)
            raise

    def _refusal(self, error: OSError) -> StorageError:
        return StorageError(
            f"{self.path} cannot be written: {error.strerror}; make room, or give a file in a folder that can be "
            "written to"
        )
