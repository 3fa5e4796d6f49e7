"""The list of clips that were removed because a rights holder asked, by hash, so that no later run brings them back."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from infra import storage
from tasks.records import ClipRef, Failure, UserError
from tasks.shards.layout import parse_record

FORGOTTEN = "forgotten.json"
REASON = "forgotten"


@dataclass(frozen=True)
class Forgotten:
    """`marks` maps the sha256 of a clip key or of a URL to why it was removed; the words themselves are not kept.

    Who knows a key or a URL can find its hash here, nobody can read it from here. Short numbers can be guessed.
    """

    marks: dict[str, str] = field(default_factory=dict)

    def failure(self, row: ClipRef | Failure) -> Failure | None:
        """The row as it stands in the books when its clip is to be forgotten, else None."""
        words = [row.key, row.url] if isinstance(row, ClipRef) else [row.key]
        asked = [self.marks[mark(word)] for word in words if mark(word) in self.marks]
        return Failure(mark(row.key)[:16], row.row, REASON, asked[0]) if asked else None

    def names(self, clip_keys: Iterable[str]) -> bool:
        """Whether any of these clips is to be forgotten."""
        return bool(self.marks) and any(mark(key) in self.marks for key in clip_keys)


def mark(word: str) -> str:
    """Hex sha256 of a clip key or a URL."""
    return hashlib.sha256(word.encode()).hexdigest()


def read_forgotten(dataset: str) -> Forgotten:
    """The list of a data set, empty where there is none. Raises UserError when it cannot be read."""
    address = storage.join(dataset, FORGOTTEN)
    try:
        return parse_record(Forgotten, storage.read_bytes(address))
    except FileNotFoundError:
        return Forgotten()
    except ValueError as error:
        raise UserError(f"{address} cannot be read ({error}); restore it, or removed clips return") from error


def write_forgotten(dataset: str, forgotten: Forgotten) -> None:
    storage.write_json(storage.join(dataset, FORGOTTEN), dataclasses.asdict(forgotten))


def forgotten_sha256(forgotten: Forgotten) -> str | None:
    """What a manifest says of the list it obeys; None for an empty one."""
    return hashlib.sha256(storage.json_bytes(forgotten.marks)).hexdigest() if forgotten.marks else None
