"""Delivers records to a slow or unreachable receiver from a background thread; spools undelivered ones to a file."""

from __future__ import annotations

import json
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from infra.redaction import redact

_MAX_PENDING = 50_000
_LONGEST_PAUSE_SECONDS = 30.0
_MOST_WAITS = 20  # of `close`, while a slow receiver still accepts records

Record = dict[str, Any]
_log = logging.getLogger(__name__)


class Outbox:
    """A queue of JSON-able records, delivered in order. A record may be sent twice.

    Args:
        send: delivers records from the head of the queue.
        batch: returns how many records the next call of `send` gets.
        trouble: classes of errors after which the records stay in the queue, and are retried after a growing pause.
        refused: whether a retry after this error cannot succeed; the records are then dropped.
        spool: file of JSON lines that keeps the queue after an error; the next outbox with this file sends them first.

    Attributes:
        failures: number of failed attempts.
        dropped: number of dropped records.
        last_error: the last error, "" without one.
    """

    def __init__(
        self,
        name: str,
        send: Callable[[list[Record]], None],
        batch: Callable[[Iterable[Record]], int],
        trouble: tuple[type[Exception], ...],
        refused: Callable[[Exception], bool],
        spool: str | Path | None = None,
    ) -> None:
        self.failures = 0
        self.dropped = 0
        self.last_error = ""
        self._name, self._send, self._batch, self._trouble, self._refused = name, send, batch, trouble, refused
        self._spool = Path(spool) if spool else None
        self._pending: deque[Record] = deque(self._read_spool())
        self._spooled = len(self._pending)  # records at the head of the queue that are in the spool already
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._deliver, name=name, daemon=True)

    def start(self) -> None:
        """Starts the delivery."""
        self._thread.start()

    def put(self, record: Record) -> None:
        """Queues a record; returns at once. A full queue drops it."""
        with self._changed:
            if len(self._pending) >= _MAX_PENDING:
                self.dropped += 1
                return
            self._pending.append(record)
            self._changed.notify_all()

    def flush(self, wait_seconds: float, failures: int | None = None) -> bool:
        """Waits until the queue is empty, at most `wait_seconds`; True if it is, else writes the rest to the spool.

        With `failures` it stops waiting after this number of failed attempts.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: not self._pending or (failures is not None and self.failures >= failures), wait_seconds
            )
            if self._pending:
                self._write_spool()
            return not self._pending

    def close(self, wait_seconds: float) -> bool:
        """Delivers the rest without pauses; True if everything was delivered.

        It ends after the first error, or after `wait_seconds` in which the receiver accepted nothing.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for _ in range(_MOST_WAITS):
            left = len(self._pending)
            self._thread.join(timeout=wait_seconds)
            if not self._thread.is_alive() or len(self._pending) >= left:
                break
        if self.flush(0):
            return True
        where = f"kept in {self._spool}" if self._spool else "lost"
        _log.warning("%s: %d records not delivered, %s: %s", self._name, len(self._pending), where, self.last_error)
        return False

    def _deliver(self) -> None:
        pause = 0.5
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closing)
                if not self._pending:
                    return
                records = list(islice(self._pending, self._batch(self._pending)))
            try:
                self._send(records)
            except self._trouble as error:
                self._note(error)
                if not self._refused(error):
                    with self._changed:
                        self._write_spool()
                        self._changed.notify_all()
                        if self._closing:
                            return
                        self._changed.wait_for(lambda: self._closing, timeout=pause)
                    pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                    continue
                self.dropped += len(records)
            pause = 0.5
            self._delivered(len(records))

    def _delivered(self, count: int) -> None:
        with self._changed:
            for _ in range(count):
                self._pending.popleft()
            self._spooled = max(0, self._spooled - count)
            if self._spool is not None and not self._pending:
                self._spooled = 0
                try:
                    self._spool.unlink(missing_ok=True)
                except OSError as error:
                    self._note(error)
            self._changed.notify_all()

    def _read_spool(self) -> list[Record]:
        if self._spool is None or not self._spool.exists():
            return []
        records = []
        text = self._spool.read_text(encoding="utf-8")
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # a line cut off by a kill
                record = None
            if isinstance(record, dict):
                records.append(record)
            else:
                self.dropped += 1
        if text and not text.endswith("\n"):
            with self._spool.open("a", encoding="utf-8") as file:
                file.write("\n")
        return records

    def _write_spool(self) -> None:
        """Appends the records that are not in the file yet."""
        if self._spool is None:
            return
        missing = list(islice(self._pending, self._spooled, None))
        try:
            self._spool.parent.mkdir(parents=True, exist_ok=True)
            with self._spool.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in missing)
        except OSError as error:
            self._note(error)
        else:
            self._spooled = len(self._pending)

    def _note(self, error: Exception) -> None:
        self.failures += 1
        message = redact(" ".join(str(error).split()))[:300]
        self.last_error = f"{type(error).__name__}: {message}"
        log = _log.warning if self.failures == 1 else _log.debug
        log("%s: %s", self._name, self.last_error)
