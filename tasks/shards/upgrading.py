"""Upgrades a data set of schema 2 in place: its tars keep their bytes, and nothing is downloaded or encoded.

Schema 2 has its shards next to the manifest, knows them by ranges of rows of one table, whose hash is part of the
recipe, and has no array file. The upgrade gives every row its identity, from the caption and the `meta` of its first
sample, moves the shards to the pool of the root, and writes a manifest of the present schema.
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from infra import storage
from tasks.records import Failure, UserError, digest
from tasks.shards.fields import decode_field
from tasks.shards.identity import key_id, row_id
from tasks.shards.layout import (
    RECIPE,
    SCHEMA_VERSION,
    Entry,
    ShardManifest,
    clip_key_of,
    index_name,
    rows_label,
)
from tasks.shards.places import named, pool_of
from tasks.shards.reading import read_manifest, read_shard_manifest
from tasks.shards.writing import publish_dataset

# What a recipe of schema 2 says of the source and of the grouping of its rows.
_OF_SOURCE = ("table_sha256", "columns", "format", "split", "held_out", "captions", "encoding", "entities")
_GROUPING = ("clips_per_shard",)
_SIZED = ("folder", "classes", "tar")  # formats whose rows are known by the size of their file as well
_READS = 16  # concurrent range reads


def recipe_of_samples(recipe: dict[str, Any]) -> dict[str, Any]:
    """Returns the present recipe for one of schema 2: without the source and the grouping."""
    return {name: value for name, value in recipe.items() if name not in (*_OF_SOURCE, *_GROUPING)}


def upgrade(dataset: str) -> bool:
    """Upgrades a finished data set; returns whether anything was done. After a kill, repeat the call.

    Takes one read per clip. The rows keep their shards and their order; the shards get other names, and the manifest
    another hash.

    Raises:
        UserError: the data set is not finished, or the index of a shard is missing or stale.
    """
    dataset = named(storage.absolute(dataset))
    manifest, _ = read_manifest(dataset)
    if manifest.schema_version != 2:
        return _finish(dataset, manifest.recipe)
    recipe = recipe_of_samples(manifest.recipe)
    recipe_hash = digest(recipe)
    pool = pool_of(dataset, recipe_hash)
    is_sized = manifest.recipe.get("format") in _SIZED
    parts = []
    for shard in manifest.shards:
        index = read_shard_manifest(dataset, shard.shard)
        if index is None or index.sha256 != shard.sha256:
            raise UserError(f"the index of {shard.shard} in {dataset} is missing or stale; prepare the data again")
        row_ids = _row_ids(storage.join(dataset, index.shard), index, is_sized)
        upgraded = dataclasses.replace(
            index,
            shard="",
            start=0,
            stop=index.stop - index.start,
            failures=[dataclasses.replace(f, row=f.row - index.start) for f in index.failures],
            recipe_hash=recipe_hash,
            schema_version=SCHEMA_VERSION,
            row_ids=row_ids,
        ).named(rows_label(row_ids))
        storage.copy_file(storage.join(dataset, index.shard), storage.join(pool, upgraded.shard))
        storage.write_json(storage.join(pool, index_name(upgraded.shard)), upgraded.content())
        parts.append(upgraded.summary())
    publish_dataset(dataset, recipe, recipe_hash, {}, parts)
    _finish(dataset, recipe)
    return True


def _finish(dataset: str, recipe: dict[str, Any]) -> bool:
    """Does what follows the manifest: the recipe's own file, and the deletion of the old shards."""
    address = storage.join(dataset, RECIPE)
    try:
        current = storage.read_json(address) == recipe
    except (FileNotFoundError, ValueError):
        current = False
    if not current:
        storage.write_json(address, recipe)
    old = []
    if pool_of(dataset, digest(recipe)) != dataset:
        old = [name for name in storage.list_dir(dataset) if name.startswith("shard-")]
    for name in sorted(old):  # each index before its tar
        storage.delete(storage.join(dataset, name))
    return bool(old) or not current


def _row_ids(tar: str, index: ShardManifest, is_sized: bool) -> list[str]:
    def read(entry: Entry) -> str:
        key, values = clip_key_of(entry.key), {}
        for name in ("caption", "meta"):
            offset, size = entry.members[name]
            values[name] = decode_field(name, storage.read_range(tar, offset, offset + size))
        meta = values["meta"]
        if not isinstance(meta.get("url"), str):
            return key_id(key)
        span = (meta["span"][0], meta["span"][1]) if "span" in meta else None
        return row_id(key, meta["url"], values["caption"], span, meta.get("size_bytes") if is_sized else None)

    clips = index.clips()
    with ThreadPoolExecutor(_READS) as threads:
        ids = dict(zip(clips, threads.map(read, [entries[0] for entries in clips.values()]), strict=True))
    failures: dict[int, Failure] = {failure.row: failure for failure in index.failures}
    return [ids[row] if row in ids else key_id(failures[row].key) for row in range(index.start, index.stop)]
