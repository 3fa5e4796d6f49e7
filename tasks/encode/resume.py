"""Decides what of a shard that exists is done again: rows whose failure may pass, and clips to be forgotten."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tasks.records import RETRY_CLASSES, ClipRef, Failure, UserError
from tasks.shards import ShardManifest, ShardSummary, read_shard_manifest
from tasks.shards.takedowns import REASON as FORGOTTEN


@dataclass(frozen=True)
class Held:
    """A shard that an earlier run finished, and the rows of it that this run does again."""

    summary: ShardSummary
    redo: frozenset[int]


def retry_reasons(classes: Sequence[str]) -> frozenset[str]:
    """The reasons of some retry classes. Raises UserError for a class that there is not."""
    unknown = [name for name in classes if name not in RETRY_CLASSES]
    if unknown:
        raise UserError(f"retry class {unknown[0]!r} is unknown; the classes are {', '.join(RETRY_CLASSES)}")
    return frozenset[str]().union(*(RETRY_CLASSES[name] for name in classes))


def find_held(
    dataset: str,
    names: Iterable[str],
    rows: Sequence[ClipRef | Failure],
    recipe_hash: str,
    reasons: frozenset[str],
) -> Held | None:
    """The best shard under `names` that is of these rows and this recipe; a killed repair leaves the old and the new.

    Best is the one with most rows encoded, then with least to do again.
    """
    manifests = [read_shard_manifest(dataset, name) for name in names]
    identity = (rows[0].row, rows[-1].row + 1, recipe_hash)
    held = [
        Held(manifest.summary(), _rows_to_redo(manifest, rows, reasons))
        for manifest in manifests
        if manifest is not None and (manifest.start, manifest.stop, manifest.recipe_hash) == identity
    ]
    return max(held, key=lambda one: (one.summary.encoded, -len(one.redo)), default=None)


def _rows_to_redo(
    manifest: ShardManifest, rows: Sequence[ClipRef | Failure], reasons: frozenset[str]
) -> frozenset[int]:
    """`rows` are as the table and the list of forgotten clips have them today."""
    failed = {failure.row: failure.reason for failure in manifest.failures}
    retried = {row for row, reason in failed.items() if reason in reasons}
    forgotten = {row.row for row in rows if isinstance(row, Failure) and row.reason == FORGOTTEN}
    return frozenset(retried | {row for row in forgotten if failed.get(row) != FORGOTTEN})
