"""Verifies every byte of a stored data set and reports each problem in one line; nothing is unpickled."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

from infra import storage
from tasks.curate.shard import check_shards
from tasks.records import Failure, UserError, add_counts, digest
from tasks.shards import (
    MANIFEST,
    RECIPE,
    TAKEDOWNS_FILE,
    DatasetManifest,
    ShardManifest,
    ShardSummary,
    Takedowns,
    clip_key_of,
    index_name,
    mark,
    named,
    read_indexes,
    read_manifest,
    read_takedowns,
    root_of,
    row_key_of,
    shard_label,
    shards_folder,
    takedowns_sha256,
    version_of,
)
from tasks.shards.places import VERSIONS
from tasks.shards.reading import shard_arrays
from tasks.shards.sample_index import index_file, is_index_file, written_index

Progress = Callable[[dict[str, Any]], None]


@dataclass
class _Seen:
    """State kept from shard to shard."""

    takedowns: Takedowns
    clips: set[int] = field(default_factory=set)  # 64 bits of hash for each
    parts: list[ShardSummary] = field(default_factory=list)
    has_bad_index: bool = False


def problems(dataset: str, progress: Progress | None = None, workers: int = 1) -> Iterator[str]:
    """Yields every problem of a data set as a line that names the file; reads all of it once.

    The lines and their order do not depend on the number of workers. Memory: two shard indexes and one sample per
    worker, and about 100 bytes per clip.

    Args:
        dataset: address of the data set's folder.
        progress: called after each shard with `stage`, `done`, `total` (rows), `mb_per_s` and `eta_seconds`.
        workers: threads that read shards; hashing and decoding release the GIL.
    Raises:
        UserError: fewer than one worker.
    """
    if workers < 1:
        raise UserError(f"workers {workers}, expected at least 1")
    dataset = storage.absolute(dataset)
    names = set(storage.list_dir(dataset))
    if not names:
        yield f"{dataset}: is missing or empty"
        return
    manifest: DatasetManifest | None = None
    takedowns = Takedowns()
    try:
        takedowns = read_takedowns(dataset)
        manifest = read_manifest(dataset)[0] if MANIFEST in names else None
    except UserError as error:
        yield str(error)
    if manifest is not None and manifest.forgotten_sha256 != takedowns_sha256(takedowns):
        yield f"{MANIFEST}: does not match {TAKEDOWNS_FILE}; a removal is not complete, repeat the command forget"
    recipe_hash = yield from _recipe_problems(dataset, manifest)

    pool = shards_folder(dataset, manifest) if manifest else dataset
    tars = {name for name in names if shard_label(name) is not None}
    shards = [shard.shard for shard in manifest.shards] if manifest else sorted(tars)
    seen = _Seen(takedowns)
    began, size_bytes, done = time.monotonic(), 0, 0
    for number, checked in enumerate(check_shards(pool, shards, workers)):
        yield from checked.index_problems
        index = checked.index
        seen.has_bad_index |= bool(checked.index_problems)
        if index is None:
            continue
        if manifest is not None:
            yield from _disagreement(index, number, manifest)
        yield from _index_problems(index, recipe_hash, seen)
        yield from checked.tar_problems
        seen.parts.append(index.summary())
        if progress is not None:
            size_bytes, done = size_bytes + index.size_bytes, done + index.stop - index.start
            seconds, total = time.monotonic() - began, manifest.rows if manifest else done
            eta_seconds = seconds * (total - done) / max(done, 1)
            counts = {"stage": "verify", "done": done, "total": total}
            progress(counts | {"mb_per_s": size_bytes / 1e6 / max(seconds, 1e-9), "eta_seconds": eta_seconds})

    if manifest is not None:
        yield from _count_problems(manifest, seen.parts)
        yield from _array_problems(dataset, manifest, compare=not seen.has_bad_index)
    elif MANIFEST not in names:
        yield _unfinished(seen.parts)
    expected = {MANIFEST, RECIPE, TAKEDOWNS_FILE, *shards, *map(index_name, shards)}
    if manifest is None:
        expected |= {name for name in names if is_index_file(name)}
    elif manifest.index_sha256 is not None:
        expected.add(index_file(manifest.index_sha256))
    expected |= {VERSIONS} if root_of(dataset) is not None else set()
    yield from (f"{name}: is not part of the data set" for name in sorted(names - expected))


def _array_problems(dataset: str, manifest: DatasetManifest, compare: bool) -> Iterator[str]:
    """Yields damage of a data set's index file and, if asked to compare, differences from its shards' indexes."""
    if manifest.index_sha256 is None:
        return
    name = index_file(manifest.index_sha256)
    try:
        _, sha256 = read_manifest(dataset)
        found = storage.sha256_file(storage.cached_file(storage.join(version_of(dataset, sha256), name)))
        if found != manifest.index_sha256:
            yield f"{name}: damaged, sha256 {found}, expected {manifest.index_sha256}"
        if not compare:
            return
        with written_index(shard_arrays(dataset, index) for index in read_indexes(dataset, manifest)) as (_, expected):
            if expected != manifest.index_sha256:
                yield f"{name}: is not the index of these shards, whose index has the sha256 {expected}"
    except FileNotFoundError:
        yield f"{name}: is missing"
    except UserError as error:
        yield f"{name}: cannot be compared ({error})"


def _recipe_problems(dataset: str, manifest: DatasetManifest | None) -> Generator[str, None, str | None]:
    """Yields problems of the recipe; returns its hash, or None if it is unknown."""
    try:
        recipe = storage.read_json(storage.join(named(dataset), RECIPE))
    except FileNotFoundError:
        yield f"{RECIPE}: is missing"
        recipe = None
    except ValueError as error:
        yield f"{RECIPE}: is not JSON ({error})"
        recipe = None
    if manifest is None:
        return digest(recipe) if recipe is not None else None
    if recipe is not None and recipe != manifest.recipe:
        yield f"{RECIPE}: is not the recipe of {MANIFEST}"
    if digest(manifest.recipe) != manifest.recipe_hash:
        yield f"{MANIFEST}: recipe_hash is {manifest.recipe_hash}, the hash of its recipe is {digest(manifest.recipe)}"
    yield from _source_problems(manifest)
    return manifest.recipe_hash


def _source_problems(manifest: DatasetManifest) -> Iterator[str]:
    """Yields differences of the manifest's source from its recipe and its rows."""
    source, known = manifest.source, ("columns", "limit", "table_sha256")
    for name in sorted({*source, *known}):
        if name not in source:
            if "table_sha256" in manifest.recipe:  # made by prepare
                yield f"{MANIFEST}: its source has no {name}"
        elif name not in known:
            yield f"{MANIFEST}: its source has {name!r}, which is not part of it"
        elif name != "limit" and source[name] != manifest.recipe.get(name):
            yield f"{MANIFEST}: its source has the {name} {source[name]!r}, its recipe {manifest.recipe.get(name)!r}"
    limit = source.get("limit")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or manifest.rows > limit):
        yield f"{MANIFEST}: its source has the limit {limit!r}, with {manifest.rows} rows"


def _disagreement(index: ShardManifest, number: int, manifest: DatasetManifest) -> Iterator[str]:
    """Yields differences between a shard's index and its entry in the data set's manifest."""
    entry = manifest.shards[number]
    # Prepare numbers the rows of each shard from 0, so that a shard does not depend on its place.
    begin = index.start or entry.rows[0]
    pairs = {
        "rows": ((begin, begin + index.stop - index.start), entry.rows),
        "samples": (len(index.samples), entry.samples),
        "size_bytes": (index.size_bytes, entry.size_bytes),
        "sha256": (index.sha256, entry.sha256),
    }
    for what, (here, there) in pairs.items():
        if here != there:
            yield f"{index_name(entry.shard)}: {what} {here}, {MANIFEST} has {there}"
    start = manifest.shards[number - 1].rows[1] if number else 0
    if entry.rows[0] != start:
        yield f"{MANIFEST}: {entry.shard} begins at row {entry.rows[0]}, expected {start}"


def _index_problems(index: ShardManifest, recipe_hash: str | None, seen: _Seen) -> Iterator[str]:
    name = index_name(index.shard)
    if recipe_hash is not None and index.recipe_hash != recipe_hash:
        yield f"{name}: has the recipe {index.recipe_hash}, the data set has {recipe_hash}"
    try:
        index.clips()
    except ValueError as error:
        yield f"{name}: the counts do not add up, {error}"
    for clip, entries in itertools.groupby(index.samples, lambda entry: clip_key_of(entry.key)):
        keys = [entry.key for entry in entries]
        short = int(mark(clip)[:16], 16)
        if short in seen.clips or len(set(keys)) < len(keys):
            yield f"{name}: clip {clip} occurs a second time"
        seen.clips.add(short)
    rows = [Failure(row_key_of(entry.key), index.start, "") for entry in index.samples]
    if any(seen.takedowns.failure(row) for row in (*rows, *index.failures)):
        yield f"{name}: contains a clip that is taken down; repeat the command forget"


def _count_problems(manifest: DatasetManifest, parts: list[ShardSummary]) -> Iterator[str]:
    sums = {
        "rows": sum(part.stop - part.start for part in parts),
        "encoded": sum(part.encoded for part in parts),
        "samples": sum(part.samples for part in parts),
        "failed": add_counts(part.failed for part in parts),
    }
    for what, total in sums.items():
        if getattr(manifest, what) != total:
            yield f"{MANIFEST}: {what} {getattr(manifest, what)}, its shards add up to {total}"
    if manifest.rows != manifest.encoded + sum(manifest.failed.values()):
        yield f"{MANIFEST}: {manifest.rows} rows are not {manifest.encoded} encoded and {manifest.failed} failed"


def _unfinished(parts: list[ShardSummary]) -> str:
    spans: list[list[int]] = []
    for start, stop in sorted((part.start, part.stop) for part in parts):
        if spans and start <= spans[-1][1]:
            spans[-1][1] = max(stop, spans[-1][1])
        else:
            spans.append([start, stop])
    rows = ", ".join(f"{start} to {stop - 1}" for start, stop in spans) or "none"
    encoded = sum(part.encoded for part in parts)
    return (
        f"unfinished: {MANIFEST} is missing; {len(parts)} shards contain rows {rows} ({encoded} encoded);"
        " the same prepare command continues"
    )
