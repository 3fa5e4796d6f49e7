"""What the stage tasks share: when a stage is tried again, and what a run is linked to."""

from __future__ import annotations

import logging
from typing import Any

from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from infra.cluster import lost_a_machine
from infra.redaction import RedactingFilter

# Prefect logs the errors of flows and tasks, with the tracebacks of the libraries' own ones.
for _logger in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_logger).addFilter(RedactingFilter())


def is_transient(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether a second attempt can end otherwise: Ray lost a machine. A bad table is not tried twice."""
    return lost_a_machine(state.data)


# Clips and shards are retried inside a stage, by Ray; retrying both there and here would multiply.
STAGE_POLICY: dict[str, Any] = {
    "retries": 1,
    "retry_delay_seconds": 10,
    "retry_condition_fn": is_transient,
    "cache_policy": NO_CACHE,  # results are found by their address, on any machine
}
