"""Events for Prefect's server, which the automations of `flows deploy` listen to; without a server nothing is sent."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from prefect.client.schemas.objects import State, TaskRun
from prefect.events import emit_event
from prefect.tasks import Task

from infra.redaction import redact

# Each is the event's name; its resource is named after what it is about.
TRAINED = "trip.training.finished"  # of the flow train-trip; reproduce and nightly evaluate by themselves
PROMOTED = "trip.version.promoted"
STAGE_FAILED = "trip.stage.failed"
NOT_NAMED = "not named by the error"
_SHARD = re.compile(r"\bshard-[\w.-]*\w")
_CLIP = re.compile(r"\b(?:clip|key|row|rows) [\w~-]+(?: to \d+)?")


def emit(event: str, resource: str, payload: Mapping[str, Any]) -> None:
    """Queues an event; a server that does not respond costs the caller nothing.

    Args:
        event: one of the names above.
        resource: what the event is about, such as an address.
        payload: JSON-able values, for the templates of the automations.
    """
    emit_event(event, resource={"prefect.resource.id": f"trip.{redact(resource)}"}, payload=dict(payload))


def report_failure(task: Task[..., Any], run: TaskRun, state: State[Any]) -> None:
    """The hook of a failed stage: sends an event with the stage, the shard, the clip, the error and the remedy."""
    from prefect.runtime import flow_run

    error = redact(" ".join(str(state.data if isinstance(state.data, Exception) else state.message or "").split()))
    emit(STAGE_FAILED, f"stage.{task.name}", {"stage": task.name, "run": flow_run.ui_url or ""} | parts_of(error))


def parts_of(error: str) -> dict[str, str]:
    """The parts of an error's sentence: `error`, `remedy`, and the first `shard` and `clip` that it names.

    The sentence of a `UserError` ends with what to do, after its last semicolon.
    """
    what, _, remedy = error.rpartition("; ")
    shard, clip = _SHARD.search(error), _CLIP.search(error)
    return {
        "error": what or error,
        "remedy": remedy if what else "read the log of the run; the same command continues",
        "shard": shard[0] if shard else NOT_NAMED,
        "clip": clip[0] if clip else NOT_NAMED,
    }
