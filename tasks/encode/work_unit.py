"""One work unit of prepare: a range of the table's rows, downloaded, decoded, encoded and written as one shard."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass

from tasks import shards
from tasks.encode.encoder import ClipEncoder, decode_ahead
from tasks.encode.spec import PrepareSpec
from tasks.ingest.download import Fetched, download_clips
from tasks.ingest.sources import read_rows, resolve_url
from tasks.ingest.spec import SourceSpec
from tasks.records import ClipRef, Failure, UserError
from tasks.shards import Outcome, ShardSummary, Takedowns
from tasks.video.decode_pool import DecoderPool


@dataclass(frozen=True)
class Unit:
    """One work unit: rows start (inclusive) to stop of the table, which become shard `index`.

    If there is a shard `existing`, it is rebuilt: the rows in `redo` are processed again, all others are copied.
    """

    index: int
    start: int
    stop: int
    rows: tuple[ClipRef | Failure, ...]
    existing: str | None = None  # name of its tar
    redo: frozenset[int] = frozenset()


def plan(spec: PrepareSpec, total: int, takedowns: Takedowns) -> Iterator[Unit]:
    """Yields the work units in order while it reads the table; unit i always has the same rows and the same shard."""
    rows: list[ClipRef | Failure] = []
    start = 0
    for row, address in addressed_rows(spec.source):
        rows.append(takedowns.failure(row, address) or row)
        if len(rows) == spec.clips_per_shard or start + len(rows) == total:
            yield Unit(start // spec.clips_per_shard, start, start + len(rows), tuple(rows))
            start += len(rows)
            rows = []


def addressed_rows(source: SourceSpec) -> Iterator[tuple[ClipRef | Failure, str | None]]:
    """Yields the rows of a source, each with the resolved address of its link, or None without a valid one."""
    for row in read_rows(source):
        try:
            yield row, resolve_url(source, row.url) if isinstance(row, ClipRef) else None
        except ValueError:  # not a URL; the download reports it
            yield row, None


def encode_unit(
    encoder: ClipEncoder,
    decoders: DecoderPool,
    spec: PrepareSpec,
    output: str,
    recipe_hash: str,
    takedowns: Takedowns,
    unit: Unit,
) -> ShardSummary:
    """Downloads, decodes, encodes and writes the rows of one unit; frames never leave this machine.

    A file in `takedowns` is not decoded, whichever row links to it.
    """
    made_with = {name: importlib.metadata.version(name) for name in ("av", "numpy", "torch", "diffusers")}
    kept: Iterator[Outcome] = iter(())
    if unit.existing is not None:
        existing = shards.read_shard_manifest(output, unit.existing)
        if existing is None:
            raise UserError(f"the index of {unit.existing} in {output} was deleted; is another command writing there?")
        kept = shards.stored_outcomes(output, existing)
        made_with = {name: _both(existing.made_with.get(name, now), now) for name, now in made_with.items()}
    redone = by_file([row for row in unit.rows if unit.existing is None or row.row in unit.redo])
    fetched = download_clips([row for row in redone if isinstance(row, ClipRef)], spec.source, spec.download)

    def files() -> Iterator[tuple[ClipRef, Fetched] | Failure]:
        for row in redone:
            if isinstance(row, Failure):
                yield row
                continue
            ref, result = next(fetched)
            assert ref == row
            if isinstance(result, Failure):
                yield result
            else:
                yield takedowns.failure(ref, file_sha256=result.sha256) or (ref, result)

    made = zip(redone, encoder.encode(decode_ahead(files(), decoders, encoder.screen)), strict=True)
    ready: dict[int, Outcome] = {}  # of rows that were made with an earlier row of their file

    def outcome_of(row: int) -> Outcome:
        while row not in ready:
            record, outcome = next(made)
            ready[record.row] = outcome
        return ready.pop(row)

    def outcomes() -> Iterator[Outcome]:
        for row in unit.rows:
            before = next(kept, None)
            yield before if before is not None and row.row not in unit.redo else outcome_of(row.row)

    rows = (unit.start, unit.stop)
    return shards.write_shard(output, unit.index, rows, outcomes(), recipe_hash, made_with).summary()


def by_file(rows: list[ClipRef | Failure]) -> list[ClipRef | Failure]:
    """Returns rows with those of one link next to each other, at the place of the first: it is downloaded once."""
    groups: dict[object, list[ClipRef | Failure]] = {}
    for row in rows:
        groups.setdefault(row.row if isinstance(row, Failure) else row.url, []).append(row)
    return [row for group in groups.values() for row in group]


def _both(before: str, now: str) -> str:
    """Returns the library versions that the samples of one shard were made with."""
    return before if now in before.split(", ") else f"{before}, {now}"
