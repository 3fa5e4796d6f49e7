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
    SCHEMA_VERSION,
    DatasetManifest,
    PackedSample,
    ShardManifest,
    index_name,
    shard_number,
)


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
        raise UserError(f"no finished data set at {dataset}: {MANIFEST} is missing; run the prepare stage") from error
    except (ValueError, AttributeError) as error:
        raise UserError(f"{address} is not JSON; delete the file and run the prepare stage again") from error
    if schema_version != SCHEMA_VERSION:
        raise UserError(
            f"{address} has schema {schema_version!r}, expected {SCHEMA_VERSION}; prepare the data set again"
        )
    try:
        return parse_record(DatasetManifest, content), hashlib.sha256(content).hexdigest()
    except ValueError as error:
        raise UserError(f"{address} is damaged ({error}); delete the file and run the prepare stage again") from error


def read_shard_manifest(dataset: str, shard: str) -> ShardManifest | None:
    """Returns the index of a shard (by the name of its tar), or None if it is missing or invalid."""
    try:
        manifest = parse_record(ShardManifest, storage.read_bytes(storage.join(dataset, index_name(shard))))
        manifest.clips()
    except (FileNotFoundError, ValueError):
        return None
    return manifest if manifest.schema_version == SCHEMA_VERSION and manifest.shard == shard else None


def existing_shards(dataset: str) -> dict[int, list[str]]:
    """Returns the names of the tars in a folder that have an index, by shard number."""
    names = set(storage.list_dir(dataset))
    existing: dict[int, list[str]] = {}
    for name in sorted(names):
        number = shard_number(name)
        if number is not None and index_name(name) in names:
            existing.setdefault(number, []).append(name)
    return existing


def stored_outcomes(dataset: str, manifest: ShardManifest) -> Iterator[list[PackedSample] | Failure]:
    """Yields the outcome of each row of a shard, in order, with samples as the bytes of their members.

    Raises:
        UserError: the tar does not match its index.
    """
    failures = {failure.row: failure for failure in manifest.failures}
    clips = manifest.clips()
    with storage.local_copy(storage.join(dataset, manifest.shard)) as path:
        # Copied bytes get a new checksum, so this is the last check against the old one.
        if storage.sha256_file(path) != manifest.sha256:
            raise UserError(f"{manifest.shard} of {dataset} is damaged; delete it and prepare the data again")
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
                    samples.append(PackedSample(entry.key, members))
                yield samples
