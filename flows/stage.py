"""What the stage tasks share: when a stage is tried again, and what a run is linked to."""

from __future__ import annotations

import logging
from typing import Any

from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from flows.console import log
from flows.events import report_failure
from infra.redaction import RedactingFilter
from infra.settings import code_version

# Prefect logs the errors of flows and tasks, with the tracebacks of the libraries' own ones.
for _logger in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_logger).addFilter(RedactingFilter())


class _ToTheRun(logging.Handler):
    """Sends the warnings of the stages to the console and to the page of the flow run."""

    def emit(self, record: logging.LogRecord) -> None:
        log(f"warning     {record.getMessage()}")


for _logger in ("tasks", "infra", "trip_model"):
    if not any(isinstance(handler, _ToTheRun) for handler in logging.getLogger(_logger).handlers):
        logging.getLogger(_logger).addHandler(_ToTheRun(logging.WARNING))


def run_tags() -> dict[str, str]:
    """Tags of an MLflow run or version: the commit, and the flow run with the address of its page."""
    from prefect.runtime import flow_run

    tags = {"trip.code_version": code_version()}
    names = {"prefect.flow": flow_run.flow_name, "prefect.flow_run_id": flow_run.id, "prefect.url": flow_run.ui_url}
    return tags | {name: str(value) for name, value in names.items() if value}


def is_transient(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether a second attempt can end otherwise: Ray lost a machine. A bad table is not tried twice."""
    from infra.cluster import lost_a_machine  # imports ray, which a night with nothing new does not need

    return lost_a_machine(state.data)


# Clips and shards are retried inside a stage, by Ray; retrying both there and here would multiply.
STAGE_POLICY: dict[str, Any] = {
    "retries": 1,
    "retry_delay_seconds": 10,
    "retry_condition_fn": is_transient,
    "on_failure": [report_failure],
    "cache_policy": NO_CACHE,  # results are found by their address, on any machine
}
