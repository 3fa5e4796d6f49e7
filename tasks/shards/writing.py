"""Writes a data set: shards one by one, each atomically, and the manifest that completes it."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra import storage
from tasks.records import Failure, UserError, add_counts
from tasks.shards.fields import SUFFIXES
from tasks.shards.layout import (
    FRAME_SIZES_VERSION,
    MANIFEST,
    RECIPE,
    SCHEMA_VERSION,
    DatasetManifest,
    Entry,
    PackedSample,
    PublishedShard,
    Sample,
    ShardManifest,
    ShardSummary,
    index_name,
    shard_label,
)
from tasks.shards.places import named, root_of, version_of
from tasks.shards.reading import read_indexes, read_manifest, read_parts, shard_arrays
from tasks.shards.sample_index import SampleIndex, index_file, is_index_file, open_index, written_index
from tasks.shards.takedowns import read_takedowns, takedowns_sha256

# The result of a row: the samples of its clip (new, or copied from another shard), or its failure.
Outcome = Sequence[Sample | PackedSample] | Failure


def write_shard(
    pool: str,
    label: int | str,
    rows: tuple[int, int],
    outcomes: Iterable[Outcome],
    recipe_hash: str,
    made_with: dict[str, str] | None = None,
    row_ids: Sequence[str] = (),
) -> ShardManifest:
    """Writes one shard, named after its content: the tar in one atomic put, then its index.

    Args:
        pool: address of the folder for shards.
        label: the first part of its name: a number, or the digest of its rows (`rows_label`).
        rows: the numbers of its rows, start (inclusive) to stop.
        outcomes: one per row, in order, failures with the row's number; consumed lazily.
        recipe_hash: of the settings that the samples depend on.
        made_with: versions and devices that made it, for the record.
        row_ids: the identity of each row (`tasks.shards.identity`), if known.
    Raises:
        OSError: the address cannot be written.
    """
    entries: list[Entry] = []
    frame_sizes: list[tuple[int, int]] = []
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
                    with _spool_errors():
                        entries.append(Entry(packed.key, _add_members(tar, packed)))
                    if packed.frame_size is not None:
                        frame_sizes.append((packed.frame_size.width, packed.frame_size.height))
        assert len(frame_sizes) in (0, len(entries)), f"{label}: {len(frame_sizes)} frame sizes of {len(entries)}"
        assert encoded + len(failures) == rows[1] - rows[0], f"{label}: {encoded} + {len(failures)} of rows {rows}"
        with _spool_errors():
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
            row_ids=list(row_ids),
            frame_sizes=frame_sizes,
            schema_version=FRAME_SIZES_VERSION if frame_sizes else SCHEMA_VERSION,
        ).named(label)
        storage.upload_file(path, storage.join(pool, manifest.shard))
    storage.write_json(storage.join(pool, index_name(manifest.shard)), manifest.content())
    return manifest


@contextmanager
def _spool_errors() -> Iterator[None]:
    """Converts the OSError of a full temporary folder, which is not the output."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the temporary folder {tempfile.gettempdir()} cannot be written ({error.strerror or error});"
            " free some space there, or set TMPDIR to another folder"
        ) from error


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
    """Writes a data set's index and manifest, the mark of completion, and returns the manifest's sha256.

    The manifest accounts for every row; rows are numbered through all shards in order. Below a root a new version is
    written first, then `manifest.json` of the name, which makes it the newest; a data set with the same shards as the
    newest version stays as it is. In a private data set the shards that the manifest does not name are deleted:
    replaced shards and remains of killed writers.

    Raises:
        UserError: a shard has another recipe, or the index of a shard is missing or damaged.
    """
    other = next((shard for shard in shards if shard.recipe_hash != recipe_hash), None)
    if other is not None:
        raise UserError(f"{other.shard} has the recipe {other.recipe_hash}, the data set has {recipe_hash}")
    failed = add_counts(shard.failed for shard in shards)
    encoded = sum(shard.encoded for shard in shards)
    ends = list(itertools.accumulate((shard.stop - shard.start for shard in shards), initial=0))
    assert ends[-1] == encoded + sum(failed.values()), f"{ends[-1]} rows, {encoded} encoded, failed {failed}"
    manifest = DatasetManifest(
        recipe=recipe,
        recipe_hash=recipe_hash,
        source=source,
        rows=ends[-1],
        encoded=encoded,
        samples=sum(shard.samples for shard in shards),
        failed=failed,
        shards=[
            PublishedShard(shard.shard, rows, shard.samples, shard.size_bytes, shard.sha256)
            for shard, rows in zip(shards, itertools.pairwise(ends), strict=True)
        ],
        forgotten_sha256=takedowns_sha256(read_takedowns(dataset)),
        schema_version=FRAME_SIZES_VERSION if "frame_sizes" in recipe else SCHEMA_VERSION,
    )
    newest = _newest(dataset)
    if newest is not None and dataclasses.replace(newest[0], index_sha256=None) == manifest:
        sha256 = newest[1]
    else:
        with written_index(_parts(dataset, manifest, newest)) as (index, index_sha256):
            manifest = dataclasses.replace(manifest, index_sha256=index_sha256)
            content = storage.json_bytes(dataclasses.asdict(manifest))
            sha256 = hashlib.sha256(content).hexdigest()
            version = version_of(dataset, sha256)
            storage.upload_file(index, storage.join(version, index_file(index_sha256)))
        if version != dataset:
            storage.write_bytes(storage.join(version, MANIFEST), content)
        storage.write_bytes(storage.join(dataset, MANIFEST), content)
        newest = manifest, sha256
    if root_of(dataset) is None:
        _sweep(dataset, newest[0])
    return sha256


def _newest(dataset: str) -> tuple[DatasetManifest, str] | None:
    """Returns the finished data set at this address as far as its index can be used again."""
    try:
        manifest, sha256 = read_manifest(dataset)
        return None if open_index(dataset, manifest, sha256) is None else (manifest, sha256)
    except UserError:
        return None


def _parts(
    dataset: str, manifest: DatasetManifest, newest: tuple[DatasetManifest, str] | None
) -> Iterator[SampleIndex]:
    """Yields the index of each shard: of shards that the newest version has from there, else from their own file."""
    known = read_parts(dataset, *newest) if newest is not None else {}
    before = {shard.shard: shard.sha256 for shard in newest[0].shards} if newest is not None else {}
    for shard in manifest.shards:
        if before.get(shard.shard) == shard.sha256:
            yield known[shard.shard]
        else:
            for index in read_indexes(dataset, dataclasses.replace(manifest, shards=[shard])):
                yield shard_arrays(dataset, index)


def report_addresses(dataset: str) -> dict[str, str]:
    """Returns the addresses of a data set's report, by kind; next to the data set, as its times differ between runs."""
    return {kind: f"{named(dataset).rstrip('/')}.report.{kind}" for kind in ("json", "html")}


def _sweep(dataset: str, manifest: DatasetManifest) -> None:
    """Deletes shards and indexes that a private data set does not name.

    The index of a shard goes before its tar: an index implies that its tar exists.
    """
    shards = {shard.shard for shard in manifest.shards}
    for name in storage.list_dir(dataset):
        if shard_label(name) is not None and name not in shards:
            storage.delete(storage.join(dataset, index_name(name)))
            storage.delete(storage.join(dataset, name))
        elif is_index_file(name) and name != index_file(manifest.index_sha256 or ""):
            storage.delete(storage.join(dataset, name))
    storage.drop_unfinished(dataset)
