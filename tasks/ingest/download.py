"""Downloads clips with care: capped, checked, retried where that helps, never from inside the private network."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import random
import socket
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from time import time
from urllib.parse import urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from infra import storage
from tasks.ingest.sources import SourceSpec, local_root, resolve_url
from tasks.records import ClipRef, Failure

_RETRYABLE_STATUS = {408, 425, 429, 500, 502, 503, 504}
_RETRYABLE = {f"http_{status}" for status in _RETRYABLE_STATUS} | {"timeout", "network", "truncated"}
_REDIRECTS = {301, 302, 303, 307, 308}
_MAX_HOPS = 5
_PIECE_BYTES = 1 << 16
# Ranges of IPv6 that carry an IPv4 address the check must see; ::ffff:0:0/96 and 2002::/16 are taken apart below.
_TRANSLATED = [ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48")]
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp", b"moof")
_MAGIC = (b"\x1aE\xdf\xa3", b"OggS", b"FLV", b"\x00\x00\x01\xba", b"\x00\x00\x01\xb3", b"0&\xb2u", b"GIF8")


@dataclass(frozen=True)
class DownloadSpec:
    """How politely and how long to try. Bytes and seconds are per clip; the defaults suit one CDN and 2 MB clips."""

    concurrency: int = 16
    max_bytes: int = 200_000_000
    connect_seconds: float = 10.0
    read_seconds: float = 30.0  # longest silence while reading
    total_seconds: float = 300.0  # one attempt
    attempts: int = 3
    backoff_seconds: float = 0.5  # doubled each time, with full jitter
    max_backoff_seconds: float = 10.0  # also caps what Retry-After may ask for
    allow_private: bool = False  # let the table name private, loopback and link-local addresses
    contact: str = ""  # a page or an address for the operators of the servers, told in the user agent


@dataclass(frozen=True)
class Fetched:
    """The bytes of one clip's file, whole and of a video's kind."""

    data: bytes
    sha256: str


class _Refused(Exception):
    """One attempt that failed, under its reason."""

    def __init__(self, reason: str, detail: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.detail, self.retry_after = reason, detail, retry_after


def download_clips(
    refs: Iterable[ClipRef], source: SourceSpec, spec: DownloadSpec | None = None
) -> Iterator[tuple[ClipRef, Fetched | Failure]]:
    """Fetches clips ahead of the caller, at most `concurrency` at a time, and yields them in the order of `refs`.

    Failure reasons: `http_<status>`, `timeout`, `network`, `truncated`, `too_large`, `not_a_video`, `blocked_address`,
    `bad_url`, `too_many_redirects`, `missing_file`, `unreadable_file`. Files are read only below the table's folder.
    """
    spec = spec or DownloadSpec()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="download", daemon=True)
    thread.start()

    def submit(ref: ClipRef) -> tuple[ClipRef, Future[Fetched | Failure]]:
        return ref, asyncio.run_coroutine_threadsafe(_fetch(session, ref, source, spec), loop)

    session = asyncio.run_coroutine_threadsafe(_open_session(source, spec), loop).result()
    waiting: deque[tuple[ClipRef, Future[Fetched | Failure]]] = deque()
    try:
        for ref in refs:
            waiting.append(submit(ref))
            if len(waiting) >= max(1, spec.concurrency):
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        for _, future in waiting:
            future.cancel()
        asyncio.run_coroutine_threadsafe(session.close(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


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


def is_video(data: bytes) -> bool:
    """Whether the first bytes are those of a video container: mp4/mov, Matroska/WebM, AVI, Ogg, FLV, MPEG, ASF, GIF."""
    if data[4:8] in _MP4_BOXES or data.startswith(_MAGIC):
        return True
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return True
    return data[:1] == b"G" and data[188:189] == b"G"  # transport stream: a sync byte every 188


async def _open_session(source: SourceSpec, spec: DownloadSpec) -> aiohttp.ClientSession:
    agent = "trip-i2v/0.1" + (f" (+{spec.contact})" if spec.contact else "")
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=spec.concurrency, resolver=_GuardedResolver(source, spec)),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=spec.connect_seconds, sock_read=spec.read_seconds),
        headers={"User-Agent": agent, "Accept-Encoding": "identity"},  # no decompression: a bomb stays small
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,  # a proxy would resolve names behind the guard's back
    )


async def _fetch(
    session: aiohttp.ClientSession, ref: ClipRef, source: SourceSpec, spec: DownloadSpec
) -> Fetched | Failure:
    """One clip with its retries."""
    address = resolve_url(source, ref.url)
    for attempt in range(1, max(1, spec.attempts) + 1):
        try:
            if address.startswith(("http://", "https://")):
                data = await _get(session, address, source, spec)
            else:
                data = await asyncio.to_thread(_read_file, address, local_root(source), spec.max_bytes)
            if not is_video(data):
                raise _Refused("not_a_video", f"{len(data)} bytes that begin {data[:12]!r}")
            return Fetched(data, hashlib.sha256(data).hexdigest())
        except _Refused as refused:
            if refused.reason not in _RETRYABLE or attempt >= spec.attempts:
                tries = f", {attempt} attempts" if attempt > 1 else ""
                return Failure(ref.key, ref.row, refused.reason, f"{ref.url}: {refused.detail}{tries}")
            pause = random.uniform(0, spec.backoff_seconds * 2 ** (attempt - 1))  # full jitter: clients spread out
            await asyncio.sleep(min(max(pause, refused.retry_after or 0), spec.max_backoff_seconds))
    raise AssertionError("the last attempt returns")


async def _get(session: aiohttp.ClientSession, url: str, source: SourceSpec, spec: DownloadSpec) -> bytes:
    """One attempt over HTTP. Redirects are followed by hand, so that every hop passes the guard."""
    try:
        async with asyncio.timeout(spec.total_seconds):
            for _ in range(_MAX_HOPS + 1):
                _check_url(url, source, spec)
                async with session.get(url, allow_redirects=False) as response:
                    if response.status in _REDIRECTS and "Location" in response.headers:
                        url = urljoin(url, response.headers["Location"])
                        continue
                    return await _read_body(response, spec.max_bytes)
            raise _Refused("too_many_redirects", f"more than {_MAX_HOPS}")
    except TimeoutError as error:
        raise _Refused("timeout", "no answer in time") from error
    except aiohttp.ClientPayloadError as error:
        raise _Refused("truncated", "the connection ended before the file did") from error
    except (aiohttp.InvalidURL, UnicodeError) as error:
        raise _Refused("bad_url", "not a URL that can be asked for") from error
    except (aiohttp.ClientError, OSError) as error:
        blocked = _blocked_cause(error)
        if blocked is not None:
            raise blocked from error
        raise _Refused("network", type(error).__name__) from error


async def _read_body(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    if response.status != 200:
        raise _Refused(f"http_{response.status}", response.reason or "", _retry_after(response))
    length = response.content_length
    if length is not None and length > max_bytes:
        raise _Refused("too_large", f"{length} bytes, at most {max_bytes}")
    body = bytearray()
    async for piece in response.content.iter_chunked(_PIECE_BYTES):
        body += piece
        if len(body) > max_bytes:
            raise _Refused("too_large", f"more than {max_bytes} bytes")
    if length is not None and len(body) != length:
        raise _Refused("truncated", f"{len(body)} of {length} bytes")
    return bytes(body)


def _read_file(address: str, root: str | None, max_bytes: int) -> bytes:
    """A file that lies beside the table. The URL column is data from strangers, so nothing else is opened."""
    inside = root is not None and address.startswith(root.rstrip("/") + "/") and ".." not in address.split("/")
    if not inside:
        raise _Refused("blocked_address", "only http(s) URLs and files below the table's own folder are read")
    try:
        data = storage.read_range(address, 0, max_bytes + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _Refused("missing_file", "no such file") from error
    except OSError as error:
        raise _Refused("unreadable_file", error.strerror or type(error).__name__) from error
    if len(data) > max_bytes:
        raise _Refused("too_large", f"more than {max_bytes} bytes")
    return data


def _check_url(url: str, source: SourceSpec, spec: DownloadSpec) -> None:
    """Refuses other schemes and literal private addresses; names are checked where they are resolved."""
    try:
        parts = urlsplit(url)
        host, scheme = parts.hostname, parts.scheme
        place = (host, parts.port)
    except ValueError as error:
        raise _Refused("bad_url", "not a URL that can be asked for") from error
    if scheme not in ("http", "https"):
        raise _Refused("blocked_address", f"scheme {scheme!r}, only http and https are fetched")
    if not host:
        raise _Refused("bad_url", "no host")
    if spec.allow_private or place == _declared_place(source):
        return
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return
    if not is_public(host):
        raise _Refused("blocked_address", f"{host} is not a public address")


def _declared_place(source: SourceSpec) -> tuple[str | None, int | None] | None:
    """Host and port that the caller, not the table, has named; they may be private."""
    if source.base_url is None or local_root(source) is not None:
        return None
    parts = urlsplit(source.base_url)
    return parts.hostname, parts.port


def _retry_after(response: aiohttp.ClientResponse) -> float | None:
    value = response.headers.get("Retry-After", "")
    try:
        if value.isdecimal():
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except ValueError:
        return None


class _BlockedAddress(OSError):
    """Raised by the resolver, inside aiohttp's connector."""


def _blocked_cause(error: BaseException) -> _Refused | None:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, _BlockedAddress):
            return _Refused("blocked_address", str(cause))
        cause = cause.__cause__ or cause.__context__
    return None


class _GuardedResolver(AbstractResolver):
    """Resolves names and drops private addresses; aiohttp connects to what this returns, so rebinding cannot help."""

    def __init__(self, source: SourceSpec, spec: DownloadSpec) -> None:
        self._resolver = aiohttp.ThreadedResolver()
        self._allow_private = spec.allow_private
        self._declared = _declared_place(source)

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
