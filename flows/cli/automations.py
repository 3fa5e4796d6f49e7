"""The automations of a Prefect server: what follows a training, a promotion and a failure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from uuid import UUID

from flows.events import NOT_NAMED, PROMOTED, STAGE_FAILED, TRAINED

WEBHOOK_BLOCK = "trip-failures"
# Parameters of evaluate-trip that a finished training knows.
OF_A_TRAINING = ("recipe", "source", "root", "base", "dataset", "model", "tracking_uri", "values", "options")
_FAILURE = ("stage", "shard", "clip", "error", "remedy", "run")


def create_automations(deployments: Mapping[str, UUID], webhook: str | None) -> list[str]:
    """Creates the automations of the given deployments, or updates them; one that was paused stays paused.

    Args:
        deployments: ids by name; those without evaluate-trip or smoke-test get no automation that needs it.
        webhook: the address that failures are sent to, kept in a block of the server; None leaves it as it is.
    Returns:
        The names of the automations that the server has now.
    """
    from prefect.automations import Automation
    from prefect.client.orchestration import get_client
    from prefect.events.actions import CallWebhook, RunDeployment
    from prefect.events.schemas.automations import EventTrigger, Posture

    def on(event: str, match: Mapping[str, Any] | None = None) -> EventTrigger:
        within = timedelta(0)
        return EventTrigger(
            expect={event}, posture=Posture.Reactive, threshold=1, within=within, match_related=dict(match or {})
        )

    def run(deployment: str, values: dict[str, Any]) -> RunDeployment:
        fields = {"deployment_id": deployments[deployment], "parameters": values}
        return RunDeployment.model_validate({"source": "selected", **fields})

    wanted: dict[str, tuple[EventTrigger, Any]] = {}
    if "evaluate-trip" in deployments:
        values = {name: _value(_field(name)) for name in OF_A_TRAINING}
        action = run("evaluate-trip", values)
        wanted["trip: evaluate a finished training"] = on(TRAINED), action
    if "smoke-test" in deployments:
        values = {"version": _value(_field("version"))}
        action = run("smoke-test", values)
        wanted["trip: test the service after a promotion"] = on(PROMOTED), action
    block = _webhook_block(webhook)
    if block is not None:
        failed = {name: _field(name) for name in _FAILURE}
        wanted["trip: report a failed stage"] = (
            on(STAGE_FAILED),
            CallWebhook(block_document_id=block, payload=_template(failed)),
        )
        # A killed process sends no event of its own; the worker reports its end.
        lost = dict.fromkeys(_FAILURE, f"'{NOT_NAMED}'") | {
            "stage": "flow.name",
            "error": "flow_run.state.message",
            "remedy": "'start the run again with the same parameters; it continues'",
            "run": "flow_run | ui_url",
        }
        trigger = on("prefect.flow-run.Crashed", {"prefect.resource.role": "deployment"})
        wanted["trip: report a lost run"] = trigger, CallWebhook(block_document_id=block, payload=_template(lost))
    with get_client(sync_client=True) as client:
        for name, (trigger, action) in wanted.items():
            existing = client.read_automations_by_name(name)
            paused = bool(existing) and not existing[0].enabled
            automation = Automation(name=name, trigger=trigger, actions=[action], enabled=not paused)
            if existing:
                automation.id = existing[0].id
                automation.update()
            else:
                automation.create()
    return list(wanted)


def _field(name: str) -> str:
    """A field of an event's payload as an expression of Jinja, for which `payload.values` is a method."""
    return f"event.payload['{name}']"


def _value(expression: str) -> dict[str, Any]:
    """A parameter of a run: a value of the event as JSON, so that null and lists stay what they are."""
    template = {"__prefect_kind": "jinja", "template": f"{{{{ {expression} | tojson }}}}"}
    return {"__prefect_kind": "json", "value": template}


def _template(fields: Mapping[str, str]) -> str:
    """A JSON object whose values are expressions of Jinja."""
    return "{" + ", ".join(f"{json.dumps(name)}: {{{{ ({value}) | tojson }}}}" for name, value in fields.items()) + "}"


def _webhook_block(address: str | None) -> UUID | None:
    """The id of the block with the address of the webhook, after a change if one is given; None without a block."""
    from prefect.blocks.webhook import Webhook

    block: Any = Webhook  # outside an event loop its methods return values, not coroutines
    if address is None:
        try:
            return block.load(WEBHOOK_BLOCK)._block_document_id
        except ValueError:
            return None
    return block(url=address, headers={"Content-Type": "application/json"}).save(WEBHOOK_BLOCK, overwrite=True)
