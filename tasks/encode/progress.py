"""Counts rows as shards finish and reports progress."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tasks.shards import ShardSummary

Progress = Callable[[dict[str, Any]], None]
TICK_SECONDS = 10.0


class ProgressAccounting:
    """Accounts for the rows of a run in progress: done, encoded, failed, and processed by this run."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress = total, progress
        self._began = self._reported = time.monotonic()
        self._done = self._encoded = self._failed = self._made = 0
        self.shards_reused = 0

    def add(self, part: ShardSummary, reused: bool = False) -> None:
        """Adds a finished shard and reports."""
        rows = part.stop - part.start
        self._done += rows
        self._encoded += part.encoded
        self._failed += rows - part.encoded
        if reused:
            self.shards_reused += 1
        else:
            self._made += rows
        self._report()

    @property
    def rows_made(self) -> int:
        """Rows that this run processed; reused shards do not count."""
        return self._made

    def tick(self) -> None:
        """Reports while a long shard is in progress, at most every `TICK_SECONDS`."""
        if time.monotonic() - self._reported >= TICK_SECONDS:
            self._report()

    def _report(self) -> None:
        self._reported = time.monotonic()
        if self._progress is None:
            return
        seconds = max(self._reported - self._began, 1e-9)
        rate = self._made / seconds
        self._progress(
            {
                "stage": "prepare",
                "done": self._done,
                "total": self._total,
                "encoded": self._encoded,
                "failed": self._failed,
                "clips_per_second": round(rate, 3),
                "eta_seconds": round((self._total - self._done) / rate, 1) if self._made else None,
            }
        )
