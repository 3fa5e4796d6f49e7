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
    "server": frozenset({"http_425", *(f"http_{status}" for status in range(500, 600))}),
    # A CDN also answers 403 to too many requests; a retry within the run would not help.
    "throttled": frozenset({"http_403", "http_429"}),
    # Another machine may have more memory or time.
    "decoder": frozenset({"decoder_crash", "decoder_timeout", "out_of_memory"}),
}


class UserError(ValueError):
    """An error the user can fix, shown without a traceback: the value, what was expected, and what to do.

    Passwords and tokens are removed from addresses, since the sentence is logged, stored and sent to callers.
    """

    def __init__(self, sentence: str = "") -> None:
        super().__init__(redact(sentence))


@dataclass(frozen=True)
class ClipRef:
    """One usable row of a source; `url` is as written in the source, not resolved; `row` counts from 0."""

    key: str
    url: str
    caption: str
    row: int


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
