"""Takes down clips of a finished data set at a rights holder's request; the data set stays valid."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from infra import storage
from infra.redaction import name_of
from tasks.curate.removal import Progress, remove_rows
from tasks.records import Failure
from tasks.shards import (
    Entry,
    ShardManifest,
    Takedowns,
    add_root_takedowns,
    decode_field,
    link_marks,
    mark,
    named,
    read_indexes,
    read_manifest,
    read_takedowns,
    report_addresses,
    row_key_of,
    shards_folder,
    takedowns_sha256,
    upgrade,
    write_takedowns,
)
from tasks.shards.split import row_key, written_key

_READS = 16  # concurrent range reads


@dataclass(frozen=True)
class ForgetReport:
    """Counts of a removal: rows of the source, their samples, and the shards rebuilt without them."""

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
    """Removes clips by key or URL; their rows become failures with reason `forgotten` and a hash in place of the key.

    Rows with the link or the file of a removed clip are removed too. Hashes of keys, links and files are added to the
    takedowns of the data set and of its root (`tasks.shards.takedowns`), so that no prepare below that root adds the
    clips again. Every clip's `meta` is read two or three times. Below a root the shards with the clips are deleted from
    the pool; other data sets of the root that have these shards lose the clips as well.

    The call can be killed at any moment and completed by repeating it. It writes the root's takedowns, then the data
    set's own list, after which readers reject the data set, then the shards without the clips, then the manifest. An id
    that the data set does not contain is returned as unknown, but added to the takedowns as well.

    Args:
        dataset: address of the data set's folder.
        ids: clip keys or URLs as the user wrote them; the key of a shot stands for its video.
        reason: stored in each failure and takedown.
        as_key: converts an id to the key of a row.
        progress: called after each shard with `stage`, `done`, `total` (rows) and `removed`.
    Raises:
        UserError: the data set is not finished, or a shard is damaged.
    """
    dataset = named(storage.absolute(dataset))
    upgrade(dataset)
    manifest, _ = read_manifest(dataset)
    pool = shards_folder(dataset, manifest)
    before = read_takedowns(dataset)
    complete = manifest.forgotten_sha256 == takedowns_sha256(before)
    key_of = {word: as_key(row_key(word)) for word in ids}
    known = {word for word in ids if complete and before.marks.keys() & {*link_marks(word), mark(key_of[word])}}

    keys, links = set(key_of.values()), set(ids)
    clips = _Clips(keys, links)
    while clips.add(row for index in read_indexes(dataset, manifest) for row in _rows(pool, index, clips.links)):
        pass
    known |= {word for word in ids if key_of[word] in clips.seen_keys or clips.seen_links & {*link_marks(word)}}
    marks = {*map(mark, clips.keys), *(mark for link in clips.links for mark in link_marks(link)), *clips.files}
    takedowns = Takedowns(dict.fromkeys(sorted(marks), reason) | before.marks)
    add_root_takedowns(dataset, takedowns)
    if takedowns != before:
        write_takedowns(dataset, takedowns)

    for address in report_addresses(dataset).values():  # it may show frames and captions of removed clips
        storage.delete(address)
    removal = remove_rows(dataset, manifest, lambda index: _removed(index, takedowns), "forget", progress, erase=True)
    unknown = tuple(word for word in ids if word not in known)
    return ForgetReport(dataset, removal.rows, removal.samples, removal.shards, unknown, removal.manifest_sha)


class _Clips:
    """Keys, links and file hashes of the clips to remove; a row that shares one adds its others."""

    def __init__(self, keys: Collection[str], links: Collection[str]) -> None:
        self.keys, self.links, self.files = set(keys), set(links), set[str]()
        self.seen_keys, self.seen_links = set[str](), set[str]()  # those of rows in the data set; links as marks
        self._marks = {mark for link in links for mark in link_marks(link)}

    def add(self, rows: Iterable[tuple[str, str | None, str | None]]) -> bool:
        """Adds the rows (key, link, sha256 of the file) that share one; returns whether anything is new."""
        before = len(self.keys) + len(self.links) + len(self.files) + len(self.seen_keys)
        for key, link, file_sha256 in rows:
            marks = {*link_marks(link)} if link is not None else set[str]()
            written = written_key(key)  # of all spans of a video that have one key in the table
            if {key, written} & self.keys or marks & self._marks or file_sha256 in self.files:
                self.keys.add(key)
                self.seen_keys |= {key, written}
                self.seen_links |= marks
                self._marks |= marks
                self.links |= {link} if link is not None else set()
                self.files |= {file_sha256} if file_sha256 is not None else set()
        return len(self.keys) + len(self.links) + len(self.files) + len(self.seen_keys) > before


def _rows(pool: str, index: ShardManifest, links: Collection[str]) -> Iterator[tuple[str, str | None, str | None]]:
    """Yields (row's key, link, sha256 of the file) of each row, None where unknown; one range read per row.

    The link of a failed row is known if it is one of `links` and the failure's detail begins with it.
    """
    tar = storage.join(pool, index.shard)

    def read(entry: Entry) -> tuple[str, str | None, str | None]:
        offset, size = entry.members["meta"]
        meta = decode_field("meta", storage.read_range(tar, offset, offset + size))
        return row_key_of(entry.key), meta.get("url"), meta.get("sha256")

    with ThreadPoolExecutor(_READS) as threads:
        yield from threads.map(read, [entries[0] for entries in index.clips().values()])
    names = {name: link for link in links for name in (link, name_of(link))}  # records omit the secrets of a URL
    for failure in index.failures:
        link = next((link for name, link in names.items() if failure.detail.startswith(f"{name}: ")), None)
        yield failure.key, link, None


def _removed(index: ShardManifest, takedowns: Takedowns) -> dict[int, Failure]:
    """Returns the rows of a shard to remove, as the failures that replace them."""
    rows = [Failure(row_key_of(entries[0].key), row, "") for row, entries in index.clips().items()]
    changed = [takedowns.failure(row) for row in (*rows, *index.failures)]
    return {failure.row: failure for failure in changed if failure is not None}
