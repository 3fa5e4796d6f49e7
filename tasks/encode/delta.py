"""Compares a source with the shards that exist: which shards stay, which lose or change rows, and which rows are new.

A row keeps its shard as long as the source has it, so the shards of a data set that grows every night stay as they are.
The source is read twice. The first time only the identity of each row is kept, 25 bytes; the second time, and only if
there is work, the rows are handed out as work units while the source is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tasks.encode.exclusions import Exclusions
from tasks.encode.spec import PrepareSpec
from tasks.encode.work_unit import Unit
from tasks.ingest.sources import addressed_rows, read_rows
from tasks.ingest.spec import SourceSpec
from tasks.records import ClipRef, Failure, UserError
from tasks.shards import ShardSummary, read_manifest, read_parts, siblings_of
from tasks.shards.identity import KEY_ALONE, failure_id, find_rows, key_id, row_id, without_caption
from tasks.shards.layout import PublishedShard
from tasks.shards.sample_index import SampleIndex

Row = ClipRef | Failure


def rows_of(source: SourceSpec, exclusions: Exclusions) -> Iterator[tuple[Row, str | None]]:
    """Yields the rows of a source, each with the address of its link if an exclusion may need it."""
    return addressed_rows(source) if exclusions else ((row, None) for row in read_rows(source))


def identified_rows(source: SourceSpec, exclusions: Exclusions) -> Iterator[tuple[str, str, Row]]:
    """Yields identity, key and record of every row of a source; excluded rows are failures already."""
    failures: Counter[str] = Counter()
    for row, address in rows_of(source, exclusions):
        if isinstance(row, ClipRef):
            identity = _clip_id(row)
        else:
            # A row without a key is called after its number, which changes with its place.
            key = "" if row.key == f"row-{row.row}" else row.key
            first = failure_id(key, row.reason, row.detail, 0)
            identity = failure_id(key, row.reason, row.detail, failures[first]) if failures[first] else first
            failures[first] += 1
        excluded = exclusions.failure(row, address) if exclusions else None
        if excluded is not None and excluded.key != row.key:
            identity = without_caption(identity)  # a takedown leaves nothing of the clip but hashes
        yield identity, row.key, excluded or row


@dataclass(frozen=True)
class KnownShard:
    """A shard of a finished data set with the index of its rows."""

    published: PublishedShard
    part: SampleIndex

    def summary(self, recipe_hash: str) -> ShardSummary:
        counts = np.bincount(self.part.outcomes_R, minlength=len(self.part.reasons) + 1).tolist()
        failed = {reason: count for reason, count in zip(self.part.reasons, counts[1:], strict=True) if count}
        return ShardSummary(
            shard=self.published.shard,
            start=0,
            stop=len(self.part.outcomes_R),
            recipe_hash=recipe_hash,
            encoded=counts[0],
            samples=self.published.samples,
            failed=failed,
            size_bytes=self.published.size_bytes,
            sha256=self.published.sha256,
            frame_sizes=self.part.count_frame_sizes(),
        )


@dataclass(frozen=True)
class Change:
    """What happens to a known shard: `kept` are the positions of its rows that stay, and which of them change."""

    shard: KnownShard
    kept: np.ndarray  # positions of rows, in order
    redo: frozenset[int]  # positions among the kept rows: processed again, or removed
    recaption: frozenset[int]  # positions among the kept rows: encoded rows with another caption now

    @property
    def encoded(self) -> int:
        """How many of the rows that stay are encoded and not processed again."""
        encoded = self.shard.part.outcomes_R[self.kept] == 0
        return int(encoded.sum()) - sum(bool(encoded[position]) for position in self.redo)

    @property
    def is_whole(self) -> bool:
        """Whether the shard stays as it is."""
        return not self.redo and not self.recaption and len(self.kept) == len(self.shard.part.outcomes_R)


class Delta:
    """The difference between a source and the shards that exist for a recipe.

    Args:
        spec: what to prepare; its source is opened.
        recipe_hash: of the samples.
        exclusions: the lists of the root.
        retried: reasons of failures to try again.
    Raises:
        UserError: the source cannot be read, or the index of a data set is damaged.
    """

    def __init__(self, spec: PrepareSpec, recipe_hash: str, exclusions: Exclusions, retried: frozenset[str]) -> None:
        self._spec, self._exclusions = spec, exclusions
        content, excluded = bytearray(), bytearray()
        reasons = ["", *sorted(exclusions.reasons)]
        keys_alone = bytearray()
        own = _shards_of(spec.output, recipe_hash)
        by_key = any((shard.part.rows_R3[:, 2] == KEY_ALONE).any() for shard in own)
        for identity, key, row in identified_rows(spec.source, exclusions):
            content += bytes.fromhex(identity)
            is_excluded = isinstance(row, Failure) and row.reason in exclusions.reasons
            excluded.append(reasons.index(row.reason) if is_excluded and isinstance(row, Failure) else 0)
            if by_key:
                keys_alone += bytes.fromhex(key_id(key))
        rows_T3 = np.frombuffer(bytes(content), ">u8").astype(np.uint64).reshape(-1, 3)
        self.total, self._rows_T3 = len(rows_T3), rows_T3
        known_rows = [shard.part.rows_R3 for shard in own]
        self._place_T = find_rows(rows_T3[:, :2], _joined(known_rows)[:, :2])  # in all known shards, -1 if new
        if by_key:
            alone = np.frombuffer(bytes(keys_alone), ">u8").astype(np.uint64).reshape(-1, 3)
            self._place_T = np.where(
                self._place_T < 0, find_rows(alone[:, :2], _joined(known_rows)[:, :2]), self._place_T
            )
        shards = own + self._borrowed(spec.output, recipe_hash, rows_T3, sum(map(len, known_rows)))
        ends = np.cumsum([len(shard.part.outcomes_R) for shard in shards], dtype=np.int64)
        self._ends = ends
        row_of = np.full(int(ends[-1]) if len(ends) else 0, -1, np.int64)
        row_of[self._place_T[self._place_T >= 0]] = np.flatnonzero(self._place_T >= 0)
        excluded_T = np.frombuffer(bytes(excluded), np.uint8)
        captions_T = rows_T3[:, 2]
        self.changes = []
        for shard, end in zip(shards, ends.tolist(), strict=True):
            rows = row_of[end - len(shard.part.outcomes_R) : end]
            kept = np.flatnonzero(rows >= 0)
            names = np.array(("", *shard.part.reasons))[shard.part.outcomes_R[kept]]
            wanted = np.array(reasons)[excluded_T[rows[kept]]]
            redo = (wanted != "") & (names != wanted) | (wanted == "") & np.isin(names, list(retried))
            captions = (names == "") & (shard.part.rows_R3[kept, 2] != captions_T[rows[kept]]) & ~redo
            if spec.captioner is not None:  # it reads the frames, so the clip is processed again
                redo, captions = redo | captions, np.zeros_like(captions)
            self.changes.append(
                Change(
                    shard,
                    kept,
                    frozenset(np.flatnonzero(redo).tolist()),
                    frozenset(np.flatnonzero(captions).tolist()),
                )
            )
        self.new_rows = int((self._place_T < 0).sum())

    def _borrowed(self, output: str, recipe_hash: str, rows_T3: np.ndarray, first: int) -> list[KnownShard]:
        """Returns the shards of other data sets of the root that have rows which the data set's own do not have."""
        borrowed: list[KnownShard] = []
        for name in siblings_of(output):
            missing = np.flatnonzero(self._place_T < 0)
            if not len(missing):
                break
            for shard in _shards_of(name, recipe_hash):
                found = find_rows(rows_T3[missing, :2], shard.part.rows_R3[:, :2])
                if (found >= 0).any():
                    self._place_T[missing[found >= 0]] = first + found[found >= 0]
                    missing = missing[found < 0]
                    first += len(shard.part.rows_R3)
                    borrowed.append(shard)
        return borrowed

    def units(self) -> Iterator[Unit]:
        """Yields the work units: shards to rebuild as soon as their rows were read, and new rows in their order.

        The number of a unit is its place in the data set: shards that exist keep theirs, new ones follow.
        """
        rebuilt = {number for number, change in enumerate(self.changes) if len(change.kept) and not change.is_whole}
        if not self.new_rows and not rebuilt:
            return
        waiting: dict[int, dict[int, tuple[str, Row]]] = {number: {} for number in rebuilt}
        new: list[tuple[str, Row]] = []
        fresh, left = 0, self.new_rows
        places = self._place_T
        shards = np.searchsorted(self._ends, places, side="right")
        for number, (row, address) in enumerate(rows_of(self._spec.source, self._exclusions)):
            if not left and not waiting:
                break
            if number >= self.total:
                raise self._changed()
            place = places[number]
            shard = int(shards[number])
            if place >= 0 and shard not in rebuilt:
                continue
            row = (self._exclusions.failure(row, address) if self._exclusions else None) or row
            identity = "".join(f"{word:016x}" for word in self._rows_T3[number].tolist())
            if isinstance(row, ClipRef) and identity != _clip_id(row):
                raise self._changed()
            if place < 0:
                new.append((identity, row))
                left -= 1
                if len(new) == self._spec.clips_per_shard or not left:
                    yield _unit(len(self.changes) + fresh, new)
                    new, fresh = [], fresh + 1
                continue
            change, rows = self.changes[shard], waiting[shard]
            begin = int(self._ends[shard]) - len(change.shard.part.outcomes_R)
            rows[place - begin] = identity, row
            if len(rows) == len(change.kept):
                unit = _unit(shard, [rows[position] for position in sorted(rows)])
                yield replace(
                    unit,
                    existing=change.shard.published.shard,
                    origins=tuple(sorted(rows)),
                    redo=change.redo,
                    recaption=change.recaption,
                )
                del waiting[shard]
        if left or waiting:
            raise self._changed()

    def _changed(self) -> UserError:
        return UserError(f"{self._spec.source.table} changed while it was read; run the command again")


def _clip_id(row: ClipRef) -> str:
    return row_id(row.key, row.url, row.caption, row.span, row.size_bytes)


def _unit(number: int, rows: Sequence[tuple[str, Row]]) -> Unit:
    """Returns the work unit of some rows, which are numbered from 0 in it."""
    records = tuple(replace(row, row=position) for position, (_, row) in enumerate(rows))
    return Unit(number, tuple(identity for identity, _ in rows), records, rows[0][1].row, rows[-1][1].row + 1)


def _shards_of(name: str, recipe_hash: str) -> list[KnownShard]:
    """Returns the shards of a finished data set if it has this recipe."""
    try:
        manifest, sha256 = read_manifest(name)
    except UserError:
        return []
    if manifest.recipe_hash != recipe_hash:
        return []
    parts = read_parts(name, manifest, sha256)
    return [KnownShard(shard, parts[shard.shard]) for shard in manifest.shards]


def _joined(rows: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(rows) if rows else np.empty((0, 3), np.uint64)
