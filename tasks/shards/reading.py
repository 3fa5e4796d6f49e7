"""Reads the manifest and the indexes of a data set, and complete shards row by row. Nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

from infra import storage
from tasks.json_records import parse_record
from tasks.records import Failure, UserError
from tasks.shards.layout import (
    MANIFEST,
    READABLE,
    DatasetManifest,
    PackedSample,
    ShardManifest,
    index_name,
    shard_label,
)
from tasks.shards.places import named, pool_of
from tasks.shards.sample_index import SampleIndex, index_of_shard, open_index, parts_of


def read_manifest(dataset: str) -> tuple[DatasetManifest, str]:
    """Returns the manifest of a finished data set and its sha256.

    Raises:
        UserError: the manifest is missing, damaged, or of another schema.
    """
    address = storage.join(dataset, MANIFEST)
    try:
        content = storage.read_bytes(address)
        schema_version = json.loads(content).get("schema_version")
    except FileNotFoundError as error:
        raise UserError(
            f"no finished data set at {dataset}: {MANIFEST} is missing;"
            f" {'run the prepare stage' if named(dataset) == dataset else f'take the newest version, {named(dataset)}'}"
        ) from error
    except (ValueError, AttributeError) as error:
        raise UserError(f"{address} is not JSON; delete the file and run the prepare stage again") from error
    if schema_version not in READABLE:
        raise UserError(
            f"{address} has schema {schema_version!r}, expected {' or '.join(map(str, READABLE))};"
            " prepare the data set again"
        )
    try:
        return parse_record(DatasetManifest, content), hashlib.sha256(content).hexdigest()
    except ValueError as error:
        raise UserError(f"{address} is damaged ({error}); delete the file and run the prepare stage again") from error


def read_shard_manifest(pool: str, shard: str) -> ShardManifest | None:
    """Returns the index of a shard (by the name of its tar), or None if it is missing or invalid."""
    try:
        manifest = parse_record(ShardManifest, storage.read_bytes(storage.join(pool, index_name(shard))))
        manifest.clips()
    except (FileNotFoundError, ValueError):
        return None
    return manifest if manifest.schema_version in READABLE and manifest.shard == shard else None


def shards_folder(dataset: str, manifest: DatasetManifest) -> str:
    """Returns the folder with the shards of a finished data set; in schema 2 that is its own."""
    return dataset if manifest.schema_version == 2 else pool_of(dataset, manifest.recipe_hash)


def read_indexes(dataset: str, manifest: DatasetManifest) -> Iterator[ShardManifest]:
    """Yields the index of every shard of a data set. Raises UserError if one does not match the manifest."""
    pool = shards_folder(dataset, manifest)
    for shard in manifest.shards:
        index = read_shard_manifest(pool, shard.shard)
        if index is None or index.sha256 != shard.sha256 or len(index.samples) != shard.samples:
            raise UserError(f"the index of {shard.shard} in {pool} is missing or stale; prepare the data again")
        yield index


def read_parts(dataset: str, manifest: DatasetManifest, manifest_sha256: str) -> dict[str, SampleIndex]:
    """Returns the index of each shard of a data set by name: from its array file, else from the shards' own.

    Raises:
        UserError: an index is missing or damaged.
    """
    index = open_index(dataset, manifest, manifest_sha256)
    if index is not None:
        return parts_of(index, manifest.shards)
    return {shard.shard: shard_arrays(dataset, shard) for shard in read_indexes(dataset, manifest)}


def shard_arrays(dataset: str, index: ShardManifest) -> SampleIndex:
    """Returns the arrays of a shard's index. Raises UserError if it is invalid."""
    try:
        return index_of_shard(index)
    except (ValueError, IndexError) as error:
        raise UserError(
            f"the index of {index.shard} in {dataset} is damaged ({error}); prepare the data again"
        ) from error


def existing_shards(pool: str) -> dict[int | str, list[str]]:
    """Returns the names of the tars in a folder that have an index, by the shard's label."""
    names = set(storage.list_dir(pool))
    existing: dict[int | str, list[str]] = {}
    for name in sorted(names):
        label = shard_label(name)
        if label is not None and index_name(name) in names:
            existing.setdefault(label, []).append(name)
    return existing


def stored_outcomes(pool: str, manifest: ShardManifest) -> Iterator[list[PackedSample] | Failure]:
    """Yields the outcome of each row of a shard, in order, with samples as the bytes of their members.

    Raises:
        UserError: the tar does not match its index.
    """
    failures = {failure.row: failure for failure in manifest.failures}
    clips = manifest.clips()
    sizes = manifest.size_of_samples()
    with storage.local_copy(storage.join(pool, manifest.shard)) as path:
        # Copied bytes get a new checksum, so this is the last check against the old one.
        if storage.sha256_file(path) != manifest.sha256:
            raise UserError(f"{manifest.shard} of {pool} is damaged; delete it and prepare the data again")
        with path.open("rb") as file:
            for row in range(manifest.start, manifest.stop):
                if row in failures:
                    yield failures[row]
                    continue
                samples = []
                for entry in clips[row]:
                    members = {}
                    for name, (offset, size) in entry.members.items():
                        file.seek(offset)
                        members[name] = file.read(size)
                    samples.append(PackedSample(entry.key, members, sizes.get(entry.key)))
                yield samples
