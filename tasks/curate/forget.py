"""Removes clips from a finished data set because a rights holder asks, and leaves a data set that verifies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from infra import storage
from infra.redaction import name_of
from tasks.curate.removal import Progress, indexes, remove_rows
from tasks.records import Failure
from tasks.shards import (
    Entry,
    Forgotten,
    ShardManifest,
    add_takedowns,
    clip_key_of,
    decode_field,
    forgotten_sha256,
    link_marks,
    mark,
    read_forgotten,
    read_manifest,
    report_addresses,
    write_forgotten,
)

_READS = 16  # range reads under way at once


@dataclass(frozen=True)
class ForgetReport:
    """What was removed: rows of the table, their samples, and the shards that were made anew without them."""

    dataset: str
    rows: int
    samples: int
    shards: int
    unknown: tuple[str, ...]
    manifest_sha: str


def forget(
    dataset: str,
    ids: Collection[str],
    reason: str = "asked for",
    as_key: Callable[[str], str] = str,
    progress: Progress | None = None,
) -> ForgetReport:
    """Removes clips by key or by URL; their rows become failures under `forgotten`, with a hash in place of the key.

    Rows that have the link or the bytes of a removed clip go with it. Hashes of keys, links and files are recorded in
    the data set and in the takedowns of the root it lies below (`tasks.shards.takedowns`), so that no prepare below
    that root brings them back. Every clip's `meta` is read two or three times.

    The order makes it safe to be killed at any moment, and the same command completes it: first the takedowns; then the
    data set's own list, from where on readers refuse the data set; then the shards without it; then the manifest that
    names them. An id that the data set does not hold is returned as unknown; it goes on the lists all the same.

    Args:
        ids: as the person wrote them. as_key: how the data set spells such an id as a clip key.
        progress: called after each shard with `stage`, `done`, `total` (rows) and `removed`.
    Raises:
        UserError: no finished data set, or a damaged shard.
    """
    dataset = storage.absolute(dataset)
    manifest, _ = read_manifest(dataset)
    before = read_forgotten(dataset)
    complete = manifest.forgotten_sha256 == forgotten_sha256(before)
    known = {word for word in ids if complete and before.marks.keys() & {*link_marks(word), mark(as_key(word))}}

    keys, links = {as_key(word) for word in ids}, set(ids)
    found = _Clips(keys, links)
    while found.add(row for index in indexes(dataset, manifest) for row in _rows(dataset, index, found.links)):
        pass
    known |= {word for word in ids if as_key(word) in found.seen_keys or found.seen_links & {*link_marks(word)}}
    asked = {*map(mark, found.keys), *(mark for link in found.links for mark in link_marks(link)), *found.files}
    forgotten = Forgotten(dict.fromkeys(sorted(asked), reason) | before.marks)
    add_takedowns(dataset, forgotten)
    if forgotten != before:
        write_forgotten(dataset, forgotten)

    for address in report_addresses(dataset).values():  # its pictures and captions may be of what is removed
        storage.delete(address)
    removal = remove_rows(dataset, manifest, lambda index: _removed(index, forgotten), "forget", progress)
    unknown = tuple(word for word in ids if word not in known)
    return ForgetReport(dataset, removal.rows, removal.samples, removal.shards, unknown, removal.manifest_sha)


class _Clips:
    """Keys, links and file hashes that belong to clips to be removed, which grow with each row that has one of them."""

    def __init__(self, keys: Collection[str], links: Collection[str]) -> None:
        self.keys, self.links, self.files = set(keys), set(links), set[str]()
        self.seen_keys, self.seen_links = set[str](), set[str]()  # those that rows of the data set have, links as marks
        self._marks = {mark for link in links for mark in link_marks(link)}

    def add(self, rows: Iterable[tuple[str, str | None, str | None]]) -> bool:
        """Takes in the rows (key, link, sha256 of the file) that share one; returns whether anything is new."""
        before = len(self.keys) + len(self.links) + len(self.files) + len(self.seen_keys)
        for key, link, file_sha256 in rows:
            marks = {*link_marks(link)} if link is not None else set[str]()
            if key in self.keys or marks & self._marks or file_sha256 in self.files:
                self.keys.add(key)
                self.seen_keys.add(key)
                self.seen_links |= marks
                self._marks |= marks
                self.links |= {link} if link is not None else set()
                self.files |= {file_sha256} if file_sha256 is not None else set()
        return len(self.keys) + len(self.links) + len(self.files) + len(self.seen_keys) > before


def _rows(dataset: str, index: ShardManifest, links: Collection[str]) -> Iterator[tuple[str, str | None, str | None]]:
    """(clip key, link, sha256 of the file) of each row, as far as they are known; one range read a clip.

    Of a row that failed the link is known where it is one of `links` and the detail begins with it.
    """
    tar = storage.join(dataset, index.shard)

    def read(entry: Entry) -> tuple[str, str | None, str | None]:
        offset, size = entry.members["meta"]
        meta = decode_field("meta", storage.read_range(tar, offset, offset + size))
        return clip_key_of(entry.key), meta.get("url"), meta.get("sha256")

    with ThreadPoolExecutor(_READS) as threads:
        yield from threads.map(read, [entries[0] for entries in index.clips().values()])
    names = {name: link for link in links for name in (link, name_of(link))}  # data sets keep no secret of a URL
    for failure in index.failures:
        link = next((link for name, link in names.items() if failure.detail.startswith(f"{name}: ")), None)
        yield failure.key, link, None


def _removed(index: ShardManifest, forgotten: Forgotten) -> dict[int, Failure]:
    """The rows of a shard that change, as they stand in the books from now on."""
    rows = [Failure(clip_key_of(entries[0].key), row, "") for row, entries in index.clips().items()]
    changed = [forgotten.failure(row) for row in (*rows, *index.failures)]
    return {failure.row: failure for failure in changed if failure is not None}
