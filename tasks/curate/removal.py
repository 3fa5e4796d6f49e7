"""Removes rows from a finished data set: rebuilds the shards that contain them, then writes the manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tasks.records import Failure, UserError
from tasks.shards import (
    DatasetManifest,
    Outcome,
    ShardManifest,
    publish_dataset,
    read_shard_manifest,
    stored_outcomes,
    write_shard,
)

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Removal:
    """Counts of a removal: rows of the source, their samples, and the shards rebuilt without them."""

    rows: int
    samples: int
    shards: int
    manifest_sha: str


def indexes(dataset: str, manifest: DatasetManifest) -> Iterator[ShardManifest]:
    """Yields the index of every shard. Raises UserError if one does not match the manifest."""
    for shard in manifest.shards:
        index = read_shard_manifest(dataset, shard.shard)
        if index is None or index.sha256 != shard.sha256:
            raise UserError(f"the index of {shard.shard} in {dataset} is missing or stale; prepare the data again")
        yield index


def remove_rows(
    dataset: str,
    manifest: DatasetManifest,
    removed: Callable[[ShardManifest], dict[int, Failure]],
    stage: str,
    progress: Progress | None,
) -> Removal:
    """Rebuilds every shard with rows to remove, and publishes; a kill at any moment leaves the old or the new state.

    Args:
        dataset: address of the data set's folder.
        manifest: its manifest as read.
        removed: returns the rows of a shard to remove, as the failures that replace them.
        stage: the name of this step in `progress`.
        progress: called after each shard with `stage`, `done`, `total` (rows) and `removed`.
    Raises:
        UserError: a shard is damaged.
    """
    parts, rows, samples, shards = [], 0, 0, 0
    for number, index in enumerate(indexes(dataset, manifest)):
        failures = removed(index)
        after = index
        if failures:
            span = (index.start, index.stop)
            outcomes = _without(dataset, index, failures)
            after = write_shard(dataset, number, span, outcomes, index.recipe_hash, index.made_with)
            shards += 1
        rows, samples = rows + len(failures), samples + len(index.samples) - len(after.samples)
        parts.append(after.summary())
        if progress is not None:
            progress({"stage": stage, "done": index.stop, "total": manifest.rows, "removed": rows})
    sha = publish_dataset(dataset, manifest.recipe, manifest.recipe_hash, manifest.source, parts)
    return Removal(rows, samples, shards, sha)


def _without(dataset: str, index: ShardManifest, removed: dict[int, Failure]) -> Iterator[Outcome]:
    outcomes = stored_outcomes(dataset, index)
    return (removed.get(row, outcome) for row, outcome in enumerate(outcomes, index.start))
