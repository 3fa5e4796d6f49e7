"""Records that pass between stages: small frozen dataclasses that convert to JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from infra.redaction import redact

# Failure reasons that a later run may resolve, by class; all other reasons are permanent.
RETRY_CLASSES = {
    "network": frozenset({"network", "truncated"}),
    "timeout": frozenset({"timeout", "too_slow", "http_408"}),
    "server": frozenset({"http_425", "store_busy", *(f"http_{status}" for status in range(500, 600))}),
    # A CDN also answers 403 to too many requests, a store also to expired credentials; a retry within the run would
    # not help.
    "throttled": frozenset({"http_403", "http_429", "store_forbidden"}),
    # Another machine may have more memory or time.
    "decoder": frozenset({"decoder_crash", "decoder_timeout", "out_of_memory"}),
    # Rows that failed in several retries, which the root lists; this class asks for them nevertheless.
    "gave_up": frozenset({"gave_up"}),
}


class UserError(ValueError):
    """An error the user can fix, shown without a traceback: the value, what was expected, and what to do.

    Passwords and tokens are removed from addresses, since the sentence is logged, stored and sent to callers.
    """

    def __init__(self, sentence: str = "") -> None:
        super().__init__(redact(sentence))


@dataclass(frozen=True)
class Inside:
    """Where a file of the source itself contains the bytes of a video: a member of a tar or a cell of Parquet."""

    file: str  # address of the tar or of the Parquet file
    offset: int  # of the member's first byte; in Parquet the row in its row group
    size: int  # in bytes; in Parquet the number of the row group
    column: str | None = None  # of Parquet


@dataclass(frozen=True)
class ClipRef:
    """One usable row of a source; `url` is as written in the source, not resolved; `row` counts from 0.

    A row with a span names the part of a video from `start` to `end`, in seconds. An `end` of None is the video's end.
    """

    key: str
    url: str
    caption: str
    row: int
    start: float | None = None
    end: float | None = None
    inside: Inside | None = None  # for a video that is not behind a link
    size_bytes: int | None = None  # of the video, where the source knows it: a file of a folder or a member of a tar

    @property
    def span(self) -> tuple[float, float | None] | None:
        """The span of the row, or None for the whole video."""
        return None if self.start is None else (self.start, self.end)


@dataclass(frozen=True)
class Failure:
    """One row that could not be used; `reason` is a lower_snake word to count by, `detail` describes it in words."""

    key: str
    row: int
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Artifact:
    """A stored result: the address of a folder and the sha256 of its content."""

    uri: str
    sha256: str


def to_json(record: Any) -> dict[str, Any]:
    """Converts a dataclass to a dict for JSON."""
    return dataclasses.asdict(record)


def digest(value: Any) -> str:
    """Returns the identity of a dataclass or JSON value: 16 hex digits of the sha256 of its canonical JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def count_by_reason(failures: Iterable[Failure]) -> dict[str, int]:
    """Counts failures by reason, sorted by reason."""
    return dict(sorted(Counter(failure.reason for failure in failures).items()))


def add_counts(parts: Iterable[dict[str, int]]) -> dict[str, int]:
    """Adds counts by reason, sorted by reason."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(sorted(total.items()))
