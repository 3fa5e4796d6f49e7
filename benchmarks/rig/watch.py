"""Samples memory and CPU time of this process and its descendants, by role."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

_ROLES = {"tasks.video.decode_pool": "decoder", "EncodeWorker": "worker", "raylet": "ray", "gcs_server": "ray"}


class Watch:
    """Samples once a second: peak memory in MB by role (of one process) and CPU seconds by role (of all)."""

    def __init__(self, every_seconds: float = 1.0) -> None:
        self._every, self._over = every_seconds, threading.Event()
        self._me = psutil.Process()
        self._seconds: dict[tuple[str, int], float] = {}
        self._before = sum(self._me.cpu_times()[:2])
        self.peak_mb: defaultdict[str, float] = defaultdict(float)

    def driver_mb(self) -> float:
        return round(self._me.memory_info().rss / 1e6, 1)

    def cpu_seconds(self) -> dict[str, float]:
        """Returns CPU seconds of the driver, its workers and their decoders, as of their last sample."""
        sums: defaultdict[str, float] = defaultdict(float)
        for (role, _), seconds in self._seconds.items():
            sums[role] += seconds
        return {role: round(sums[role], 2) for role in sorted(sums)}

    def sample(self) -> None:
        for process in [self._me, *self._me.children(recursive=True)]:
            try:
                role = "driver" if process is self._me else _role(process)
                seconds, rss = sum(process.cpu_times()[:2]), process.memory_info().rss / 1e6
            except psutil.Error:
                continue
            if role is not None:
                self._seconds[role, process.pid] = seconds - (self._before if role == "driver" else 0)
                self.peak_mb[role] = max(self.peak_mb[role], round(rss, 1))

    def run(self) -> None:
        while not self._over.wait(self._every):
            self.sample()

    def stop(self) -> None:
        self._over.set()
        self.sample()


@contextmanager
def watching() -> Iterator[Watch]:
    """Runs a `Watch` during a block."""
    watch = Watch()
    thread = threading.Thread(target=watch.run, name="watch", daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        watch.stop()
        thread.join()


class Timeline:
    """A progress callback that records the driver's memory at equal shares of the rows."""

    def __init__(self, watch: Watch, points: int = 20) -> None:
        self._watch, self._points, self._began = watch, points, time.monotonic()
        self.points: list[dict[str, Any]] = []

    def __call__(self, tick: dict[str, Any]) -> None:
        part = tick["done"] * self._points // max(tick["total"], 1)
        if not self.points or part > self.points[-1]["part"]:
            seconds = round(time.monotonic() - self._began, 1)
            self.points.append(
                {"part": part, "rows": tick["done"], "seconds": seconds, "driver_mb": self._watch.driver_mb()}
            )


def _role(process: psutil.Process) -> str | None:
    line = " ".join(process.cmdline())
    return next((role for mark, role in _ROLES.items() if mark in line), None)
