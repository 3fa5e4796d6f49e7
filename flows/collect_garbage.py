"""Flow: removes results below a root and versions of models that nothing in use refers to."""

from __future__ import annotations

from typing import Annotated

from prefect import flow

from flows import garbage
from flows.mlflow_store import tracking_address
from flows.parameters import HOURS, NIGHTS, NOT_NEGATIVE, POSITIVE, VERSIONS
from infra.output import outlive_reader
from infra.settings import DEFAULT_ROOT


@flow(name="gc", on_running=[outlive_reader])
def collect_garbage(
    root: str = DEFAULT_ROOT,
    tracking_uri: str | None = None,
    nights: Annotated[int, POSITIVE] = NIGHTS,
    hours: Annotated[float, NOT_NEGATIVE] = HOURS,
    versions: Annotated[int, POSITIVE] = VERSIONS,
    dry_run: bool = True,
) -> dict[str, int]:
    """Remove data sets, trainings, evaluations and versions of models that nothing in use refers to.

    In use is what an alias of the registry, one of the last nights or a running stage refers to. Removed are also
    folders of ended Ray sessions on this machine.

    Args:
        root: folder or address that everything is written below.
        tracking_uri: MLflow's tracking address; without it MLFLOW_TRACKING_URI or a SQLite file in root.
        nights: results of this many last nights are kept.
        hours: what was written in the last hours is kept.
        versions: this many last versions of a model, and last champions, are kept.
        dry_run: only list what would be removed.
    """
    return garbage.collect(root, tracking_address(tracking_uri, root), nights, hours, dry_run, versions)
