"""One work unit of prepare: rows of the source, downloaded, decoded, encoded and written as one shard."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tasks import shards
from tasks.encode.encoder import ClipEncoder, decode_ahead
from tasks.encode.spec import PrepareSpec
from tasks.ingest.download import Fetched, download_clips
from tasks.records import ClipRef, Failure, UserError
from tasks.shards import Outcome, ShardSummary, Takedowns
from tasks.video.decode_pool import DecoderPool


@dataclass(frozen=True)
class Unit:
    """Rows that become one shard, numbered from 0 in it.

    If there is a shard `existing`, the rows are taken from it: row i of the unit is row `origins[i]` of that shard. The
    rows in `redo` are processed again, those in `recaption` get the caption of their row, all others are copied.
    """

    index: int  # its place in the data set
    row_ids: tuple[str, ...]
    rows: tuple[ClipRef | Failure, ...]
    start: int  # number of its first row in the source, for messages
    stop: int
    existing: str | None = None  # name of its tar
    origins: tuple[int, ...] = ()
    redo: frozenset[int] = frozenset()
    recaption: frozenset[int] = frozenset()


def encode_unit(
    encoder: ClipEncoder,
    decoders: DecoderPool,
    spec: PrepareSpec,
    pool: str,
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
        existing = shards.read_shard_manifest(pool, unit.existing)
        if existing is None:
            raise UserError(f"the index of {unit.existing} in {pool} was deleted; is another command writing there?")
        origins = frozenset(unit.origins)
        stored = enumerate(shards.stored_outcomes(pool, existing))
        kept = (outcome for position, outcome in stored if position in origins)
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
            if before is None or row.row in unit.redo:
                yield outcome_of(row.row)
            elif isinstance(before, Failure):
                yield replace(before, row=row.row)
            elif row.row in unit.recaption and isinstance(row, ClipRef):
                yield encoder.recaption(before, row)
            else:
                yield before

    rows = (0, len(unit.rows))
    label = shards.rows_label(unit.row_ids)
    return shards.write_shard(pool, label, rows, outcomes(), recipe_hash, made_with, unit.row_ids).summary()


def by_file(rows: list[ClipRef | Failure]) -> list[ClipRef | Failure]:
    """Returns rows with those of one link next to each other, at the place of the first: it is downloaded once."""
    groups: dict[object, list[ClipRef | Failure]] = {}
    for row in rows:
        groups.setdefault(row.row if isinstance(row, Failure) else row.url, []).append(row)
    return [row for group in groups.values() for row in group]


def _both(before: str, now: str) -> str:
    """Returns the library versions that the samples of one shard were made with."""
    return before if now in before.split(", ") else f"{before}, {now}"
