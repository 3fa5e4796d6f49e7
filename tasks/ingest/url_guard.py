"""Which addresses a table of strangers may make us ask: http and https, and never one inside the private network."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from tasks.ingest.http_checks import Refused

# Ranges of IPv6 that carry an IPv4 address the check must see; ::ffff:0:0/96 and 2002::/16 are taken apart below.
_TRANSLATED = [ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48")]


def is_public(address: str) -> bool:
    """Whether an IP address is one that a stranger's table may name: global, unicast, and not a disguise of another."""
    try:
        ip = ipaddress.ip_address(address.split("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if any(ip in network for network in _TRANSLATED):
            return False
        inner = ip.ipv4_mapped or ip.sixtofour
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


class AddressGuard(AbstractResolver):
    """Checks every URL, and resolves names to public addresses alone; aiohttp connects to what `resolve` returns, so
    that rebinding a name cannot help.

    Args:
        declared: a URL that the caller, not the table, has named; its host and port may be private.
        allow_private: let everything be private.
    """

    def __init__(self, declared: str | None, allow_private: bool) -> None:
        self._resolver = aiohttp.ThreadedResolver()
        self._allow_private = allow_private
        parts = urlsplit(declared) if declared is not None else None
        self._declared = (parts.hostname, parts.port) if parts is not None else None

    def check(self, url: str) -> None:
        """Refuses other schemes and literal private addresses; names are checked where they are resolved."""
        try:
            parts = urlsplit(url)
            host, scheme = parts.hostname, parts.scheme
            place = (host, parts.port)
        except ValueError as error:
            raise Refused("bad_url", "not a URL that can be asked for") from error
        if scheme not in ("http", "https"):
            raise Refused("blocked_address", f"scheme {scheme!r}, only http and https are fetched")
        if not host:
            raise Refused("bad_url", "no host")
        if self._allow_private or place == self._declared:
            return
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return
        if not is_public(host):
            raise Refused("blocked_address", f"{host} is not a public address")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._resolver.resolve(host, port, family)
        declared = self._declared is not None and self._declared[0] == host and self._declared[1] in (port, None)
        if self._allow_private or declared:
            return found
        public = [result for result in found if is_public(result["host"])]
        if not public:
            raise _BlockedAddress(f"{host} is not a public address")
        return public

    async def close(self) -> None:
        await self._resolver.close()


class _BlockedAddress(OSError):
    """Raised by the resolver, inside aiohttp's connector."""


def blocked_cause(error: BaseException) -> Refused | None:
    """The refusal of `AddressGuard.resolve` where aiohttp's error stems from one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, _BlockedAddress):
            return Refused("blocked_address", str(cause))
        cause = cause.__cause__ or cause.__context__
    return None
