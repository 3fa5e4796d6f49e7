"""Guards against SSRF: URLs of an untrusted table may be http or https, and never lead into the private network."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from tasks.ingest.http_checks import Refused

# The only block of IPv6 with global unicast addresses (RFC 4291, IANA). It excludes mapped, compatible and translated
# IPv4 addresses (::ffff:0:0/96, ::/96, 64:ff9b::/96), which stand for a host of IPv4.
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")


def is_public(address: str) -> bool:
    """Returns whether an IP address is global and unicast; an embedded IPv4 address must be too."""
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
    """Checks the URLs of a table and of redirects in three places.

    `check` reads the parsed URL that aiohttp gets, `resolve` drops private addresses of a host name, and `open_socket`
    checks the address of every connection before it is opened. So no private address is connected to, in whatever form
    a parser accepts it.

    Args:
        declared: a URL from the caller, not the table; the combination of its scheme, host and port may be private.
        allow_private: allows every address.
    """

    def __init__(self, declared: URL | None, allow_private: bool) -> None:
        self._resolver = aiohttp.ThreadedResolver()
        self._allow_private = allow_private
        self._declared = (declared.scheme, declared.raw_host or "", declared.port) if declared is not None else None
        # (address, port) of the declared host, and of what it resolves to.
        self._declared_addresses = {self._declared[1:]} if self._declared is not None else set()

    def check(self, url: URL) -> None:
        """Rejects other schemes and literal private addresses; `resolve` checks host names."""
        if url.scheme not in ("http", "https"):
            raise Refused("blocked_address", f"scheme {url.scheme!r}, expected http or https")
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
        """Returns the socket of one connection (aiohttp's `socket_factory`) after checking its address."""
        family, kind, protocol, _, (host, port, *_) = addr_info
        if not (self._allow_private or (host, port) in self._declared_addresses or is_public(host)):
            raise _BlockedAddress(f"{host} is not a public address")
        return socket.socket(family, kind, protocol)

    async def close(self) -> None:
        await self._resolver.close()

    def _is_declared(self, host: str, port: int) -> bool:
        return self._declared is not None and (host, port) == self._declared[1:]


class _BlockedAddress(OSError):
    """Raised by an `AddressGuard` inside aiohttp's connector."""


def blocked_cause(error: BaseException) -> Refused | None:
    """Returns the rejection by an `AddressGuard` that caused an error of aiohttp's connector, or None."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, _BlockedAddress):
            return Refused("blocked_address", str(cause))
        cause = cause.__cause__ or cause.__context__
    return None
