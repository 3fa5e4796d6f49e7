"""The rig's server, on loopback in a separate process: a path names the kind of response and the file.

python -m benchmarks.rig.server FOLDER      prints its URL, ends when its input is closed
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from aiohttp import web

from infra.settings import CHECKOUT

ENDLESS_BYTES = 64_000_000  # size of a response without a length, unless the client stops it
_ELSEWHERE = {
    "moved": "/moved-again/{name}",
    "moved-again": "/plain/{name}",
    "loop": "/loop/{name}",
    "to-private": "http://10.0.0.1/{name}",
    "to-metadata": "http://169.254.169.254/latest/meta-data/",
    "to-other-port": "http://127.0.0.1:1/{name}",
    "to-name": "http://localhost/{name}",
    "to-file": "file:///etc/hostname",
    "to-dead-end": "/404/{name}",
}


@contextmanager
def serving(folder: str | Path) -> Iterator[str]:
    """Serves the files of a folder at `<URL>/<answer>/<file>` during a block; yields the URL."""
    command = [sys.executable, "-m", __name__, str(Path(folder).absolute())]
    process = subprocess.Popen(command, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        assert url, "the rig's server did not start"
        yield url
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


class Rig:
    """Answers GET /<how>/<file>; a second request for the same path may get another response."""

    def __init__(self, folder: Path) -> None:
        self._files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        self._asked: Counter[str] = Counter()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        how, name = request.match_info["how"], request.match_info["name"]
        body = self._files[name]
        self._asked[request.path_qs] += 1
        first = self._asked[request.path_qs] == 1
        with suppress(ConnectionError):  # the client closed the connection
            return await _answer(request, how, name, body, first)
        return web.Response()


async def _answer(request: web.Request, how: str, name: str, body: bytes, first: bool) -> web.StreamResponse:
    if how.isdecimal():
        return web.Response(status=int(how), text="no video here")
    if how in _ELSEWHERE:
        return web.Response(status=302, headers={"Location": _ELSEWHERE[how].format(name=name)})
    match how:
        case "busy-once" if first:
            return web.Response(status=503, headers={"Retry-After": "1"})
        case "page":
            return web.Response(text="<!doctype html><title>Not found</title>", content_type="text/html")
        case "opted-out":
            return web.Response(body=body, headers={"X-Robots-Tag": "noai"})
        case "hang-up":
            return await _broken_off(request, None, b"")
        case "cut":
            return await _broken_off(request, len(body), body[: len(body) // 2])
        case "cut-once" if first:
            return await _broken_off(request, len(body), body[: len(body) // 2])
        case "oversize":
            return await _broken_off(request, 10**10, b"")
        case "stall":
            await asyncio.sleep(600)
        case "stall-midway":
            return await _streamed(request, len(body), [body[:1000]], then=600)
        case "trickle":
            return await _streamed(request, len(body), [body[k : k + 16] for k in range(0, len(body), 16)], 0.05)
        case "endless":
            return await _streamed(request, None, [body[:50_000]] * (ENDLESS_BYTES // min(50_000, len(body))))
        case "no-length":
            return await _streamed(request, None, [body[k : k + 4096] for k in range(0, len(body), 4096)])
    return web.Response(body=body, content_type="video/mp4")


async def _streamed(
    request: web.Request, length: int | None, pieces: list[bytes], pause: float = 0.0, then: float = 0.0
) -> web.StreamResponse:
    """Sends a response in pieces, `pause` seconds after each and `then` at the end; chunked without a length."""
    response = web.StreamResponse()
    if length is None:
        response.enable_chunked_encoding()
    else:
        response.content_length = length
    await response.prepare(request)
    for piece in pieces:
        await response.write(piece)
        await asyncio.sleep(pause)
    await asyncio.sleep(then)
    await response.write_eof()
    return response


async def _broken_off(request: web.Request, length: int | None, body: bytes) -> web.StreamResponse:
    """Sends part of a response and closes the connection. Without a length it sends nothing."""
    response = web.StreamResponse()
    if length is not None:
        response.content_length = length
        await response.prepare(request)
        await response.write(body)
        await asyncio.sleep(0.05)  # so that the client sees the part before the end
    if request.transport is not None:  # otherwise the client closed it
        request.transport.close()
    return response


async def _serve(folder: Path) -> None:
    app = web.Application()
    app.router.add_get("/{how}/{name}", Rig(folder).answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.to_thread(sys.stdin.read)  # ends with the parent, even if that was killed


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1])))
