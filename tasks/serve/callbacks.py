"""Sends a signed message to an address that a caller chose when its video ends, in the form of Standard Webhooks."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from yarl import URL

from infra.url_guard import Access, AddressGuard, Refused, blocked_cause, host_and_port
from tasks.serve.limits import Refusal

SECRET_VARIABLE = "TRIP_CALLBACK_SECRET"
MIN_SECRET_CHARACTERS = 24
MAX_URL_CHARACTERS = 2000


@dataclass(frozen=True)
class CallbackOptions:
    """Who signs, and how often it is tried.

    Args:
        secret: of the operator; the secret of each caller follows from it.
        private_hosts: HOST or HOST:PORT in the private network that may be called.
        delays: seconds before each attempt; as many attempts as there are delays.
        seconds: for one attempt, from the look-up of the name to the status of the response.
        parallel: attempts at once.
    """

    secret: str = field(repr=False)
    private_hosts: tuple[str, ...] = ()
    delays: tuple[float, ...] = (0, 5, 60, 600)
    seconds: float = 10
    parallel: int = 8

    def __post_init__(self) -> None:
        if len(self.secret) < MIN_SECRET_CHARACTERS:
            raise ValueError(
                f"{SECRET_VARIABLE} has {len(self.secret)} characters, expected at least {MIN_SECRET_CHARACTERS};"
                " make one with: openssl rand -base64 32"
            )
        _hosts(self.private_hosts)


class CallbackFailed(Exception):
    """An attempt that was not answered with a status of 200 to 299. The message says why, without the address."""


class Callbacks:
    """Checks addresses of callers and sends to them; used inside one event loop between `open` and `close`.

    The guard of the downloads of photos checks each address as it is written, each name that is resolved, and the
    address of each connection before it is opened. Redirects are not followed, and responses are not read.
    """

    def __init__(self, options: CallbackOptions) -> None:
        self.options = options
        self._opened: tuple[AddressGuard, aiohttp.ClientSession] | None = None

    def check(self, address: str) -> str:
        """Returns an address that may be called. Raises `Refusal`."""
        example = "send one such as https://example.com/trip"
        if len(address) > MAX_URL_CHARACTERS or not address.isascii() or not address.isprintable():
            raise Refusal(422, f"the Callback-Url is not up to {MAX_URL_CHARACTERS} ASCII characters; {example}")
        try:
            url = URL(address)
            self._open[0].check(url)
        except ValueError as error:
            raise Refusal(422, f"the Callback-Url is not a URL; {example}") from error
        except Refused as refused:
            raise Refusal(422, f"the Callback-Url cannot be used ({refused.detail}); {example}") from refused
        if url.user is not None or url.password is not None:
            raise Refusal(422, f"the Callback-Url has a user or a password, which would be stored; {example}")
        return address

    def secret_of(self, owner: str) -> str:
        """The secret of a caller, as libraries of Standard Webhooks take it. No caller can compute another one's."""
        digest = hmac.new(self.options.secret.encode(), f"trip callback\0{owner}".encode(), hashlib.sha256).digest()
        return f"whsec_{base64.b64encode(digest).decode()}"

    def open(self) -> None:
        """Prepares for calls inside the running event loop."""
        guard = AddressGuard(Access(hosts=_hosts(self.options.private_hosts)), allow_private=False)
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=self.options.parallel,
                resolver=guard,
                socket_factory=guard.open_socket,
                force_close=True,
            ),
            timeout=aiohttp.ClientTimeout(total=self.options.seconds),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,  # a proxy would resolve the names itself
        )
        self._opened = guard, session

    async def close(self) -> None:
        await self._open[1].close()
        await asyncio.sleep(0)  # aiohttp's transports close in the next turn of the loop

    @property
    def _open(self) -> tuple[AddressGuard, aiohttp.ClientSession]:
        assert self._opened is not None, "not open"
        return self._opened

    async def send(self, address: str, owner: str, event_id: str, event: dict[str, Any]) -> None:
        """Sends one event once. Raises CallbackFailed."""
        session = self._open[1]
        body, now = json.dumps(event).encode(), int(time.time())
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "trip-i2v",
            "webhook-id": event_id,
            "webhook-timestamp": str(now),
            "webhook-signature": signature(self.secret_of(owner), event_id, now, body),
        }
        try:
            async with session.post(address, data=body, headers=headers, allow_redirects=False) as response:
                if not 200 <= response.status < 300:
                    raise CallbackFailed(f"status {response.status}")
        except TimeoutError as error:
            raise CallbackFailed(f"no response within {self.options.seconds:g} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            refused = blocked_cause(error)
            raise CallbackFailed(refused.detail if refused else type(error).__name__) from error


def signature(secret: str, event_id: str, timestamp: int, body: bytes) -> str:
    """The header `webhook-signature`: HMAC-SHA256 of id, timestamp and body with a secret of `Callbacks.secret_of`."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = f"{event_id}.{timestamp}.".encode() + body
    return f"v1,{base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()}"


def _hosts(names: Iterable[str]) -> frozenset[tuple[str, int | None]]:
    return frozenset(map(host_and_port, names))
