"""Runs one contender on its cores and measures wall clock, CPU seconds and memory."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

_TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Cost:
    """The cost of one run. CPU seconds are the busy time of the cores without that of this process and its servers."""

    seconds: float
    cpu_seconds: float
    peak_mb: float  # of the whole machine, beyond what was in use before
    server_cpu_seconds: float
    marks: list[tuple[int, float, float]] = field(default_factory=list)  # rows done, wall clock, busy seconds

    def json(self) -> dict[str, float]:
        names = ("seconds", "cpu_seconds", "peak_mb", "server_cpu_seconds")
        return {name: round(getattr(self, name), 2) for name in names}


def run(
    command: list[str],
    cores: list[int],
    log: Path,
    env: dict[str, str] | None = None,
    rows_done: Callable[[], int] = lambda: 0,
) -> Cost:
    """Runs a command to its end on `cores`. Nothing else may run there, as all of their busy time counts.

    `rows_done` says how far it is; each time that it says more than before is a mark.

    Raises:
        SystemExit: it failed; the message holds the end of its log.
    """
    rig = [psutil.Process(), *psutil.Process().children(recursive=True)]
    shared = bool(set(psutil.Process().cpu_affinity() or ()) & set(cores))
    before, peak, over = _used_mb(), 0.0, threading.Event()
    marks: list[tuple[int, float, float]] = []

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.1):
            peak = max(peak, _used_mb() - before)
            done = rows_done()
            if done > (marks[-1][0] if marks else 0):
                marks.append((done, time.monotonic(), busy_seconds(cores)))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    busy, served, began = busy_seconds(cores), _spent(rig), time.monotonic()
    with log.open("wb") as out:
        pinned = ["taskset", "-c", ",".join(map(str, cores)), *command]
        code = subprocess.run(pinned, env=env, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    seconds, busy, served = time.monotonic() - began, busy_seconds(cores) - busy, _spent(rig) - served
    over.set()
    watcher.join()
    if code.returncode:
        raise SystemExit(f"{command[:4]} ended with {code.returncode}:\n{log.read_text()[-3000:]}")
    return Cost(seconds, busy - (served if shared else 0), peak, served, marks)


def between_marks(cost: Cost, cores: int) -> dict[str, Any]:
    """Returns rates between the first and the last finished shard of a run, without start and end."""
    (first, began, busy_then), (last, ended, busy) = cost.marks[0], cost.marks[-1]
    return {
        "clips_per_second_per_core": round((last - first) / (ended - began) / cores, 3),
        "cpu_seconds_per_clip": round((busy - busy_then) / (last - first), 4),
        "rows": last - first,
        "start_seconds": round(cost.seconds - (ended - began), 1),
    }


def steady(few: Cost, many: Cost, rows: int, cores: int) -> dict[str, Any]:
    """Returns rates without the start, from the difference between a long and a short run."""
    seconds, cpu = many.seconds - few.seconds, many.cpu_seconds - few.cpu_seconds
    return {
        "clips_per_second_per_core": round(rows / seconds / cores, 3),
        "cpu_seconds_per_clip": round(cpu / rows, 4),
        "start_seconds": round(few.seconds, 1),
    }


def whole(cost: Cost, rows: int, cores: int) -> dict[str, Any]:
    """Returns rates of a complete run, start included."""
    return {
        "clips_per_second_per_core": round(rows / cost.seconds / cores, 3),
        "cpu_seconds_per_clip": round(cost.cpu_seconds / rows, 4),
        **cost.json(),
    }


def _spent(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def busy_seconds(cores: list[int]) -> float:
    """Returns user, nice, system, irq and softirq time of these cores."""
    lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    mine = [line for line in lines if line[0] in {f"cpu{core}" for core in cores}]
    return sum(int(line[place]) for line in mine for place in (1, 2, 3, 6, 7)) / _TICK


def _used_mb() -> float:
    memory = psutil.virtual_memory()
    return (memory.total - memory.available) / 1e6
