"""`chat` without a model: the one used last, else the one that suits this machine, after a question."""

from dataclasses import replace
from pathlib import Path

from mlx_mtp.cli.downloads import ask_for, find_missing, size_in_words
from mlx_mtp.cli.opening import DEMO, Opening
from mlx_mtp.cli.question import can_ask
from mlx_mtp.cli.terminal import say
from mlx_mtp.errors import MtpError, ParameterError


def choose_model(asked: Opening) -> Opening:
    """`asked`, which names no model -> the same with the model to open, its download agreed to."""
    last = _used_last(asked)
    if last is not None:
        say(f"{last}, as last time. Another model: mlx-mtp chat MODEL")
        return replace(asked, model=last)
    return _recommended(asked)


def remember(asked: Opening) -> None:
    """Keep the model's name for the next `chat`, unless the name alone would open something else, or it is the demo."""
    from mlx_mtp.store import remember_model

    if asked.model == DEMO or not asked.is_plain:
        return
    name = asked.model
    if name.startswith((".", "~", "/")):
        name = str(Path(name).expanduser().resolve())
    warning = remember_model(name)
    if warning is not None:
        say(f"warning: {warning}")


def _used_last(asked: Opening) -> str | None:
    """The name of the model used last, if it is still on this disk."""
    from mlx_mtp.store import last_model

    record = last_model()
    if record.warning is not None:
        say(f"warning: {record.warning}")
    name = record.value
    if name is None:
        return None
    try:
        missing = find_missing(replace(asked, model=name))
    except MtpError:  # a folder that is gone, or a name from another version
        missing = None
    if missing is None or missing.lacks_target:
        say(f"{name} was used last and is not on this disk any more.")
        return None
    return str(name)


def _recommended(asked: Opening) -> Opening:
    """The model for this machine: at once where it is on the disk, else after a question."""
    from mlx_mtp.admission import GIB
    from mlx_mtp.machine import check_machine, this_machine
    from mlx_mtp.recommend import recommend

    machine = this_machine()
    check_machine(machine)
    choice = recommend(machine)
    chosen = replace(asked, model=choice.alias.name)
    missing = find_missing(chosen)
    if not missing.lacks_target or asked.yes:
        say(f"{chosen.model} suits this machine. Another model: mlx-mtp chat MODEL")
        return chosen
    if not can_ask():
        raise ParameterError(
            f"no model was named; for this machine: mlx-mtp models pull {chosen.model}"
            f"{size_in_words(choice.alias)}, then mlx-mtp chat {chosen.model}; without a download: mlx-mtp chat demo"
        )
    memory = f"{machine.memory_bytes / GIB:.0f} GB of memory"
    reason = (
        f"No model was named. For this machine, {machine.chip} with {memory}: {chosen.model}. {choice.reason}"
    )
    return ask_for(chosen, missing, reason)
