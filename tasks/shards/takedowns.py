"""Takedowns: hashes of clips that were removed at a rights holder's request, so that no later run adds them again.

A data set below a run's root, `<root>/data/<digest>`, follows two lists: its own `forgotten.json`, and the takedowns of
the root. Those outlive the data set and apply to every data set below the root, whatever its table, limit or recipe:

    <root>/takedowns/<sha256 of the file>.json      one per removal, never changed or deleted

Concurrent writers add separate files, so no entry is lost.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from infra import storage
from infra.redaction import name_of
from tasks.json_records import parse_record
from tasks.records import ClipRef, Failure, UserError
from tasks.shards.places import named, names_of, root_of
from tasks.shards.split import written_key

TAKEDOWNS_FILE = "forgotten.json"
TAKEDOWNS_FOLDER = "takedowns"
DUPLICATES_FOLDER = "duplicates"  # of the root: hashes of the keys that the command deduplicate removed
DUPLICATE_REASON = "duplicate"
TAKEDOWN_REASON = "forgotten"  # of the failures that stand for removed clips
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Takedowns:
    """`marks` maps the sha256 of a clip key, a link or a video file to the reason for the removal.

    Keys and URLs are not stored. A known key or URL can be looked up by its hash but not read back from it; short
    numeric keys can be guessed.
    """

    marks: dict[str, str] = field(default_factory=dict)

    def failure(self, row: ClipRef | Failure, address: str | None = None, file_sha256: str = "") -> Failure | None:
        """Returns the failure that replaces a row whose clip is taken down, else None.

        Args:
            row: a row of the source, or its failure.
            address: the resolved address of the row's link.
            file_sha256: hash of the file at that address.
        """
        matches = self._matches(row, address, file_sha256)
        return Failure(mark(row.key)[:16], row.row, TAKEDOWN_REASON, self.marks[matches[0]]) if matches else None

    def matching(self, rows: Iterable[tuple[ClipRef | Failure, str | None]]) -> Takedowns:
        """Returns the entries that match a key, link or address of these rows."""
        return Takedowns({mark: self.marks[mark] for row, address in rows for mark in self._matches(row, address)})

    def _matches(self, row: ClipRef | Failure, address: str | None, file_sha256: str = "") -> list[str]:
        if not self.marks:
            return []
        links = [row.url] if isinstance(row, ClipRef) else []
        links += [address] if address is not None else []
        candidates = [
            mark(row.key),
            mark(written_key(row.key)),
            *(mark for link in links for mark in link_marks(link)),
            file_sha256,
        ]
        return [mark for mark in candidates if mark in self.marks]


def mark(word: str) -> str:
    """Returns the hex sha256 of a clip key or a URL."""
    return hashlib.sha256(word.encode()).hexdigest()


def link_marks(url: str) -> list[str]:
    """Returns the hashes of a link: as written, as stored in records, and in a normalized form.

    The normalized form has no scheme, user, default port, fragment or escapes, and the host in lower case.
    """
    written = list(dict.fromkeys((mark(url), mark(name_of(url)))))
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme, parts.hostname, parts.port
    except ValueError:
        return written
    if scheme not in _PORTS or not host:
        return written
    authority = host.rstrip(".") + (f":{port}" if port not in (None, _PORTS[scheme]) else "")
    return [*written, mark(f"//{authority}{unquote(parts.path) or '/'}?{unquote(parts.query)}")]


def read_takedowns(dataset: str) -> Takedowns:
    """Returns the data set's own list, which all its versions have; empty if there is none.

    Raises:
        UserError: the list cannot be read.
    """
    address = storage.join(named(dataset), TAKEDOWNS_FILE)
    try:
        return parse_record(Takedowns, storage.read_bytes(address))
    except FileNotFoundError:
        return Takedowns()
    except ValueError as error:
        raise UserError(f"{address} cannot be read ({error}); restore it, or removed clips return") from error


def write_takedowns(dataset: str, takedowns: Takedowns) -> None:
    """Replaces the data set's own list."""
    storage.write_json(storage.join(named(dataset), TAKEDOWNS_FILE), dataclasses.asdict(takedowns))


def takedowns_sha256(takedowns: Takedowns) -> str | None:
    """Returns the hash that a manifest records of the list it follows; None for an empty list."""
    return hashlib.sha256(storage.json_bytes(takedowns.marks)).hexdigest() if takedowns.marks else None


def read_root_takedowns(dataset: str, folder: str = TAKEDOWNS_FOLDER) -> Takedowns:
    """Returns the takedowns of a data set's root; empty if the data set is not at `<root>/data/<digest>`.

    Args:
        dataset: address of the data set.
        folder: the folder of the root that has the list; other lists of hashes have the same form.
    Raises:
        UserError: an entry is damaged.
    """
    marks: dict[str, str] = {}
    for entry in read_root_entries(dataset, folder):
        marks = entry.marks | marks
    return Takedowns(marks)


def read_root_entries(dataset: str, folder: str) -> Iterator[Takedowns]:
    """Yields each file of a list of a data set's root, in the order of their names. Raises as `read_root_takedowns`."""
    root = root_of(dataset)
    address_of_list = storage.join(root, folder) if root is not None else ""
    for name in storage.list_dir(address_of_list) if root is not None else []:
        if not re.fullmatch(r"[0-9a-f]{64}\.json", name):
            continue
        address = storage.join(address_of_list, name)
        content = storage.read_bytes(address)
        if f"{hashlib.sha256(content).hexdigest()}.json" != name:
            raise UserError(f"{address} was changed, its name is not its sha256; restore it, or removed clips return")
        try:
            yield parse_record(Takedowns, content)
        except ValueError as error:
            raise UserError(f"{address} cannot be read ({error}); restore it, or removed clips return") from error


def add_root_takedowns(dataset: str, takedowns: Takedowns, folder: str = TAKEDOWNS_FOLDER) -> None:
    """Adds entries that are missing from a list of a data set's root; does nothing without a root."""
    if root_of(dataset) is None:
        return
    known = read_root_takedowns(dataset, folder).marks
    new = Takedowns({mark: reason for mark, reason in takedowns.marks.items() if mark not in known})
    if new.marks:
        add_root_entry(dataset, new, folder)


def add_root_entry(dataset: str, entry: Takedowns, folder: str) -> None:
    """Adds one file, named after its content, to a list of a data set's root; does nothing without a root."""
    root = root_of(dataset)
    if root is not None:
        content = storage.json_bytes(dataclasses.asdict(entry))
        storage.write_bytes(storage.join(root, folder, f"{hashlib.sha256(content).hexdigest()}.json"), content)


def gather_root_takedowns(dataset: str) -> Takedowns:
    """Adds the lists of all data sets below a root to the root's takedowns and returns those.

    Data sets from before root takedowns existed have only their own list.
    """
    root = root_of(dataset)
    if root is None:
        return Takedowns()
    lists = [read_takedowns(name).marks for name in names_of(root)]
    add_root_takedowns(dataset, Takedowns({mark: reason for marks in lists for mark, reason in marks.items()}))
    return read_root_takedowns(dataset)
