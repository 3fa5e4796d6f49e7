"""Finds the shards that a run can reuse, and the rows in them to process again: retried failures and takedowns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tasks.records import RETRY_CLASSES, ClipRef, Failure, UserError
from tasks.shards import ShardManifest, ShardSummary, read_shard_manifest
from tasks.shards.takedowns import TAKEDOWN_REASON


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
    dataset: str,
    names: Iterable[str],
    rows: Sequence[ClipRef | Failure],
    recipe_hash: str,
    reasons: frozenset[str],
) -> ExistingShard | None:
    """Returns the best shard among `names` with these rows and this recipe, or None.

    A killed run can leave an old and a rebuilt shard. The best has the most encoded rows, then the fewest to redo.
    """
    manifests = [read_shard_manifest(dataset, name) for name in names]
    identity = (rows[0].row, rows[-1].row + 1, recipe_hash)
    existing = [
        ExistingShard(manifest.summary(), _rows_to_redo(manifest, rows, reasons))
        for manifest in manifests
        if manifest is not None and (manifest.start, manifest.stop, manifest.recipe_hash) == identity
    ]
    return max(existing, key=lambda shard: (shard.summary.encoded, -len(shard.redo)), default=None)


def _rows_to_redo(
    manifest: ShardManifest, rows: Sequence[ClipRef | Failure], reasons: frozenset[str]
) -> frozenset[int]:
    """Returns the rows to process again; `rows` follow the current table and takedowns."""
    failed = {failure.row: failure.reason for failure in manifest.failures}
    retried = {row for row, reason in failed.items() if reason in reasons}
    removed = {row.row for row in rows if isinstance(row, Failure) and row.reason == TAKEDOWN_REASON}
    return frozenset(retried | {row for row in removed if failed.get(row) != TAKEDOWN_REASON})
