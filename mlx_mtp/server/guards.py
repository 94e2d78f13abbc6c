"""Who may ask: hosts and origins that were allowed, and a key where there is one. Nothing is read before that.

A web page can make its visitor's browser send requests here. Another host name in `Host` (a name of the page's owner
that points to this machine) and any `Origin` are therefore refused unless they were allowed.
"""

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from starlette.datastructures import Headers

from mlx_mtp.errors import ParameterError
from mlx_mtp.server.refusals import KEY, Refusal

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
OPEN_PATHS = frozenset({"/health"})  # which says nothing but whether it works
SHORTEST_KEY = 8
LARGEST_HEADERS = 32 << 10  # bytes, names and values


@dataclass(frozen=True, slots=True)
class Guard:
    """What is let through; `keys` empty: no key is asked for, which loopback alone may have."""

    hosts: frozenset[str]
    origins: frozenset[str] = frozenset()
    keys: tuple[str, ...] = ()

    def check_place(self, headers: Headers) -> None:
        """Raise 403 for a host or origin that was not allowed, 431 for more headers than any client needs."""
        if sum(len(name) + len(value) for name, value in headers.raw) > LARGEST_HEADERS:
            raise Refusal(
                431, f"the headers have more than {LARGEST_HEADERS >> 10} KiB; send fewer", code="headers"
            )
        host = host_name(headers.get("host", ""))
        if host not in self.hosts:
            words = (
                f"requests for the host {host[:100]!r} are not answered; start the server with --allow-host"
            )
            raise Refusal(403, words, code="host")
        origin = headers.get("origin")
        if origin is not None and origin not in self.origins:
            words = f"pages of {origin[:100]!r} may not ask; start the server with --allow-origin"
            raise Refusal(403, words, code="origin")

    def check_key(self, path: str, headers: Headers) -> None:
        """Raise 401 where a key is needed and none of ours was sent."""
        if self.keys and path not in OPEN_PATHS and not self._has_key(headers):
            words = "a key is needed: send it as Authorization: Bearer KEY"
            raise Refusal(401, words, KEY, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    def _has_key(self, headers: Headers) -> bool:
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        # All are compared, hashed, so that time tells neither which key it was nor how much of it was right.
        return sum(hmac.compare_digest(_hashed(given), _hashed(own)) for own in self.keys) > 0


def make_guard(
    host: str,
    *,
    keys: Iterable[str] = (),
    allowed_hosts: Iterable[str] = (),
    origins: Iterable[str] = (),
) -> Guard:
    """For a server that listens at `host`. Raises ParameterError where others could ask without a key."""
    own_keys = tuple(keys)
    for key in own_keys:
        if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise ParameterError(
                f"a key has at least {SHORTEST_KEY} characters of ASCII without blanks; choose another one"
            )
    for origin in origins:
        if "://" not in origin or origin.endswith("/"):
            raise ParameterError(f"an origin looks like https://example.org, got {origin!r}; give it so")
    if not is_loopback(host) and not own_keys:
        raise ParameterError(
            f"others could use this server at {host}: give a key with --key-file, or listen at 127.0.0.1"
        )
    names = {name.lower().strip("[]") for name in allowed_hosts}
    return Guard(frozenset(LOOPBACK_NAMES | names | {host.lower()}), frozenset(origins), own_keys)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it; names other than localhost are looked up by nobody here."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_name(header: str) -> str:
    """A Host header without its port; "" for none."""
    header = header.strip().lower()
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


def _hashed(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
