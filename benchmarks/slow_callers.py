"""Sends slow, hostile and broken requests next to good ones to the service, and prints what became of them as JSON.

    python -m benchmarks.slow_callers runs/demo/train/.../model

It starts `python -m flows serve` on loopback. At once come slow senders (half of them send a head, half a body, one
byte a second), callers that hang up after their request, senders of 20 MB of JSON keys, and good callers. /healthz is
asked every 50 ms all the time.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import multiprocessing
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cyclopts
import httpx
import psutil

from benchmarks.serve_load import service
from tasks.register.packaging import drawn_photo

PROMPT = "a red circle moving right slowly"
HEAD = "POST /v1/animate HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
HOSTILE_BYTES = 20 * 10**6
SETTLE_SECONDS = 10


class Callers:
    """All callers of one service."""

    def __init__(self, url: str, limit_seconds: float) -> None:
        parts = urlsplit(url)
        assert parts.hostname and parts.port
        self.url, self.host, self.port, self.limit_seconds = url, parts.hostname, parts.port, limit_seconds
        photo = base64.b64encode(drawn_photo(48)).decode()
        self.body = json.dumps({"image": photo, "prompt": PROMPT, "num_frames": 2, "steps": 2}).encode()

    async def good(self, client: httpx.AsyncClient) -> tuple[str, float]:
        start = time.monotonic()
        try:
            answer = await client.post("/v1/animate", content=self.body, headers={"Content-Type": "application/json"})
            end = str(answer.status_code)
        except httpx.HTTPError as error:
            end = type(error).__name__
        return end, time.monotonic() - start

    async def slow(self, number: int) -> float:
        """Sends one byte a second, of a head or of a body; returns the seconds until it was cut off."""
        head = HEAD.format(host=self.host, length=len(self.body)).encode()
        start = time.monotonic()
        try:
            reader, writer = await asyncio.open_connection(self.host, self.port)
            with contextlib.closing(writer):
                writer.write(head[:60] if number % 2 else head)
                while time.monotonic() < start + self.limit_seconds:
                    writer.write(b"a")
                    await writer.drain()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(reader.read(2**16), 1)
                        break
        except OSError:
            pass
        return time.monotonic() - start

    async def gone(self) -> None:
        """Sends a whole request and hangs up."""
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(self.host, self.port)
            writer.write(HEAD.format(host=self.host, length=len(self.body)).encode() + self.body)
            await writer.drain()
            await asyncio.sleep(0.2)
            writer.close()

    async def hostile(self) -> str:
        """Sends a JSON object of 20 MB whose keys are all unknown."""
        body = b'{"a":1' + b',"a":1' * (HOSTILE_BYTES // 6) + b"}"
        try:
            async with httpx.AsyncClient(base_url=self.url, timeout=self.limit_seconds) as client:
                headers = {"Content-Type": "application/json"}
                return str((await client.post("/v1/animate", content=body, headers=headers)).status_code)
        except httpx.HTTPError as error:
            return type(error).__name__


def _watch(url: str, over: Any, seconds: Any) -> None:
    """Asks /healthz until `over` is set, in a process of its own, which no other caller delays."""
    latencies = []
    with httpx.Client(base_url=url, timeout=60) as client:
        while not over.wait(0.05):
            start = time.monotonic()
            client.get("/healthz")
            latencies.append(time.monotonic() - start)
    seconds.put(latencies)


@contextlib.contextmanager
def watched(url: str) -> Iterator[list[float]]:
    """The seconds of each answer of /healthz during a `with` block, known at its end."""
    context = multiprocessing.get_context("spawn")
    over, seconds = context.Event(), context.Queue()
    process = context.Process(target=_watch, args=(url, over, seconds))
    latencies: list[float] = []
    process.start()
    try:
        yield latencies
    finally:
        over.set()
        latencies += seconds.get(timeout=90)
        process.join()


async def attack(url: str, slow: int, gone: int, good: int, hostile: int, limit_seconds: float = 120) -> dict[str, Any]:
    """Runs all callers at once and returns how they ended."""
    callers = Callers(url, limit_seconds)
    limits = httpx.Limits(max_connections=good)
    with watched(url) as health:
        slow_ones = [asyncio.create_task(callers.slow(number)) for number in range(slow)]
        await asyncio.sleep(3)  # the process that watches has started, too
        gone_ones = [asyncio.create_task(callers.gone()) for _ in range(gone)]
        hostile_ones = [asyncio.create_task(callers.hostile()) for _ in range(hostile)]
        async with httpx.AsyncClient(base_url=url, timeout=limit_seconds, limits=limits) as client:
            ends = await asyncio.gather(*(callers.good(client) for _ in range(good)))
        await asyncio.gather(*gone_ones)
        cut_off = await asyncio.gather(*slow_ones)
        refused = await asyncio.gather(*hostile_ones)
    health.sort()
    return {
        "good": dict(Counter(end for end, _ in ends)),
        "good_longest_seconds": round(max(seconds for _, seconds in ends), 2),
        "slow_cut_off": sum(seconds < limit_seconds for seconds in cut_off),
        "slow_longest_seconds": round(max(cut_off, default=0), 1),
        "hostile": dict(Counter(refused)),
        "healthz_ms": {
            "median": round(1000 * statistics.median(health), 1),
            "p99": round(1000 * health[int(0.99 * (len(health) - 1))], 1),
            "longest": round(1000 * health[-1], 1),
        },
    }


def main(
    model: Path, slow: int = 600, gone: int = 200, good: int = 64, hostile: int = 4, output: Path | None = None
) -> None:
    """Run the callers twice and print the result as JSON.

    The memory is compared after each of the two: the first run fills caches.

    Args:
        model: an exported model folder.
        slow: number of slow senders.
        gone: number of callers that hang up.
        good: number of good callers.
        hostile: number of senders of 20 MB of JSON keys.
        output: file for the result, in addition to the console.
    """
    flags = ("--replicas", "1", "--cpus", "1", "--max-queue", str(good), "--requests-per-minute", "100000")
    with service(model.resolve(), *flags, "--no-access-log") as running:
        gateway = psutil.Process(running.process.pid)
        memory = [gateway.memory_info().rss]
        runs = []
        for _ in range(2):
            runs.append(asyncio.run(attack(running.url, slow, gone, good, hostile)))
            time.sleep(SETTLE_SECONDS)
            memory.append(gateway.memory_info().rss)
        ready = httpx.get(f"{running.url}/readyz").json()
        lines = httpx.get(f"{running.url}/metrics").text.splitlines()
        counts = [line for line in lines if line.startswith(("trip_connections", "trip_http_requests_total"))]
    result = {
        "runs": runs,
        "memory_mb": [round(value / 2**20, 1) for value in memory],
        "memory_growth_percent": round(100 * (memory[-1] / memory[1] - 1), 1),
        "waiting": ready["waiting"],
        "in_flight": ready["in_flight"],
        "metrics": [line for line in counts if "_created" not in line],
    }
    text = json.dumps(result, indent=2)
    print(text)
    if output is not None:
        output.write_text(text + "\n")


if __name__ == "__main__":
    cyclopts.run(main)
