"""What huggingface_hub raises, told in our words: what happened and what to do about it."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_mtp.errors import HubError, MtpError, StorageError

RANGE_REFUSED = 416  # what is here is longer than the file, which starts anew
RETRIED_STATUSES = (408, RANGE_REFUSED, 429, 500, 502, 503, 504)
SHOWN = 160  # characters of another library's message
FULL = (errno.ENOSPC, errno.EDQUOT)
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
AGAIN = "the next attempt goes on from there"


def site() -> str:
    """The hub's address for people."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def refusal(error: Exception, repo_id: str, revision: str) -> MtpError:
    """The error to raise for an answer that another attempt will not change."""
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubError(
            f"{repo_id}: is not completely in the cache, and HF_HUB_OFFLINE forbids the network; unset it to download"
        )
    if isinstance(error, errors.GatedRepoError):
        return HubError(
            f"{repo_id}: its publisher gives access only after its licence is accepted; accept it on "
            f"{site()}/{repo_id}, then {LOG_IN}, and try again"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(
            f"{repo_id}: has no revision {revision!r}; see the branches and tags on {site()}/{repo_id}/tree/main"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(
            f"{repo_id}: there is no such model on {site()}, or it is private; check the spelling "
            f"(organisation/name, as on its page), or for a private one {LOG_IN}"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return HubError(
            f"{repo_id}: the hub lists a file and does not have it; its publisher has to repair it, "
            "use another revision or model meanwhile"
        )
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if status in (401, 403):
        return HubError(
            f"{repo_id}: the hub refused the access token ({status}); {LOG_IN} anew with one that may read this model"
        )
    return HubError(
        f"{repo_id}: the hub answered {short(error)}; try again later, or check {site()}/{repo_id}"
    )


def unreachable(error: Exception, repo_id: str) -> HubError:
    """The error to raise once every attempt to reach the hub has failed."""
    return HubError(
        f"{repo_id}: cannot reach {site()} ({short(error)}); check the connection and try again; "
        "models in the cache work without it (`mlx-mtp models list`)"
    )


def bad_token(repo_id: str) -> HubError:
    return HubError(f"{repo_id}: the access token has characters that no token has; {LOG_IN} with a new one")


def web_page(repo_id: str, what: str) -> HubError:
    return HubError(
        f"{repo_id}: {what} came as a web page or in an unknown form, as from the login page of a hotel or a proxy; "
        "open a page in the browser, log in to the network, and try again"
    )


def storage_refusal(error: OSError, folder: Path) -> StorageError:
    """A full disk, or a folder that cannot be written."""
    if error.errno in FULL:
        return StorageError(
            f"{folder}: the disk became full during the download; free some space (`mlx-mtp models list` and `rm`), "
            "or set HF_HOME to a folder on another disk"
        )
    return StorageError(
        f"{folder}: cannot be read or written ({error.strerror or short(error)}); "
        "check who owns it, or set HF_HOME to a folder of your own"
    )


@contextmanager
def storage(folder: Path) -> Iterator[None]:
    """Within the block an OSError, such as a folder of another user, becomes a StorageError."""
    try:
        yield
    except OSError as error:
        raise storage_refusal(error, folder) from None


def short(error: Exception) -> str:
    """The first line of another library's message, or the name of its error."""
    lines = str(error).strip().splitlines()
    return lines[0][:SHOWN] if lines else type(error).__name__


def may_pass(error: Exception) -> bool:
    """Whether another attempt may succeed: the connection was cut, or the hub is busy."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code in RETRIED_STATUSES
    return not isinstance(error, errors.OfflineModeIsEnabled)
