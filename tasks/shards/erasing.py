"""Removes taken down clips from a root for good: their shards in the pool, and the versions that name them."""

from __future__ import annotations

from infra import storage
from tasks.records import UserError
from tasks.shards.layout import ShardSummary, index_name
from tasks.shards.places import pool_of, root_of, siblings_of, version_of, versions_of
from tasks.shards.reading import read_indexes, read_manifest
from tasks.shards.takedowns import Takedowns, read_takedowns, write_takedowns
from tasks.shards.writing import publish_dataset


def erase_shards(dataset: str, recipe_hash: str, rebuilt: dict[str, ShardSummary]) -> None:
    """Deletes shards with taken down clips from the pool of a root, and every version that names one of them.

    Other data sets of the root that have such a shard get the rebuilt one in its place first. A private data set has
    deleted them already.
    """
    if root_of(dataset) is None:
        return
    pool = pool_of(dataset, recipe_hash)
    for name in (dataset, *siblings_of(dataset)):
        try:
            manifest, sha256 = read_manifest(name)
        except UserError:  # not finished
            continue
        if manifest.recipe_hash != recipe_hash:
            continue
        if any(shard.shard in rebuilt for shard in manifest.shards):
            write_takedowns(name, Takedowns(read_takedowns(dataset).marks | read_takedowns(name).marks))
            indexes = read_indexes(name, manifest)
            parts = [rebuilt[index.shard] if index.shard in rebuilt else index.summary() for index in indexes]
            sha256 = publish_dataset(name, manifest.recipe, recipe_hash, manifest.source, parts)
        newest = read_manifest(name)[0]
        for version in versions_of(name):
            # Their indexes have the keys of the clips that were taken down.
            if version != version_of(name, sha256) and not _follows(version, newest.forgotten_sha256):
                storage.delete(version)
    for shard in rebuilt:
        storage.delete(storage.join(pool, index_name(shard)))
        storage.delete(storage.join(pool, shard))


def _follows(version: str, forgotten_sha256: str | None) -> bool:
    """Returns whether a version was written after the takedowns with this hash."""
    try:
        return read_manifest(version)[0].forgotten_sha256 == forgotten_sha256
    except UserError:
        return False
