"""Finds the shards that a run can reuse, and the rows in them to process again: retried failures and takedowns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tasks.records import RETRY_CLASSES, ClipRef, Failure, UserError
from tasks.shards import ShardManifest, ShardSummary, read_shard_manifest


@dataclass(frozen=True)
class ExistingShard:
    """A shard that an earlier run finished, and its rows that this run processes again."""

    summary: ShardSummary
    redo: frozenset[int]


def retry_reasons(classes: Sequence[str]) -> frozenset[str]:
    """Returns the failure reasons of retry classes. Raises UserError for an unknown class."""
    unknown = [name for name in classes if name not in RETRY_CLASSES]
    if unknown:
        raise UserError(f"retry class {unknown[0]!r} is unknown; the classes are {', '.join(RETRY_CLASSES)}")
    return frozenset[str]().union(*(RETRY_CLASSES[name] for name in classes))


def find_existing(
    pool: str,
    names: Iterable[str],
    rows: Sequence[ClipRef | Failure],
    row_ids: Sequence[str],
    recipe_hash: str,
    reasons: frozenset[str],
    excluded: frozenset[str],
) -> ExistingShard | None:
    """Returns the best shard among `names` with these rows and this recipe, or None.

    A killed run can leave an old and a rebuilt shard. The best has the most encoded rows, then the fewest to redo.

    Args:
        pool: the folder of the shards.
        names: of their tars.
        rows: the rows of a work unit, numbered from 0; they follow the current exclusions.
        row_ids: the identities of the rows.
        recipe_hash: of the samples.
        reasons: of failures to try again.
        excluded: the reasons of excluded rows.
    """
    manifests = [read_shard_manifest(pool, name) for name in names]
    existing = [
        ExistingShard(manifest.summary(), _rows_to_redo(manifest, rows, reasons, excluded))
        for manifest in manifests
        if manifest is not None
        and (manifest.start, manifest.row_ids, manifest.recipe_hash) == (0, list(row_ids), recipe_hash)
    ]
    return max(existing, key=lambda shard: (shard.summary.encoded, -len(shard.redo)), default=None)


def _rows_to_redo(
    manifest: ShardManifest, rows: Sequence[ClipRef | Failure], reasons: frozenset[str], excluded: frozenset[str]
) -> frozenset[int]:
    """Returns the rows to process again."""
    failed = {failure.row: failure.reason for failure in manifest.failures}
    retried = {row.row for row in rows if isinstance(row, ClipRef) and failed.get(row.row) in reasons}
    removed = {row.row: row.reason for row in rows if isinstance(row, Failure) and row.reason in excluded}
    return frozenset(retried | {row for row, reason in removed.items() if failed.get(row) != reason})
