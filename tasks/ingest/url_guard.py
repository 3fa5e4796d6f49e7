"""Which addresses a table of strangers may make us ask: http and https, and never one inside the private network."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from tasks.ingest.http_checks import Refused

# The one block of IPv6 from which global unicast addresses are assigned (RFC 4291, IANA). Outside it lie mapped,
# compatible and translated IPv4 addresses (::ffff:0:0/96, ::/96, 64:ff9b::/96), which name a host of IPv4.
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")


def is_public(address: str) -> bool:
    """Whether an IP address is one that a stranger's table may name: global, unicast, and no other address inside."""
    try:
        ip = ipaddress.ip_address(address.split("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if inner is not None:
            return is_public(str(inner))
        if ip not in _GLOBAL_UNICAST:
            return False
    return ip.is_global and not ip.is_multicast


class AddressGuard(AbstractResolver):
    """Checks what a table or a redirect makes us connect to, at three places.

    `check` reads the parsed URL that aiohttp is given, `resolve` drops private addresses of a name, and `open_socket`
    checks the address of every connection before it is opened: whatever spelling of an address a parser accepts, no
    private one is connected to.

    Args:
        declared: a URL that the caller, not the table, names; its scheme, host and port may be private together.
        allow_private: let everything be private.
    """

    def __init__(self, declared: URL | None, allow_private: bool) -> None:
        self._resolver = aiohttp.ThreadedResolver()
        self._allow_private = allow_private
        self._declared = (declared.scheme, declared.raw_host or "", declared.port) if declared is not None else None
        # The addresses, with the port, that the declared host is or resolves to.
        self._declared_addresses = {self._declared[1:]} if self._declared is not None else set()

    def check(self, url: URL) -> None:
        """Rejects other schemes and literal private addresses; names are checked where they are resolved."""
        if url.scheme not in ("http", "https"):
            raise Refused("blocked_address", f"scheme {url.scheme!r}, only http and https are fetched")
        host = url.raw_host
        if not host or url.port is None:
            raise Refused("bad_url", "no host")
        if self._allow_private or (url.scheme, host, url.port) == self._declared:
            return
        if self._is_declared(host, url.port):
            raise Refused("blocked_address", f"scheme {url.scheme!r}, the declared URL has another")
        try:
            ipaddress.ip_address(host.split("%")[0])
        except ValueError:
            return
        if not is_public(host):
            raise Refused("blocked_address", f"{host} is not a public address")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        results = await self._resolver.resolve(host, port, family)
        if self._allow_private:
            return results
        if self._is_declared(host, port):
            self._declared_addresses |= {(result["host"], port) for result in results}
            return results
        public = [result for result in results if is_public(result["host"])]
        if not public:
            raise _BlockedAddress(f"{host} is not a public address")
        return public

    def open_socket(self, addr_info: tuple[Any, Any, int, str, tuple[Any, ...]]) -> socket.socket:
        """The socket of one connection (aiohttp's `socket_factory`), given the address that it will connect to."""
        family, kind, protocol, _, (host, port, *_) = addr_info
        if not (self._allow_private or (host, port) in self._declared_addresses or is_public(host)):
            raise _BlockedAddress(f"{host} is not a public address")
        return socket.socket(family, kind, protocol)

    async def close(self) -> None:
        await self._resolver.close()

    def _is_declared(self, host: str, port: int) -> bool:
        return self._declared is not None and (host, port) == self._declared[1:]


class _BlockedAddress(OSError):
    """Raised inside aiohttp's connector."""


def blocked_cause(error: BaseException) -> Refused | None:
    """The refusal of an `AddressGuard` inside aiohttp's connector, where its error stems from one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, _BlockedAddress):
            return Refused("blocked_address", str(cause))
        cause = cause.__cause__ or cause.__context__
    return None
