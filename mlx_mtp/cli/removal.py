"""What is removed with a model: its drafter unless another model needs it, and quantised copies of it."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mlx_mtp.cli.sizes import bytes_text
from mlx_mtp.errors import MtpError, ParameterError

if TYPE_CHECKING:
    from mlx_mtp.cache import CachedModel
    from mlx_mtp.kept_quantized import KeptCopy


@dataclass(frozen=True, slots=True)
class Removal:
    """Models and quantised copies that go together; `kept` says in words what stays and why."""

    models: tuple["CachedModel", ...]
    copies: tuple["KeptCopy", ...]
    kept: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return sum(model.bytes for model in self.models) + sum(copy.nbytes for copy in self.copies)

    def lines(self) -> list[str]:
        return [
            *(f"{bytes_text(model.bytes)}  {model.repo_id} ({model.kind})" for model in self.models),
            *(
                f"  {bytes_text(copy.nbytes)}  its {copy.bits}-bit copy {copy.path.name}"
                for copy in self.copies
            ),
            *self.kept,
        ]

    def remove(self) -> int:
        from mlx_mtp.cache import remove_cached
        from mlx_mtp.kept_quantized import remove_copy

        freed = sum(remove_copy(copy) for copy in self.copies)
        return freed + sum(remove_cached(model.repo_id) for model in self.models)


def find_removal(text: str) -> Removal:
    """What goes when the model named `text` is removed; ParameterError where it isn't in the cache."""
    from mlx_mtp.cache import list_cached
    from mlx_mtp.hub import parse_name
    from mlx_mtp.kept_quantized import kept_copies

    name = parse_name(text)
    cached = {model.repo_id: model for model in list_cached()}
    chosen = cached.get(name.repo_id or "")
    if chosen is None:
        raise ParameterError(f"{text} is not in the cache of downloads; mlx-mtp models list shows what is")
    models, kept = [chosen], []
    drafter = cached.get(_drafter_of(chosen) or "")
    if drafter is not None:
        users = [other.repo_id for other in cached.values() if _drafter_of(other) == drafter.repo_id]
        users.remove(chosen.repo_id)
        if users:
            kept.append(f"{drafter.repo_id} stays: {users[0]} uses it")
        else:
            models.append(drafter)
    copies = tuple(copy for copy in kept_copies() if copy.source.rpartition("@")[0] == chosen.repo_id)
    return Removal(tuple(models), copies, tuple(kept))


def _drafter_of(model: "CachedModel") -> str | None:
    """The id of the drafter that a target in the cache is opened with, None for what is no target."""
    from mlx_mtp.hub import drafter_for, parse_name

    if model.kind != "target":
        return None
    from mlx_mtp.aliases import ALIASES

    try:
        name = parse_name(model.repo_id)
        alias = next((alias for alias in ALIASES if alias.target == model.repo_id), None)
        drafter = drafter_for(replace(name, alias=alias), model.path, "auto")
    except MtpError:  # a damaged or foreign config.json keeps nothing from being removed
        return None
    return None if drafter is None else drafter.repo_id
