"""Options that several commands share, declared once: as the parameters of the function that makes a value of them."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

Command = Callable[..., None]


def takes(**groups: Callable[..., Any]) -> Callable[[Command], Command]:
    """A command each of whose parameters named here is what that function makes of the options in its own signature.

    Typer reads signatures: it is shown the functions' parameters in the place of the command's.
    """
    own = {name: inspect.signature(make).parameters for name, make in groups.items()}

    def with_groups(command: Command) -> Command:
        @functools.wraps(command)
        def typed(**given: Any) -> None:
            made = {name: groups[name](**{each: given.pop(each) for each in own[name]}) for name in groups}
            command(**given, **made)

        shown = [
            each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(command).parameters.values()
            for each in (own[parameter.name].values() if parameter.name in own else (parameter,))
        ]
        typed.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
        typed.__annotations__ = {}  # the signature has them
        return typed

    return with_groups
