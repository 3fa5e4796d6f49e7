"""Checks a data set at rest, every byte of it, and names each problem in one line; nothing is unpickled."""

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
    FORGOTTEN,
    MANIFEST,
    RECIPE,
    DatasetManifest,
    Forgotten,
    ShardManifest,
    ShardSummary,
    clip_key_of,
    forgotten_sha256,
    index_name,
    mark,
    read_forgotten,
    read_manifest,
    shard_number,
)

Progress = Callable[[dict[str, Any]], None]


@dataclass
class _Seen:
    """What is remembered from shard to shard."""

    forgotten: Forgotten
    clips: set[int] = field(default_factory=set)  # 64 bits of hash for each
    parts: list[ShardSummary] = field(default_factory=list)


def problems(dataset: str, progress: Progress | None = None, workers: int = 1) -> Iterator[str]:
    """Every problem of a data set, as a line that names the file; none where it is whole. Reads all of it, once.

    The lines are the same, in the same order, whatever the number of workers. Memory: two shards' indexes and a
    sample for each of them, and some 100 bytes a clip.

    Args:
        progress: called after each shard with `stage`, `done`, `total` (rows), `mb_per_s` and `eta_seconds`.
        workers: threads that read shards; hashing and decoding let each other run.
    Raises:
        UserError: fewer than one worker.
    """
    if workers < 1:
        raise UserError(f"workers {workers}, expected at least 1")
    dataset = storage.absolute(dataset)
    names = set(storage.list_dir(dataset))
    if not names:
        yield f"{dataset}: nothing is here"
        return
    manifest: DatasetManifest | None = None
    forgotten = Forgotten()
    try:
        forgotten = read_forgotten(dataset)
        manifest = read_manifest(dataset)[0] if MANIFEST in names else None
    except UserError as error:
        yield str(error)
    if manifest is not None and manifest.forgotten_sha256 != forgotten_sha256(forgotten):
        yield f"{MANIFEST}: is not of this {FORGOTTEN}; a removal of clips was cut off, repeat that command"
    recipe_hash = yield from _recipe_problems(dataset, manifest)

    tars = {name for name in names if shard_number(name) is not None}
    shards = [shard.shard for shard in manifest.shards] if manifest else sorted(tars)
    seen = _Seen(forgotten)
    began, size_bytes = time.monotonic(), 0
    for place, found in enumerate(check_shards(dataset, shards, workers)):
        yield from found.index_problems
        index = found.index
        if index is None:
            continue
        if manifest is not None:
            yield from _disagreement(index, place, manifest)
        yield from _index_problems(index, recipe_hash, seen)
        yield from found.tar_problems
        seen.parts.append(index.summary())
        if progress is not None:
            size_bytes += index.size_bytes
            seconds, total = time.monotonic() - began, manifest.rows if manifest else index.stop
            left = seconds * (total - index.stop) / max(index.stop, 1)
            news = {"stage": "verify", "done": index.stop, "total": total}
            progress(news | {"mb_per_s": size_bytes / 1e6 / max(seconds, 1e-9), "eta_seconds": left})

    if manifest is not None:
        yield from _book_problems(manifest, seen.parts)
    elif MANIFEST not in names:
        yield _how_far(seen.parts)
    expected = {MANIFEST, RECIPE, FORGOTTEN, *shards, *map(index_name, shards)}
    yield from (f"{name}: belongs to no data set" for name in sorted(names - expected))


def _recipe_problems(dataset: str, manifest: DatasetManifest | None) -> Generator[str, None, str | None]:
    """Problems of what the data set says it is made with; returns the recipe's hash where that can be known."""
    try:
        recipe = storage.read_json(storage.join(dataset, RECIPE))
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
        yield f"{MANIFEST}: recipe_hash is {manifest.recipe_hash}, its recipe hashes to {digest(manifest.recipe)}"
    return manifest.recipe_hash


def _disagreement(index: ShardManifest, place: int, manifest: DatasetManifest) -> Iterator[str]:
    """Where a shard's index and the data set's manifest tell different stories."""
    said = manifest.shards[place]
    pairs = {
        "rows": ((index.start, index.stop), said.rows),
        "samples": (len(index.samples), said.samples),
        "size_bytes": (index.size_bytes, said.size_bytes),
        "sha256": (index.sha256, said.sha256),
    }
    for what, (here, there) in pairs.items():
        if here != there:
            yield f"{index_name(said.shard)}: {what} {here}, {MANIFEST} says {there}"
    start = manifest.shards[place - 1].rows[1] if place else 0
    if said.rows[0] != start:
        yield f"{MANIFEST}: {said.shard} begins at row {said.rows[0]}, expected {start}"


def _index_problems(index: ShardManifest, recipe_hash: str | None, seen: _Seen) -> Iterator[str]:
    name = index_name(index.shard)
    if recipe_hash is not None and index.recipe_hash != recipe_hash:
        yield f"{name}: is of the recipe {index.recipe_hash}, the data set of {recipe_hash}"
    try:
        index.clips()
    except ValueError as error:
        yield f"{name}: the books do not close, {error}"
    for clip, entries in itertools.groupby(index.samples, lambda entry: clip_key_of(entry.key)):
        keys = [entry.key for entry in entries]
        short = int(mark(clip)[:16], 16)
        if short in seen.clips or len(set(keys)) < len(keys):
            yield f"{name}: clip {clip} is there a second time"
        seen.clips.add(short)
    rows = [Failure(clip_key_of(entry.key), index.start, "") for entry in index.samples]
    if any(seen.forgotten.failure(row) for row in (*rows, *index.failures)):
        yield f"{name}: names a clip that was asked to be forgotten; repeat the command that forgets"


def _book_problems(manifest: DatasetManifest, parts: list[ShardSummary]) -> Iterator[str]:
    sums = {
        "rows": sum(part.stop - part.start for part in parts),
        "encoded": sum(part.encoded for part in parts),
        "samples": sum(part.samples for part in parts),
        "failed": add_counts(part.failed for part in parts),
    }
    for what, total in sums.items():
        if getattr(manifest, what) != total:
            yield f"{MANIFEST}: {what} {getattr(manifest, what)}, its shards come to {total}"
    if manifest.rows != manifest.encoded + sum(manifest.failed.values()):
        yield f"{MANIFEST}: {manifest.rows} rows are not {manifest.encoded} encoded and {manifest.failed} failed"


def _how_far(parts: list[ShardSummary]) -> str:
    spans: list[list[int]] = []
    for start, stop in sorted((part.start, part.stop) for part in parts):
        if spans and start <= spans[-1][1]:
            spans[-1][1] = max(stop, spans[-1][1])
        else:
            spans.append([start, stop])
    rows = ", ".join(f"{start} to {stop - 1}" for start, stop in spans) or "none"
    encoded = sum(part.encoded for part in parts)
    return (
        f"unfinished: {MANIFEST} is missing; {len(parts)} shards hold rows {rows} ({encoded} encoded);"
        " the same prepare command continues"
    )
