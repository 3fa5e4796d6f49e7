"""Reads what a data set says of itself, and whole shards row by row. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

from infra import storage
from tasks.records import Failure, UserError
from tasks.shards.layout import (
    MANIFEST,
    SCHEMA_VERSION,
    DatasetManifest,
    PackedSample,
    ShardManifest,
    index_name,
    parse_record,
    shard_number,
)


def read_manifest(dataset: str) -> tuple[DatasetManifest, str]:
    """The manifest of a finished data set and its sha256.

    Raises:
        UserError: no manifest at the address, one that is damaged, or one of another schema.
    """
    address = storage.join(dataset, MANIFEST)
    try:
        content = storage.read_bytes(address)
        found = json.loads(content).get("schema_version")
    except FileNotFoundError as error:
        raise UserError(f"no finished data set at {dataset}: {MANIFEST} is missing; run the prepare stage") from error
    except (ValueError, AttributeError) as error:
        raise UserError(f"{address} is not JSON; delete the file and run the prepare stage again") from error
    if found != SCHEMA_VERSION:
        raise UserError(f"{address} has schema {found!r}, expected {SCHEMA_VERSION}; prepare the data set anew")
    try:
        return parse_record(DatasetManifest, content), hashlib.sha256(content).hexdigest()
    except ValueError as error:
        raise UserError(f"{address} is damaged ({error}); delete the file and run the prepare stage again") from error


def read_shard_manifest(dataset: str, shard: str) -> ShardManifest | None:
    """The index of a shard (by the name of its tar), or None when there is none that can be trusted."""
    try:
        manifest = parse_record(ShardManifest, storage.read_bytes(storage.join(dataset, index_name(shard))))
        manifest.clips()
    except (FileNotFoundError, ValueError):
        return None
    return manifest if manifest.schema_version == SCHEMA_VERSION and manifest.shard == shard else None


def shards_held(dataset: str) -> dict[int, list[str]]:
    """Names of the tars that lie in a folder with their index, by number of the shard."""
    names = set(storage.list_dir(dataset))
    held: dict[int, list[str]] = {}
    for name in sorted(names):
        number = shard_number(name)
        if number is not None and index_name(name) in names:
            held.setdefault(number, []).append(name)
    return held


def stored_outcomes(dataset: str, manifest: ShardManifest) -> Iterator[list[PackedSample] | Failure]:
    """What each row of a shard came to, in order, samples as the bytes of their members.

    Raises:
        UserError: the tar is not the one that the index is of.
    """
    failures = {failure.row: failure for failure in manifest.failures}
    clips = manifest.clips()
    with storage.local_copy(storage.join(dataset, manifest.shard)) as path:
        # Bytes that are taken over get a new checksum, so the old one is looked at for the last time.
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
