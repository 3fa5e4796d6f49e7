"""Flow: removes the results below a root that nothing in use refers to."""

from __future__ import annotations

from typing import Annotated

from prefect import flow

from flows import garbage
from flows.mlflow_store import tracking_address
from flows.parameters import HOURS, NIGHTS, NOT_NEGATIVE, POSITIVE
from infra.output import outlive_reader
from infra.settings import DEFAULT_ROOT


@flow(name="gc", on_running=[outlive_reader])
def collect_garbage(
    root: str = DEFAULT_ROOT,
    tracking_uri: str | None = None,
    nights: Annotated[int, POSITIVE] = NIGHTS,
    hours: Annotated[float, NOT_NEGATIVE] = HOURS,
    dry_run: bool = True,
) -> dict[str, int]:
    """Remove data sets, trainings and evaluations that no alias, night or running stage refers to.

    Args:
        root: folder or address that everything is written below.
        tracking_uri: MLflow's tracking address; without it MLFLOW_TRACKING_URI or a SQLite file in root.
        nights: results of this many last nights are kept.
        hours: results written in the last hours are kept.
        dry_run: only list what would be removed.
    """
    return garbage.collect(root, tracking_address(tracking_uri, root), nights, hours, dry_run)
