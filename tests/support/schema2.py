"""Writes a data set of schema 2: shards by ranges of rows next to the manifest, the table's hash in the recipe."""

from __future__ import annotations

import dataclasses
from typing import Any

from infra import storage
from tasks.records import digest
from tasks.shards import ShardDataset, index_name, read_indexes, shards_folder
from tasks.shards.layout import DatasetManifest, PublishedShard


def write_schema2(dataset: str, target: str) -> None:
    """Copies a finished data set into the folder `target` in the old form."""
    manifest = ShardDataset(dataset).published
    recipe = manifest.recipe | {"table_sha256": "0" * 64, "columns": {"key": "videoid"}, "clips_per_shard": 3}
    start, shards = 0, []
    for number, index in enumerate(read_indexes(dataset, manifest)):
        stop = start + index.stop - index.start
        old = dataclasses.replace(
            index,
            start=start,
            stop=stop,
            failures=[dataclasses.replace(f, row=f.row - index.start + start) for f in index.failures],
            recipe_hash=digest(recipe),
            schema_version=2,
            row_ids=[],
        ).named(number)
        storage.upload_file(
            storage.join(shards_folder(dataset, manifest), index.shard), storage.join(target, old.shard)
        )
        storage.write_json(storage.join(target, index_name(old.shard)), _without(old, "row_ids"))
        shards.append(PublishedShard(old.shard, (start, stop), len(old.samples), old.size_bytes, old.sha256))
        start = stop
    old_manifest = DatasetManifest(
        recipe,
        digest(recipe),
        {"columns": recipe["columns"], "table_sha256": recipe["table_sha256"], "limit": None},
        *(manifest.rows, manifest.encoded, manifest.samples, manifest.failed, shards),
        schema_version=2,
        forgotten_sha256=manifest.forgotten_sha256,
    )
    storage.write_json(storage.join(target, "recipe.json"), recipe)
    storage.write_json(storage.join(target, "manifest.json"), _without(old_manifest, "index_sha256"))


def _without(record: Any, name: str) -> dict[str, Any]:
    return {field: value for field, value in dataclasses.asdict(record).items() if field != name}
