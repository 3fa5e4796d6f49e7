"""Writes a data set: shards one by one, each atomically, and the manifest that completes it."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from infra import storage
from tasks.records import Failure, UserError, add_counts
from tasks.shards.fields import SUFFIXES
from tasks.shards.layout import (
    MANIFEST,
    RECIPE,
    DatasetManifest,
    Entry,
    PackedSample,
    PublishedShard,
    Sample,
    ShardManifest,
    ShardSummary,
    index_name,
    shard_number,
)
from tasks.shards.takedowns import read_takedowns, takedowns_sha256

# The result of a row: the samples of its clip (new, or copied from another shard), or its failure.
Outcome = Sequence[Sample | PackedSample] | Failure


def write_shard(
    dataset: str,
    index: int,
    rows: tuple[int, int],
    outcomes: Iterable[Outcome],
    recipe_hash: str,
    made_with: dict[str, str] | None = None,
) -> ShardManifest:
    """Writes one shard, named after its content: the tar in one atomic put, then its index.

    Args:
        dataset: address of the data set's folder.
        index: number of the shard.
        rows: its range of rows of the source, start (inclusive) to stop.
        outcomes: one per row, in order; consumed lazily.
        recipe_hash: of the settings that the samples depend on.
        made_with: versions and devices that made it, for the record.
    Raises:
        OSError: the address cannot be written.
    """
    entries: list[Entry] = []
    failures: list[Failure] = []
    encoded = 0
    with tempfile.TemporaryFile() as spool:  # unnamed, so that a killed worker leaves no file
        with tarfile.open(fileobj=spool, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for outcome in outcomes:
                if isinstance(outcome, Failure):
                    failures.append(outcome)
                    continue
                assert outcome, "a row without samples needs a failure"
                encoded += 1
                for sample in outcome:
                    packed = sample.pack() if isinstance(sample, Sample) else sample
                    entries.append(Entry(packed.key, _add_members(tar, packed)))
        assert encoded + len(failures) == rows[1] - rows[0], f"{index}: {encoded} + {len(failures)} of rows {rows}"
        spool.flush()
        path = Path(f"/proc/self/fd/{spool.fileno()}")
        manifest = ShardManifest(
            shard="",
            start=rows[0],
            stop=rows[1],
            recipe_hash=recipe_hash,
            encoded=encoded,
            samples=entries,
            failures=failures,
            sha256=storage.sha256_file(path),
            size_bytes=path.stat().st_size,
            made_with=made_with or {},
        ).named(index)
        storage.upload_file(path, storage.join(dataset, manifest.shard))
    storage.write_json(storage.join(dataset, index_name(manifest.shard)), dataclasses.asdict(manifest))
    return manifest


def _add_members(tar: tarfile.TarFile, packed: PackedSample) -> dict[str, tuple[int, int]]:
    """Appends a sample's members and returns the place of their data: {field: (offset, size)} in bytes."""
    members: dict[str, tuple[int, int]] = {}
    for name, data in packed.members.items():
        info = tarfile.TarInfo(f"{packed.key}.{SUFFIXES[name]}")
        info.size, info.mode = len(data), 0o644
        tar.addfile(info, io.BytesIO(data))
        blocks = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        members[name] = (tar.offset - blocks, len(data))
    return members


def open_dataset(dataset: str, recipe: dict[str, Any]) -> None:
    """Writes the recipe into a folder before the first shard; this also checks that the folder can be written.

    Raises:
        UserError: the folder contains samples of another recipe; the message names the differences.
    """
    address = storage.join(dataset, RECIPE)
    try:
        existing = storage.read_json(address)
    except FileNotFoundError:
        storage.write_json(address, recipe)
        return
    except ValueError:
        existing = {}
    if existing != json.loads(json.dumps(recipe)):
        names = sorted(name for name in {*existing, *recipe} if existing.get(name) != recipe.get(name))
        changes = ", ".join(f"{name} {existing.get(name)!r} -> {recipe.get(name)!r}" for name in names)
        raise UserError(
            f"{dataset} contains a data set of another recipe ({changes});"
            " choose another output, or delete that folder to prepare it again"
        )


def publish_dataset(
    dataset: str, recipe: dict[str, Any], recipe_hash: str, source: dict[str, Any], shards: Sequence[ShardSummary]
) -> str:
    """Writes the data set's manifest, the mark of completion, and returns its sha256. It accounts for every row.

    Afterwards shards that the manifest does not name are deleted: replaced shards and remains of killed writers.
    """
    position = 0
    for shard in shards:
        assert shard.start == position and shard.recipe_hash == recipe_hash, f"{shard.shard} does not follow"
        position = shard.stop
    failed = add_counts(shard.failed for shard in shards)
    encoded = sum(shard.encoded for shard in shards)
    assert position == encoded + sum(failed.values()), f"{position} rows, {encoded} encoded, failed {failed}"
    manifest = DatasetManifest(
        recipe=recipe,
        recipe_hash=recipe_hash,
        source=source,
        rows=position,
        encoded=encoded,
        samples=sum(shard.samples for shard in shards),
        failed=failed,
        shards=[PublishedShard(s.shard, (s.start, s.stop), s.samples, s.size_bytes, s.sha256) for s in shards],
        forgotten_sha256=takedowns_sha256(read_takedowns(dataset)),
    )
    content = storage.json_bytes(dataclasses.asdict(manifest))
    storage.write_bytes(storage.join(dataset, MANIFEST), content)
    _sweep(dataset, {name for shard in shards for name in (shard.shard, index_name(shard.shard))})
    return hashlib.sha256(content).hexdigest()


def report_addresses(dataset: str) -> dict[str, str]:
    """Returns the addresses of a data set's report, by kind; next to the data set, as its times differ between runs."""
    return {kind: f"{dataset.rstrip('/')}.report.{kind}" for kind in ("json", "html")}


def _sweep(dataset: str, named: set[str]) -> None:
    """Deletes shards that are not `named`, each index before its tar: an index implies that its tar exists."""
    names = storage.list_dir(dataset)
    for tar in [name for name in names if shard_number(name) is not None and name not in named]:
        storage.delete(storage.join(dataset, index_name(tar)))
        storage.delete(storage.join(dataset, tar))
    storage.drop_unfinished(dataset)
