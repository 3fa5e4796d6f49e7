"""The command `gc`: lists and removes results below a root and versions of models that nothing in use refers to."""

from __future__ import annotations

from flows import garbage
from flows.cli.session import locked
from flows.mlflow_store import tracking_address
from flows.parameters import HOURS, NIGHTS, VERSIONS
from infra import storage
from infra.settings import DEFAULT_ROOT
from tasks.records import UserError


def gc(
    root: str = DEFAULT_ROOT,
    tracking_uri: str | None = None,
    nights: int = NIGHTS,
    hours: float = HOURS,
    versions: int = VERSIONS,
    dry_run: bool = True,
) -> None:
    """List data sets, trainings, evaluations and model versions that nothing in use refers to; --no-dry-run removes.

    In use is what an alias of the registry, one of the last nights or a running stage refers to. Listed are also
    folders of ended Ray sessions on this machine.

    Args:
        root: folder or address that everything is written below.
        tracking_uri: MLflow's tracking address; without it MLFLOW_TRACKING_URI or a SQLite file in root.
        nights: results of this many last nights are kept.
        hours: what was written in the last hours is kept.
        versions: this many last versions of a model, and last champions, are kept.
        dry_run: only list what would be removed.
    """
    if nights < 1 or hours < 0 or versions < 1:
        raise UserError(
            f"nights {nights}, hours {hours:g}, versions {versions}; expected at least 1 night, 0 hours and 1 version"
        )
    path = storage.local_path(storage.absolute(root))
    if path is not None and not path.is_dir():
        raise UserError(f"no root at {root}; give the --root of earlier commands")
    with locked(root):
        garbage.collect(root, tracking_address(tracking_uri, root), nights, hours, dry_run, versions)
