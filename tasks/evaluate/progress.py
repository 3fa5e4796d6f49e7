"""A tick line with an estimate of what is left, for people who wait."""

from __future__ import annotations

import time
from collections.abc import Callable


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42s, 3m05s, 2h07m."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Ticks:
    """Emits one line with fixed columns per tick, at most one in `every_seconds`, and always the last.

    `done` items of `total` may be there already when a run is taken up again; they do not count for the speed.
    """

    def __init__(
        self,
        label: str,
        total: int,
        emit: Callable[[str], None],
        done: int = 0,
        every_seconds: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label, self.total, self.emit, self.done, self.every_seconds = label, total, emit, done, every_seconds
        self._before, self._clock = done, clock
        self._start, self._last = clock(), float("-inf")
        if done:
            emit(f"{label:<10} {done}/{total} clips found from before")

    def tick(self, count: int) -> None:
        self.done += count
        now = self._clock()
        if now - self._last < self.every_seconds and self.done < self.total:
            return
        self._last = now
        pace = (now - self._start) / max(1, self.done - self._before)
        width = len(str(self.total))
        self.emit(
            f"{self.label:<10} {self.done:>{width}}/{self.total} clips  {100 * self.done / self.total:3.0f}%"
            f"  {pace:6.2f} s/clip  left {duration(pace * (self.total - self.done))}"
        )
