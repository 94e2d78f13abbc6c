"""/save, /load and /resume: conversations as files, with their K/V beside them where that was asked for."""

from pathlib import Path

from mlx_mtp.cli.session import Session
from mlx_mtp.cli.sizes import bytes_text
from mlx_mtp.cli.terminal import say
from mlx_mtp.cli.transcripts import (
    conversation_path,
    kept_conversations,
    kv_path,
    listing,
    load_conversation,
    save_conversation,
)
from mlx_mtp.errors import MtpError, ParameterError

WITH_KV = "--kv"


def save(session: Session, argument: str) -> None:
    """/save [NAME] [--kv]: the words, and on request what the model computed of them."""
    words = argument.split()
    with_kv, names = WITH_KV in words, [word for word in words if word != WITH_KV]
    talk = session.talk
    path = conversation_path(" ".join(names)) if names else talk.kept_as
    if path is None:
        raise ParameterError("a name or a path is needed here: /save NAME")
    if path != talk.kept_as:
        talk.kv = None  # which lie beside the other file
    size = None
    if with_kv:
        talk.kv, size = session.save_kv(kv_path(path))
    elif talk.kv is None:
        _remove_kv(path)
    save_conversation(path, talk.transcript())
    talk.kept_as = path
    say(f"(saved: {path})" if size is None else f"(saved: {path}, and {bytes_text(size)} of K/V beside it)")


def load(session: Session, argument: str) -> None:
    """/load NAME."""
    if not argument:
        raise ParameterError("/load takes a name or a path; /resume lists what was kept")
    go_on_with(session, conversation_path(argument))


def resume(session: Session, argument: str) -> None:
    """/resume [I]."""
    kept = [one for one in kept_conversations() if one[0] != session.talk.kept_as]
    if not kept:
        say("no conversation was kept here yet")
    elif not argument:
        say(f"{listing(kept)}\n/resume I goes on with one of them")
    elif argument.isascii() and argument.isdigit() and 1 <= int(argument) <= len(kept):
        go_on_with(session, kept[int(argument) - 1][0])
    else:
        raise ParameterError(f"choose one of 1 .. {len(kept)}, got {argument!r:.40}; /resume lists them")


def go_on_with(session: Session, path: Path) -> None:
    """Take a kept conversation up, with its K/V if they fit; each further turn is kept there. Raises StorageError."""
    transcript = load_conversation(path)
    session.talk.go_on_with(transcript, path)
    asked = sum(message["role"] == "user" for message in transcript.messages)
    other = "" if transcript.model == session.talk.model else f", which was with {transcript.model}"
    say(f"(going on with {path.stem}: {asked} {'message' if asked == 1 else 'messages'}{other})")
    if transcript.kv is None:
        return
    try:
        tokens = session.load_kv(kv_path(path), transcript.kv)
    except MtpError as error:
        say(f"(its K/V are not used: {error}; the conversation is read anew)")
    else:
        say(f"(with the K/V of {tokens:,} tokens)")


def _remove_kv(path: Path) -> None:
    """What an earlier conversation under this name left, and nothing could use any more."""
    try:
        kv_path(path).unlink(missing_ok=True)
    except OSError as error:
        say(f"({kv_path(path).name} is of no use any more and cannot be removed: {error.strerror})")
