"""Removes clips from a finished data set because a rights holder asks, and leaves a data set that verifies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from infra import storage
from infra.redaction import name_of
from tasks.curate.removal import Progress, indexes, remove_rows
from tasks.records import Failure
from tasks.shards import (
    Forgotten,
    ShardManifest,
    clip_key_of,
    decode_field,
    forgotten_sha256,
    mark,
    read_forgotten,
    read_manifest,
    report_addresses,
    write_forgotten,
)


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

    The order makes it safe to be killed at any moment, and the same command completes it: first the list of what is
    forgotten, from where on readers refuse the data set; then the shards without it; then the manifest that names them.
    An id that the data set does not hold is returned as unknown; it goes on the list all the same.

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
    known = {word for word in ids if complete and before.marks.keys() & {mark(word), mark(as_key(word))}}

    words = {as_key(word): word for word in ids}
    named: dict[str, str] = {}  # clip key -> the id it was named by
    for index in indexes(dataset, manifest):
        named |= {key: words[key] for key in _keys(index) if key in words}
    urls = set(ids) - known - set(named.values())
    if urls:  # what is no key may be a URL, which only the samples and the details of failures say
        for index in indexes(dataset, manifest):
            named |= {key: url for key, url in _urls(dataset, index, urls)}
    asked = [*named, *ids, *words]
    forgotten = Forgotten({mark(word): reason for word in asked} | before.marks)
    if forgotten != before:
        write_forgotten(dataset, forgotten)

    for address in report_addresses(dataset).values():  # its pictures and captions may be of what is removed
        storage.delete(address)
    removal = remove_rows(dataset, manifest, lambda index: _removed(index, forgotten), "forget", progress)
    unknown = tuple(word for word in ids if word not in known | set(named.values()))
    return ForgetReport(dataset, removal.rows, removal.samples, removal.shards, unknown, removal.manifest_sha)


def _keys(index: ShardManifest) -> set[str]:
    """Keys of all clips and of all rows that failed."""
    return {clip_key_of(entry.key) for entry in index.samples} | {failure.key for failure in index.failures}


def _urls(dataset: str, index: ShardManifest, urls: Collection[str]) -> Iterator[tuple[str, str]]:
    """(clip key, URL) of the rows that are known to come from one of `urls`; one range read a clip."""
    names = {name: url for url in urls for name in (url, name_of(url))}  # data sets keep no secret of a URL
    for entries in index.clips().values():
        offset, size = entries[0].members["meta"]
        meta = decode_field("meta", storage.read_range(storage.join(dataset, index.shard), offset, offset + size))
        if meta.get("url") in names:
            yield clip_key_of(entries[0].key), names[meta["url"]]
    for failure in index.failures:
        yield from ((failure.key, url) for name, url in names.items() if failure.detail.startswith(f"{name}: "))


def _removed(index: ShardManifest, forgotten: Forgotten) -> dict[int, Failure]:
    """The rows of a shard that change, as they stand in the books from now on."""
    rows = [Failure(clip_key_of(entries[0].key), row, "") for row, entries in index.clips().items()]
    changed = [forgotten.failure(row) for row in (*rows, *index.failures)]
    return {failure.row: failure for failure in changed if failure is not None}
