"""Downloads clips: with size and time limits, checks, retries, and never from the private network."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import itertools
import random
import re
import sys
import threading
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, replace
from urllib.parse import urljoin

import aiohttp
import pyarrow
from yarl import URL

from infra import storage
from infra.redaction import name_of, redact
from infra.url_guard import Access, AddressGuard, Refused, blocked_cause, host_and_port, written_url
from tasks.ingest.files import is_over_http
from tasks.ingest.http_checks import AGENT, is_photo, is_video, looks_like, opts_out, seconds_to_wait
from tasks.ingest.sources import has_scheme, local_root, resolve_url, source_files
from tasks.ingest.spec import DownloadSpec, SourceSpec
from tasks.ingest.tables import read_cell
from tasks.records import RETRY_CLASSES, ClipRef, Failure, Inside, UserError
from trip_model import __version__
from trip_model.request_limits import MAX_PHOTO_BYTES

# Retried within the run; 403 and the rarer 5xx only by a later run with `retry`.
_RETRYABLE = RETRY_CLASSES["network"] | RETRY_CLASSES["timeout"]
_RETRYABLE |= {f"http_{status}" for status in (425, 429, 500, 502, 503, 504)} | {"store_busy"}
# Errors of an object store that pass: what its library makes of SlowDown, InternalError and of codes it does not know.
_STORE_BUSY = {errno.EBUSY, errno.EIO, errno.EREMOTEIO, errno.EAGAIN, errno.ECONNRESET, errno.ETIMEDOUT}
_REDIRECTS = {301, 302, 303, 307, 308}
_MAX_HOPS = 5
_PIECE_BYTES = 1 << 16


@dataclass(frozen=True)
class Fetched:
    """The complete file of one clip, which begins like a video container."""

    data: bytes
    sha256: str
    attempts: int = 1


def download_clips(
    refs: Iterable[ClipRef], source: SourceSpec, spec: DownloadSpec | None = None
) -> Iterator[tuple[ClipRef, Fetched | Failure]]:
    """Downloads clips ahead of the caller, at most `concurrency` at a time, and yields them in the order of `refs`.

    Successive clips with the same link are one download, and share its result.

    Failure reasons: `http_<status>`, `timeout`, `too_slow`, `network`, `truncated`, `too_large`, `not_a_video`,
    `robots_opt_out`, `blocked_address`, `bad_url`, `too_many_redirects`, `missing_file`, `unreadable_file`, and of an
    object store `store_busy` and `store_forbidden`. The detail contains the number of attempts if there were several.
    Files are read only below the table's folder.

    Raises:
        UserError: the source's base URL, proxy or an allowed host is not one.
    """
    spec = spec or DownloadSpec()
    access = access_of(source)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="download", daemon=True)
    thread.start()

    def submit(group: list[ClipRef]) -> tuple[list[ClipRef], Future[Fetched | Failure]]:
        return group, asyncio.run_coroutine_threadsafe(downloader.fetch(group[0]), loop)

    def finished() -> Iterator[tuple[ClipRef, Fetched | Failure]]:
        group, future = waiting.popleft()
        result = future.result()
        for ref in group:
            yield ref, result if isinstance(result, Fetched) else replace(result, key=ref.key, row=ref.row)

    downloader = asyncio.run_coroutine_threadsafe(_open_downloader(source, spec, access), loop).result()
    waiting: deque[tuple[list[ClipRef], Future[Fetched | Failure]]] = deque()
    try:
        for _, same_link in itertools.groupby(refs, key=lambda ref: (ref.url, ref.inside)):
            waiting.append(submit(list(same_link)))
            if len(waiting) >= max(1, spec.concurrency):
                yield from finished()
        while waiting:
            yield from finished()
    finally:
        if not sys.is_finalizing():  # else the thread has ended with the interpreter, and a wait for it never ends
            for _, future in waiting:
                future.cancel()
            asyncio.run_coroutine_threadsafe(downloader.session.close(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


def download_photo(url: str, spec: DownloadSpec | None = None) -> bytes:
    """Downloads one photo with the checks of `download_clips`: public addresses only, each redirect checked, bounded.

    Raises:
        UserError: the reason why it cannot be downloaded; the message names the host only.
    """
    spec = replace(spec or DownloadSpec(), max_bytes=MAX_PHOTO_BYTES)

    async def download() -> Fetched | Failure:
        downloader = await _open_downloader(SourceSpec(table=url), spec, Access())
        try:
            return await downloader.fetch(ClipRef(key="photo", row=0, url=url, caption=""), is_photo)
        finally:
            await downloader.session.close()

    result = asyncio.run(download())
    if isinstance(result, Failure):
        raise UserError(
            f"the photo cannot be downloaded ({result.reason}: {result.detail}); give another URL or a file"
        )
    return result.data


def access_of(source: SourceSpec) -> Access:
    """Returns what the caller of a source allows: its base URL, or else a table over HTTP, `allow` and the proxy.

    Raises:
        UserError: one of them is not an address.
    """
    named = [source.base_url] if source.base_url is not None else source_files(source)
    declared = tuple(_url("base URL", address) for address in named if is_over_http(address))
    proxy = _url("proxy", source.proxy) if source.proxy is not None else None
    if proxy is not None and (proxy.scheme not in ("http", "https") or not proxy.raw_host):
        raise UserError(f"proxy {source.proxy!r} is not an HTTP proxy; give one as http://host:port")
    try:
        hosts = frozenset(host_and_port(name) for name in source.allow if not is_folder_address(name))
    except ValueError as error:
        raise UserError(f"allowed host {error}; give HOST, HOST:PORT, or the address of a folder or bucket") from error
    return Access(declared, hosts, proxy)


def is_folder_address(name: str) -> bool:
    """Returns whether an allowed name is a folder or a bucket rather than a host."""
    return "://" in name or name.startswith("/")


def _url(what: str, address: str) -> URL:
    try:
        return URL(address)
    except ValueError as error:
        raise UserError(f"{what} {address!r} is not a URL ({error}); give one as http://host:port/") from error


async def _open_downloader(source: SourceSpec, spec: DownloadSpec, access: Access) -> _Downloader:
    return _Downloader(source, spec, access)


class _Downloader:
    """One session and a queue per host. Created and used inside the event loop."""

    def __init__(self, source: SourceSpec, spec: DownloadSpec, access: Access) -> None:
        self._source, self._spec, self._proxy = source, spec, access.proxy
        self._guard = AddressGuard(access, spec.allow_private)
        self._roots = [root for root in (local_root(source), *map(_folder, source.allow)) if root is not None]
        self._cells = threading.Lock()  # a row group of Parquet is read by one thread at a time
        self._turns: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(max(1, spec.per_host)))
        agent = f"{AGENT}/{__version__}" + (f" (+{spec.contact})" if spec.contact else "")
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=spec.concurrency, resolver=self._guard, socket_factory=self._guard.open_socket
            ),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=spec.connect_seconds, sock_read=spec.read_seconds),
            headers={"User-Agent": agent, "Accept-Encoding": "identity"},  # no decompression, so no decompression bombs
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,  # a proxy bypasses the guard's name resolution, so only one that the caller names is used
        )

    async def fetch(self, ref: ClipRef, accepts: Callable[[bytes], bool] = is_video) -> Fetched | Failure:
        """Downloads one clip, or another file that `accepts` recognises, with retries."""
        spec = self._spec
        for attempt in range(1, max(1, spec.attempts) + 1):
            try:
                data = await self._read(ref)
                if not accepts(data):
                    raise Refused("not_a_video" if accepts is is_video else "not_accepted", looks_like(data))
                return Fetched(data, hashlib.sha256(data).hexdigest(), attempt)
            except Refused as refused:
                if refused.reason not in _RETRYABLE or attempt >= spec.attempts:
                    tries = f", {attempt} attempts" if attempt > 1 else ""
                    return Failure(
                        ref.key, ref.row, refused.reason, f"{name_of(ref.url)}: {redact(refused.detail)}{tries}"
                    )
                pause = random.uniform(0, spec.backoff_seconds * 2 ** (attempt - 1))  # full jitter: clients spread out
                await asyncio.sleep(min(max(pause, refused.retry_after or 0), spec.max_backoff_seconds))
        raise AssertionError("the last attempt returns")

    async def _read(self, ref: ClipRef) -> bytes:
        """Reads a URL, a file or a part of one once."""
        try:
            if ref.inside is not None:
                return await asyncio.to_thread(self._read_inside, ref.inside)
            address = resolve_url(self._source, ref.url)
            if is_over_http(address):
                return await self._get(address)
            return await asyncio.to_thread(_read_file, address, self._roots, self._spec.max_bytes)
        except TimeoutError as error:
            raise Refused("timeout", "no response in time") from error
        except aiohttp.ClientPayloadError as error:
            raise Refused("truncated", "the connection ended before the file was complete") from error
        except aiohttp.InvalidURL as error:
            raise Refused("bad_url", "not a valid URL") from error
        except (aiohttp.ClientError, OSError) as error:
            raise blocked_cause(error) or Refused("network", type(error).__name__) from error
        except ValueError as error:  # from urllib or the host name codec; invalid certificates are caught above
            raise Refused("bad_url", "not a valid URL") from error

    async def _get(self, address: str) -> bytes:
        """Reads a URL once over HTTP. It follows redirects itself, so that the guard checks every hop.

        A URL is parsed once: the guard checks the same object that aiohttp uses to connect.
        """
        clock, remaining_seconds = asyncio.get_running_loop(), self._spec.total_seconds
        for _ in range(_MAX_HOPS + 1):
            url = written_url(address)
            self._guard.check(url)
            turn = self._turns[url.host_port_subcomponent or ""]
            async with turn:  # waiting in the queue does not count as server time
                began = clock.time()
                async with asyncio.timeout(remaining_seconds), self._request(url) as response:
                    if response.status not in _REDIRECTS or "Location" not in response.headers:
                        return await self._read_body(response)
                    location = response.headers["Location"]
                    address = location if has_scheme(location) else urljoin(address, location)
                remaining_seconds -= clock.time() - began
        raise Refused("too_many_redirects", f"more than {_MAX_HOPS}")

    def _request(self, url: URL) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        return self.session.get(url, allow_redirects=False, proxy=self._proxy)

    def _read_inside(self, inside: Inside) -> bytes:
        """Reads a video that a file of the source contains."""
        if inside.column is None and inside.size > self._spec.max_bytes:
            raise Refused("too_large", f"{inside.size} bytes, at most {self._spec.max_bytes}")
        if inside.column is None:
            with _reading(inside.file):
                data = storage.read_range(inside.file, inside.offset, inside.offset + inside.size)
            if len(data) != inside.size:
                raise Refused("unreadable_file", "the tar ends within the video")
            return data
        with self._cells, _reading(inside.file):
            data = read_cell(inside)
        if len(data) > self._spec.max_bytes:
            raise Refused("too_large", f"{len(data)} bytes, at most {self._spec.max_bytes}")
        return data

    async def _read_body(self, response: aiohttp.ClientResponse) -> bytes:
        spec, clock = self._spec, asyncio.get_running_loop()
        whole = response.status == 206 and _is_whole(response)
        if response.status != 200 and not whole:
            pause = seconds_to_wait(response.headers.get("Retry-After", ""))
            raise Refused(f"http_{response.status}", response.reason or "", pause)
        tags = response.headers.getall("X-Robots-Tag", [])
        if spec.respect_robots and opts_out(tags):
            raise Refused("robots_opt_out", f"X-Robots-Tag: {', '.join(tags)[:200]}")
        length = response.content_length
        if length is not None and length > spec.max_bytes:
            raise Refused("too_large", f"{length} bytes, at most {spec.max_bytes}")
        body = bytearray()
        interval_start, interval_bytes = clock.time(), 0
        async for piece in response.content.iter_chunked(_PIECE_BYTES):
            body += piece
            if len(body) > spec.max_bytes:
                raise Refused("too_large", f"more than {spec.max_bytes} bytes")
            seconds = clock.time() - interval_start
            if seconds >= spec.rate_seconds:
                rate = (len(body) - interval_bytes) / seconds
                if rate < spec.min_bytes_per_second:
                    raise Refused("too_slow", f"{rate:.0f} bytes a second, at least {spec.min_bytes_per_second:g}")
                interval_start, interval_bytes = clock.time(), len(body)
        if length is not None and len(body) != length:
            raise Refused("truncated", f"{len(body)} of {length} bytes")
        if response.headers.get("Content-Encoding", "").lower() in ("gzip", "x-gzip") and body.startswith(b"\x1f\x8b"):
            return _gunzip(bytes(body), spec.max_bytes)
        return bytes(body)


def _is_whole(response: aiohttp.ClientResponse) -> bool:
    """Returns whether a partial response contains the whole file."""
    match = re.fullmatch(r"bytes 0-(\d+)/(\d+)", response.headers.get("Content-Range", "").strip())
    return match is not None and int(match[1]) + 1 == int(match[2]) == (response.content_length or int(match[2]))


def _gunzip(data: bytes, max_bytes: int) -> bytes:
    """Decompresses a body that was sent compressed though not asked for; at most `max_bytes` of it."""
    stream = zlib.decompressobj(wbits=31)
    try:
        body = stream.decompress(data, max_bytes + 1)
    except zlib.error as error:
        raise Refused("truncated", f"its Content-Encoding is gzip, which it is not ({error})") from error
    if len(body) > max_bytes:
        raise Refused("too_large", f"more than {max_bytes} bytes once decompressed")
    if not stream.eof:
        raise Refused("truncated", "the compressed body is not complete")
    return body


def _folder(allowed: str) -> str | None:
    """Returns the folder that an allowed name is, None for a host."""
    return storage.absolute(allowed) if is_folder_address(allowed) else None


def _read_file(address: str, roots: list[str], max_bytes: int) -> bytes:
    """Reads a file below the table's folder or an allowed one. Links are untrusted, so no other file is opened."""
    inside = any(address.startswith(root.rstrip("/") + "/") for root in roots) and ".." not in address.split("/")
    if not inside:
        raise Refused(
            "blocked_address",
            "only http(s) URLs and files below the table's own folder are read; allow others with --allow-host FOLDER",
        )
    with _reading(address):
        data = storage.read_range(address, 0, max_bytes + 1)
    if len(data) > max_bytes:
        raise Refused("too_large", f"more than {max_bytes} bytes")
    return data


@contextmanager
def _reading(address: str) -> Iterator[None]:
    """Converts errors of reading one file into its reason. A store that cannot be used at all still ends the stage."""
    try:
        with storage.boundary(address), storage.impatient():  # rows are retried by this stage
            yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Refused("missing_file", "no such file") from error
    except storage.StoreNotResponding as error:
        raise Refused("store_busy", str(error)) from error
    except (OSError, pyarrow.ArrowException) as error:
        text = " ".join((getattr(error, "strerror", None) or str(error)).split())[:200]
        raise Refused(_reason_of(address, error), text or type(error).__name__) from error


def _reason_of(address: str, error: Exception) -> str:
    if storage.local_path(address) is not None:
        return "unreadable_file"
    if isinstance(error, PermissionError):
        return "store_forbidden"
    is_busy = isinstance(error, TimeoutError) or getattr(error, "errno", None) in _STORE_BUSY
    return "store_busy" if is_busy else "unreadable_file"
