"""What the root of a data set records about its rows: takedowns, duplicates, and links whose retries gave up.

Every prepare below the root follows these lists, whatever its table or its recipe: a row that one of them names becomes
a failure without a request.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from infra.redaction import name_of
from tasks.records import ClipRef, Failure
from tasks.shards import Takedowns, mark
from tasks.shards.takedowns import (
    DUPLICATE_REASON,
    DUPLICATES_FOLDER,
    TAKEDOWN_REASON,
    add_root_entry,
    read_root_entries,
    read_root_takedowns,
)

RETRIES_FOLDER = "retries"  # one file for each run with retries: hashes of the links that failed again
GAVE_UP = "gave_up"
MAX_RETRIES = 3  # of a link, in runs with --retry


@dataclass(frozen=True)
class Exclusions:
    """Rows that are not encoded: `takedowns` by key, link or file, `duplicates` by key, `gave_up` by link."""

    takedowns: Takedowns = field(default_factory=Takedowns)
    duplicates: Takedowns = field(default_factory=Takedowns)
    gave_up: Takedowns = field(default_factory=Takedowns)

    def failure(self, row: ClipRef | Failure, address: str | None) -> Failure | None:
        """Returns the failure that replaces a row of the source, or None; `address` is that of its link, resolved."""
        failure = self.takedowns.failure(row, address)
        if failure is not None or isinstance(row, Failure):
            return failure
        if self.duplicates.marks and (detail := self.duplicates.marks.get(mark(row.key))) is not None:
            return Failure(row.key, row.row, DUPLICATE_REASON, detail)
        if self.gave_up.marks and (detail := self.gave_up.marks.get(mark(name_of(row.url)))) is not None:
            return Failure(row.key, row.row, GAVE_UP, detail)
        return None

    @property
    def reasons(self) -> frozenset[str]:
        """The reasons of failures that these lists give."""
        return frozenset({TAKEDOWN_REASON, DUPLICATE_REASON, GAVE_UP})

    def __bool__(self) -> bool:
        return bool(self.takedowns.marks or self.duplicates.marks or self.gave_up.marks)


def read_exclusions(dataset: str, takedowns: Takedowns, ask_again: bool) -> Exclusions:
    """Reads the lists of a data set's root. With `ask_again`, links whose retries gave up are not excluded."""
    duplicates = read_root_takedowns(dataset, DUPLICATES_FOLDER)
    if ask_again:
        return Exclusions(takedowns, duplicates)
    counts: Counter[str] = Counter()
    reasons: dict[str, str] = {}
    for entry in read_root_entries(dataset, RETRIES_FOLDER):
        counts.update(entry.marks.keys())
        reasons |= entry.marks
    gave_up = {name: f"{reasons[name]} after {count} retries" for name, count in counts.items() if count >= MAX_RETRIES}
    return Exclusions(takedowns, duplicates, Takedowns(gave_up))


def record_failed_retries(dataset: str, failed: dict[str, str], run: str) -> None:
    """Adds the links that failed again in a run to the root's list.

    Args:
        dataset: address of the data set.
        failed: {link: reason}.
        run: a name of the run; the same run adds its links once.
    """
    if failed:
        marks = {mark(name_of(link)): reason for link, reason in sorted(failed.items())}
        add_root_entry(dataset, Takedowns(marks | {mark(run): "run"}), RETRIES_FOLDER)
