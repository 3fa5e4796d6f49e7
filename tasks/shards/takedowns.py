"""Which clips were removed because a rights holder asked, by hash, so that no later run brings them back.

A data set below a run's root, `<root>/data/<digest>`, obeys two lists: its own `forgotten.json`, and the root's
takedowns, which outlive the data set and hold for every other one below the root, of whatever table, limit or recipe:

    <root>/takedowns/<sha256 of the file>.json      one for each removal, never changed and never deleted

Two writers add two files, so neither loses the other's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from infra import storage
from infra.redaction import name_of
from tasks.records import ClipRef, Failure, UserError
from tasks.shards.layout import parse_record

FORGOTTEN = "forgotten.json"
TAKEDOWNS = "takedowns"
REASON = "forgotten"
_DIGEST = "[0-9a-f]{16}"
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Forgotten:
    """`marks` maps the sha256 of a clip key, of a link or of a video file to why the clip was removed.

    The words themselves are not kept. Who knows a key or a URL can find its hash here, nobody can read it from here.
    Short numbers can be guessed.
    """

    marks: dict[str, str] = field(default_factory=dict)

    def failure(self, row: ClipRef | Failure, address: str | None = None, file_sha256: str = "") -> Failure | None:
        """The row as it stands in the manifest when its clip is to be forgotten, else None.

        Args:
            address: where the row's link leads. file_sha256: of what came from there.
        """
        asked = self._asked(row, address, file_sha256)
        return Failure(mark(row.key)[:16], row.row, REASON, self.marks[asked[0]]) if asked else None

    def about(self, rows: Iterable[tuple[ClipRef | Failure, str | None]]) -> Forgotten:
        """The part of the list that names a key, link or address of these rows."""
        return Forgotten({mark: self.marks[mark] for row, address in rows for mark in self._asked(row, address)})

    def names(self, clip_keys: Iterable[str]) -> bool:
        """Whether any of these clips is to be forgotten."""
        return bool(self.marks) and any(mark(key) in self.marks for key in clip_keys)

    def _asked(self, row: ClipRef | Failure, address: str | None, file_sha256: str = "") -> list[str]:
        if not self.marks:
            return []
        links = [row.url] if isinstance(row, ClipRef) else []
        links += [address] if address is not None else []
        found = [mark(row.key), *(mark for link in links for mark in link_marks(link)), file_sha256]
        return [mark for mark in found if mark in self.marks]


def mark(word: str) -> str:
    """Hex sha256 of a clip key or a URL."""
    return hashlib.sha256(word.encode()).hexdigest()


def link_marks(url: str) -> list[str]:
    """The hashes by which a link is known: as it is written, as records keep it, and in one spelling.

    That spelling has no scheme, user, default port, fragment, capitals of the host or escapes.
    """
    written = list(dict.fromkeys((mark(url), mark(name_of(url)))))
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme, parts.hostname, parts.port
    except ValueError:
        return written
    if scheme not in _PORTS or not host:
        return written
    place = host.rstrip(".") + (f":{port}" if port not in (None, _PORTS[scheme]) else "")
    return [*written, mark(f"//{place}{unquote(parts.path) or '/'}?{unquote(parts.query)}")]


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


def read_takedowns(dataset: str) -> Forgotten:
    """The takedowns of the root that a data set lies below; empty elsewhere than at `<root>/data/<digest>`.

    Raises:
        UserError: an entry is damaged.
    """
    folder = _takedowns_folder(dataset)
    marks: dict[str, str] = {}
    for name in storage.list_dir(folder) if folder is not None else []:
        if not re.fullmatch(r"[0-9a-f]{64}\.json", name):
            continue
        address = storage.join(folder or "", name)
        content = storage.read_bytes(address)
        if f"{hashlib.sha256(content).hexdigest()}.json" != name:
            raise UserError(f"{address} was changed, its name is not its sha256; restore it, or removed clips return")
        try:
            marks = parse_record(Forgotten, content).marks | marks
        except ValueError as error:
            raise UserError(f"{address} cannot be read ({error}); restore it, or removed clips return") from error
    return Forgotten(marks)


def add_takedowns(dataset: str, forgotten: Forgotten) -> None:
    """Writes to the root of a data set what its takedowns do not name yet; nothing where the data set has no root."""
    folder = _takedowns_folder(dataset)
    if folder is None:
        return
    known = read_takedowns(dataset).marks
    new = Forgotten({mark: reason for mark, reason in forgotten.marks.items() if mark not in known})
    if new.marks:
        content = storage.json_bytes(dataclasses.asdict(new))
        storage.write_bytes(storage.join(folder, f"{hashlib.sha256(content).hexdigest()}.json"), content)


def gather_takedowns(dataset: str) -> Forgotten:
    """The takedowns of a data set's root, after the lists of all data sets below that root were added to them.

    A data set whose clips were removed before there were takedowns has its list alone.
    """
    if _takedowns_folder(dataset) is None:
        return Forgotten()
    siblings = storage.parent(dataset)
    names = [name for name in storage.list_dir(siblings) if re.fullmatch(_DIGEST, name)]
    lists = [read_forgotten(storage.join(siblings, name)).marks for name in names]
    add_takedowns(dataset, Forgotten({mark: reason for marks in lists for mark, reason in marks.items()}))
    return read_takedowns(dataset)


def _takedowns_folder(dataset: str) -> str | None:
    """Where the takedowns of a run lie, from the address of a data set that `flows.layout.address` chose."""
    match = re.fullmatch(rf"(.*[^/])/data/{_DIGEST}", dataset.rstrip("/"))
    return storage.join(match[1], TAKEDOWNS) if match else None
