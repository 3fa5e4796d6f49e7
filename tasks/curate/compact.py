"""Merges the small shards of many nights into full ones; every sample keeps its bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from infra import storage
from tasks.curate.removal import Progress
from tasks.records import Failure, UserError
from tasks.shards import (
    Outcome,
    ShardDataset,
    ShardManifest,
    ShardSummary,
    named,
    publish_dataset,
    read_indexes,
    rows_label,
    shards_folder,
    stored_outcomes,
    upgrade,
    version_of,
    write_shard,
)


@dataclass(frozen=True)
class CompactReport:
    """What a merge did: shards before and after, and the small ones among the former."""

    dataset: str
    before: int
    after: int
    merged: int
    manifest_sha: str


def compact(dataset: str, rows_per_shard: int | None = None, progress: Progress | None = None) -> CompactReport:
    """Merges all shards with fewer rows than `rows_per_shard`.

    Order of the samples: the full shards stay in their order; the rows of the small ones, in the order of the manifest,
    follow them in new shards of `rows_per_shard` rows. Every row and sample occurs once, with the bytes that it had;
    the set of samples is the same, their order is not, so a training on the new version is another training. Below a
    root the old shards stay in the pool for older versions.

    Args:
        dataset: address of the data set's folder.
        rows_per_shard: rows of a full shard; None is the number of the largest shard.
        progress: called after each new shard with `stage`, `done` and `total` (rows of small shards).
    Raises:
        UserError: the data set is not finished, a shard is damaged, or the number is not above 0.
    """
    dataset = named(storage.absolute(dataset))
    upgrade(dataset)
    data = ShardDataset(dataset)
    manifest, pool = data.published, shards_folder(dataset, data.published)
    full = rows_per_shard if rows_per_shard is not None else max(stop - start for start, stop in _rows(data))
    if full < 1:
        raise UserError(f"rows per shard {full}, expected at least 1")
    counts = [stop - start for start, stop in _rows(data)]
    if sum(count < full for count in counts) < 2:
        address = version_of(dataset, data.manifest_sha256)
        return CompactReport(address, len(counts), len(counts), 0, data.manifest_sha256)
    small: list[ShardManifest] = []
    parts: list[ShardSummary] = []
    for index in read_indexes(dataset, manifest):
        if index.stop - index.start < full:
            small.append(index)
        else:
            parts.append(index.summary())
    rows = _rows_of(pool, small)
    total = left = sum(index.stop - index.start for index in small)
    made_with = _versions(small)
    identities = [identity for index in small for identity in index.identities()]
    while left:
        count = min(full, left)
        ids = identities[total - left : total - left + count]
        outcomes = (_numbered(next(rows), row) for row in range(count))
        label = rows_label(ids) if pool != dataset else len(parts)
        written = write_shard(pool, label, (0, count), outcomes, manifest.recipe_hash, made_with, ids)
        parts.append(written.summary())
        left -= count
        if progress is not None:
            progress({"stage": "compact", "done": total - left, "total": total})
    sha = publish_dataset(dataset, manifest.recipe, manifest.recipe_hash, manifest.source, parts)
    return CompactReport(version_of(dataset, sha), len(counts), len(parts), len(small), sha)


def _rows(data: ShardDataset) -> list[tuple[int, int]]:
    return [shard.rows for shard in data.published.shards]


def _rows_of(pool: str, indexes: list[ShardManifest]) -> Iterator[Outcome]:
    for index in indexes:
        yield from stored_outcomes(pool, index)


def _numbered(outcome: Outcome, row: int) -> Outcome:
    return replace(outcome, row=row) if isinstance(outcome, Failure) else outcome


def _versions(indexes: list[ShardManifest]) -> dict[str, str]:
    """Returns the library versions of all shards, each once."""
    versions: dict[str, list[str]] = {}
    for index in indexes:
        for name, version in index.made_with.items():
            known = versions.setdefault(name, [])
            known += [word for word in version.split(", ") if word not in known]
    return {name: ", ".join(words) for name, words in versions.items()}
