"""What the stage flows share: content addresses below a root, the code's version, and when a stage is tried again."""

from __future__ import annotations

import logging
import subprocess
from typing import Any

from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from infra import storage
from infra.cluster import lost_a_machine
from infra.redaction import RedactingFilter
from infra.settings import CHECKOUT
from tasks.records import digest

# Prefect logs the errors of flows and tasks, with the tracebacks of the libraries' own ones.
for _logger in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_logger).addFilter(RedactingFilter())


def address(root: str, stage: str, identity: Any) -> str:
    """Where the result of a stage lies: a folder named after what goes in, so a changed recipe never meets old files.

    `identity` is everything that changes the result, contents by their hash. The stages themselves write their mark of
    completion last, find it again, and continue what lacks it; so the same command resumes.
    """
    return storage.join(storage.absolute(root), stage, digest(identity))


def worth_retrying(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether a second attempt can end otherwise: Ray lost a machine. A bad table is not tried twice."""
    return lost_a_machine(state.data)


def code_version() -> str:
    """The commit of the checkout, with a mark when files differ from it; `unknown` outside of git."""
    command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


# Clips and shards are retried inside a stage, by Ray; retrying both there and here would multiply.
STAGE_POLICY: dict[str, Any] = {
    "retries": 1,
    "retry_delay_seconds": 10,
    "retry_condition_fn": worth_retrying,
    "cache_policy": NO_CACHE,  # results are found by their address, on any machine
}
