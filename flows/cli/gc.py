"""The command `gc`: lists and removes the results below a root that nothing in use refers to."""

from __future__ import annotations

from flows import garbage
from flows.cli.session import locked
from flows.mlflow_store import tracking_address
from flows.parameters import HOURS, NIGHTS
from infra import storage
from infra.settings import DEFAULT_ROOT
from tasks.records import UserError


def gc(
    root: str = DEFAULT_ROOT,
    tracking_uri: str | None = None,
    nights: int = NIGHTS,
    hours: float = HOURS,
    dry_run: bool = True,
) -> None:
    """List data sets, trainings and evaluations that no alias, night or running stage refers to; --no-dry-run removes.

    Args:
        root: folder or address that everything is written below.
        tracking_uri: MLflow's tracking address; without it MLFLOW_TRACKING_URI or a SQLite file in root.
        nights: results of this many last nights are kept.
        hours: results written in the last hours are kept.
        dry_run: only list what would be removed.
    """
    if nights < 1 or hours < 0:
        raise UserError(f"nights {nights} and hours {hours:g}, expected at least 1 night and 0 hours")
    path = storage.local_path(storage.absolute(root))
    if path is not None and not path.is_dir():
        raise UserError(f"no root at {root}; give the --root of earlier commands")
    with locked(root):
        garbage.collect(root, tracking_address(tracking_uri, root), nights, hours, dry_run)
