"""Removes rows from a finished data set: rebuilds the shards that contain them, then writes the manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tasks.records import Failure
from tasks.shards import (
    DatasetManifest,
    Outcome,
    ShardManifest,
    ShardSummary,
    erase_shards,
    publish_dataset,
    read_indexes,
    rows_label,
    shards_folder,
    stored_outcomes,
    write_shard,
)
from tasks.shards.identity import without_caption

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Removal:
    """Counts of a removal: rows of the source, their samples, and the shards rebuilt without them."""

    rows: int
    samples: int
    shards: int
    manifest_sha: str


def remove_rows(
    dataset: str,
    manifest: DatasetManifest,
    removed: Callable[[ShardManifest], dict[int, Failure]],
    stage: str,
    progress: Progress | None,
    erase: bool = False,
) -> Removal:
    """Rebuilds every shard with rows to remove, and publishes; a kill at any moment leaves the old or the new state.

    Args:
        dataset: address of the data set's folder.
        manifest: its manifest as read.
        removed: returns the rows of a shard to remove, as the failures that replace them.
        stage: the name of this step in `progress`.
        progress: called after each shard with `stage`, `done`, `total` (rows) and `removed`.
        erase: the removed samples must not remain below the root: also replaces the rebuilt shards in the other data
            sets of the root, then deletes them and all versions that name them.
    Raises:
        UserError: a shard is damaged.
    """
    pool = shards_folder(dataset, manifest)
    parts, rows, samples, done = [], 0, 0, 0
    rebuilt: dict[str, ShardSummary] = {}
    for number, index in enumerate(read_indexes(dataset, manifest)):
        failures = removed(index)
        after = index
        if failures:
            ids = _without_captions(index, failures) if erase else index.row_ids
            label = rows_label(ids) if ids else number
            span, outcomes = (index.start, index.stop), _without(pool, index, failures)
            after = write_shard(pool, label, span, outcomes, index.recipe_hash, index.made_with, ids)
            rebuilt[index.shard] = after.summary()
        rows, samples = rows + len(failures), samples + len(index.samples) - len(after.samples)
        parts.append(after.summary())
        done += index.stop - index.start
        if progress is not None:
            progress({"stage": stage, "done": done, "total": manifest.rows, "removed": rows})
    sha = publish_dataset(dataset, manifest.recipe, manifest.recipe_hash, manifest.source, parts)
    if erase:
        erase_shards(dataset, manifest.recipe_hash, rebuilt)
    return Removal(rows, samples, len(rebuilt), sha)


def _without(pool: str, index: ShardManifest, removed: dict[int, Failure]) -> Iterator[Outcome]:
    outcomes = stored_outcomes(pool, index)
    return (removed.get(row, outcome) for row, outcome in enumerate(outcomes, index.start))


def _without_captions(index: ShardManifest, removed: dict[int, Failure]) -> list[str]:
    return [
        without_caption(identity) if row in removed else identity
        for row, identity in enumerate(index.row_ids, index.start)
    ]
