"""The limits of the HTTP application, checked before a route runs: hosts, origins, keys, rates, bodies."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infra.rate_limit import RateLimit
from tasks.serve.keys import Keys
from tasks.serve.limits import MAX_BODY_BYTES, Refusal, body_too_large
from tasks.serve.request_log import DISCONNECTED, error_response
from tasks.serve.server_limits import ServerLimits

# The routes that need no key; docs/decisions/serving.md has the table. Every other path requires one.
OPEN_ROUTES = (
    *("/", "/page.js", "/page.css", "/favicon.svg", "/favicon.ico", "/v1/model"),
    *("/docs", "/docs/oauth2-redirect", "/openapi.json"),
    *("/livez", "/healthz", "/readyz", "/metrics"),
)
OPEN_FOLDERS = ("/static-offline-docs/",)
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")  # change nothing
_CALLERS = 10_000  # whose rates are remembered


class Guard:
    """Refuses requests by their head, and bounds what their bodies may take.

    It refuses requests that a page of another site makes a browser send. A browser sends the origin of a request in
    `Sec-Fetch-Site`, and over plain HTTP only in `Origin`; programs send neither. GET and HEAD change nothing, and
    without CORS headers no other page can read their responses.

    Args:
        keys: the accepted keys; None: no key is required.
        hosts: the values of `Host` that are served, without a port; empty: all.
        origins: other sites whose pages may use the API.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: ServerLimits,
        keys: Keys | None = None,
        hosts: Collection[str] = (),
        origins: Collection[str] = (),
    ) -> None:
        self._app, self._limits, self._keys = app, limits, keys
        self._hosts, self._origins = frozenset(hosts), frozenset(origins)
        self._rates = RateLimit(limits.requests_per_minute / 60, limits.burst, _CALLERS)
        self._wrong_keys = RateLimit(limits.wrong_keys_per_minute / 60, limits.wrong_keys_per_minute, _CALLERS)
        self._known: OrderedDict[tuple[str, str], None] = OrderedDict()  # addresses and names of right keys
        self._body_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except Refusal as refusal:
            await error_response(refusal, scope["state"]["request_id"])(scope, receive, send)
            return
        state = scope["state"]
        try:
            await self._app(scope, self._bounded(receive, scope), send)
        finally:
            self._body_bytes -= state["received_bytes"]

    def _check(self, scope: Scope) -> None:
        headers, method = Headers(scope=scope), scope["method"]
        host = _host_name(headers.get("host", ""))
        if self._hosts and host not in self._hosts:
            raise Refusal(400, f"the host {host[:80]!r} is not served here; give it with --trusted-host")
        if method not in _SAFE_METHODS and self._is_foreign(headers):
            raise Refusal(403, "the request comes from a page of another site; use this site or a program")
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        caller = _network(scope)
        if not is_open(path):
            if self._keys is not None:
                scope["state"]["caller"] = name = self._key_name(headers, caller)
                caller = f"key {name}"
            if method not in _SAFE_METHODS and (wait := self._rates.seconds_until_allowed(caller)):
                rate = f"{self._limits.requests_per_minute} requests per minute"
                raise Refusal(429, f"the caller has sent more than {rate}; send it again later", _whole(wait))
        if "transfer-encoding" in headers:  # its many small parts would cost the event loop more than their bytes
            raise Refusal(411, "the body has no Content-Length; send it with one")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise Refusal(415, f"the body is encoded as {headers['content-encoding'][:40]!r}; send it as it is")
        announced = headers.get("content-length", "0")
        if announced.isdecimal() and int(announced[:20]) > MAX_BODY_BYTES:
            raise body_too_large(int(announced[:20]))

    def _is_foreign(self, headers: Headers) -> bool:
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin is not None and origin in self._origins:
            return False
        if site is not None:
            return site not in ("same-origin", "none")
        return origin is not None and origin.partition("://")[2] != headers.get("host", "")

    def _key_name(self, headers: Headers, address: str) -> str:
        """Returns the name of the request's key. Raises `Refusal`.

        An address that has sent too many wrong keys gets no answer about another one, so a key cannot be guessed; a
        caller whose key was right before is not locked out by others at its address.
        """
        assert self._keys is not None
        scheme, _, token = headers.get("authorization", "").partition(" ")
        sent = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        # Headers are decoded as latin-1.
        name = self._keys.name_of(sent.encode("latin-1").decode("utf-8", "replace")) if sent else None
        wait = self._wrong_keys.wait(address)
        if sent and wait and (address, name) not in self._known:
            raise Refusal(429, "too many wrong API keys came from this address; wait before the next", _whole(wait))
        if name is None:
            if sent:
                self._wrong_keys.take(address)
            raise Refusal(401, "the API key is missing or wrong; send it as 'Authorization: Bearer KEY' or 'X-API-Key'")
        self._known[address, name] = None
        if len(self._known) > _CALLERS:
            self._known.popitem(last=False)
        return name

    def _bounded(self, receive: Receive, scope: Scope) -> Receive:
        """`receive`, which raises `Refusal` for a body that is too long, too slow, or ends early."""
        limits, state, start, whole = self._limits, scope["state"], time.monotonic(), False
        loop = asyncio.get_running_loop()
        begin = loop.time()

        async def bounded() -> Message:
            nonlocal whole
            if whole:
                return await receive()
            until = begin + limits.body_seconds + state["received_bytes"] / limits.body_rate
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError as error:
                seconds = f"{time.monotonic() - start:.0f} s"
                raise Refusal(408, f"the body was not received within {seconds}; send it faster") from error
            if message["type"] == "http.disconnect":
                raise Refusal(DISCONNECTED, "the client has disconnected")
            size = len(message.get("body", b""))
            state["received_bytes"] += size
            self._body_bytes += size
            if state["received_bytes"] > MAX_BODY_BYTES:
                raise body_too_large(state["received_bytes"])
            if self._body_bytes > limits.body_memory:
                raise Refusal(503, "the service holds too many bodies; send it again in 5 s", 5)
            whole = not message.get("more_body", False)
            return message

        return bounded


def is_open(path: str) -> bool:
    """Whether a path needs no key."""
    return path in OPEN_ROUTES or path.startswith(OPEN_FOLDERS)


def _host_name(host: str) -> str:
    """`Host` in small letters, without the port and without the brackets of IPv6."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).lower().strip("[]")


def _network(scope: Scope) -> str:
    """The address of a caller; of IPv6 its network, because a host has many addresses."""
    address = scope["client"][0] if scope.get("client") else ""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    return address if ip.version == 4 else str(ipaddress.ip_network((address, 64), strict=False))


def _whole(seconds: float) -> int:
    return max(1, round(seconds + 0.5))
