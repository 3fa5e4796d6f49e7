"""Guards against SSRF: URLs of others may be http or https, and never lead into the private network."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL


class Refused(Exception):
    """Raised when one attempt fails, with its reason; `retry_after` in seconds if the server sent one."""

    def __init__(self, reason: str, detail: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.detail, self.retry_after = reason, detail, retry_after


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


@dataclass(frozen=True)
class Access:
    """What the operator, not the one who names the URLs, allows in the private network."""

    declared: tuple[URL, ...] = ()  # URLs whose combination of scheme, host and port may be private
    hosts: frozenset[tuple[str, int | None]] = frozenset()  # hosts that may be private; without a port every port
    proxy: URL | None = None  # the proxy that requests go through; it resolves the names of the hosts


class AddressGuard(AbstractResolver):
    """Checks URLs that others name, and those of redirects, in three places.

    `check` reads the parsed URL that aiohttp gets, `resolve` drops private addresses of a host name, and `open_socket`
    checks the address of every connection before it is opened. So no private address is connected to, in whatever form
    a parser accepts it.

    Args:
        access: what the caller allows. allow_private: allows every address.
    """

    def __init__(self, access: Access, allow_private: bool) -> None:
        self._resolver = aiohttp.ThreadedResolver()
        self._allow_private, self._allowed = allow_private, access.hosts
        self._declared = {(url.scheme, url.raw_host or "", url.port) for url in access.declared}
        self._proxy = (access.proxy.raw_host or "", access.proxy.port) if access.proxy is not None else None
        # (address, port) of the declared hosts, and of what they resolve to.
        self._declared_addresses: set[tuple[str, int | None]] = {(host, port) for _, host, port in self._declared}
        self._declared_addresses |= {self._proxy} if self._proxy is not None else set()

    def check(self, url: URL) -> None:
        """Rejects other schemes and literal private addresses; `resolve` checks host names."""
        if url.scheme not in ("http", "https"):
            raise Refused("blocked_address", f"scheme {url.scheme!r}, expected http or https")
        host = url.raw_host
        if not host or url.port is None:
            raise Refused("bad_url", "no host")
        if self._allow_private or (url.scheme, host, url.port) in self._declared or self._is_allowed(host, url.port):
            return
        if (host, url.port) in {(declared, port) for _, declared, port in self._declared}:
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
        if self._is_declared(host, port):  # the proxy resolves the hosts behind it
            self._declared_addresses |= {(result["host"], port) for result in results}
            return results
        public = [result for result in results if is_public(result["host"])]
        if not public:
            raise _BlockedAddress(f"{host} is not a public address")
        return public

    def open_socket(self, addr_info: tuple[Any, Any, int, str, tuple[Any, ...]]) -> socket.socket:
        """Returns the socket of one connection (aiohttp's `socket_factory`) after checking its address."""
        family, kind, protocol, _, (host, port, *_) = addr_info
        known = (host, port) in self._declared_addresses or self._is_allowed(host, port)
        if not (self._allow_private or known or is_public(host)):
            raise _BlockedAddress(f"{host} is not a public address")
        return socket.socket(family, kind, protocol)

    async def close(self) -> None:
        await self._resolver.close()

    def _is_declared(self, host: str, port: int) -> bool:
        names = {(declared, at) for _, declared, at in self._declared}
        return (host, port) in names or (host, port) == self._proxy or self._is_allowed(host, port)

    def _is_allowed(self, host: str, port: int | None) -> bool:
        return (host, None) in self._allowed or (host, port) in self._allowed


def host_and_port(name: str) -> tuple[str, int | None]:
    """Returns the host and port that HOST or HOST:PORT names. Raises ValueError for anything else."""
    if re.search(r"[/?#@\s\\]", name):
        raise ValueError(f"{name!r} is no HOST or HOST:PORT")
    url = URL(f"http://{name}/")
    if not url.raw_host:
        raise ValueError(f"{name!r} names no host")
    return url.raw_host, url.port if re.search(r":\d+$", name) else None


def written_url(text: str) -> URL:
    """Returns the URL of a text, to be requested as it is written: a signature may cover its escapes.

    Host and port are read by `yarl`, as aiohttp does. In the path and the query only what no URL may have is escaped.

    Raises:
        ValueError: the text is not a URL.
    """
    url = URL(text)
    match = _SPLIT.fullmatch(text)
    if match is None or not url.raw_host:
        return url
    path, query = (_escape(part or "") for part in match.groups())
    return URL.build(
        scheme=url.scheme,
        authority=url.raw_authority,
        path=path or "/",
        query_string=query,
        encoded=True,
    )


_SPLIT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*([^?#]*)(?:\?([^#]*))?(?:#.*)?", re.DOTALL)
# What RFC 3986 allows in a path or query, and a percent sign that begins an escape or stands for itself.
_UNSAFE = re.compile(r"[^A-Za-z0-9\-._~!$&'()*+,;=:@/?%\[\]|^`{}]")


def _escape(part: str) -> str:
    return _UNSAFE.sub(lambda found: quote(found[0].encode("utf-8", "surrogateescape"), safe=""), part)


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
