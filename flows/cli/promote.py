"""The commands `promote`, `rollback` and `live`: change and show which version of a registered model is in use."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from flows.console import log, results
from flows.mlflow_store import existing_store
from infra.redaction import redact
from infra.settings import DEFAULT_ROOT, MODEL_NAME
from tasks.records import UserError

if TYPE_CHECKING:
    from tasks.register.promotion import Entry, PromotionState

SHOWN_ENTRIES = 10  # of the log
MODEL_ROW = "trip"  # the model under evaluation in a report


def promote(
    version: int, reason: str = "", root: str = DEFAULT_ROOT, tracking_uri: str | None = None, name: str = MODEL_NAME
) -> None:
    """Make a version champion if the gate of its report passed; the former champion becomes `previous`.

    Args:
        version: its number in the registry.
        reason: the reason as text; required for a version that was rolled back.
        root: the root whose MLflow store is used, unless tracking_uri is given.
        tracking_uri: address of the MLflow registry.
        name: the model's name in the registry.
    """
    from tasks.register import promotion

    with _registry(root, tracking_uri) as client:
        _log_champion(name, promotion.promote(client, name, str(version), reason))


def rollback(
    reason: str = "", root: str = DEFAULT_ROOT, tracking_uri: str | None = None, name: str = MODEL_NAME
) -> None:
    """Make the previous champion the champion again; repeated, it goes back one version further.

    Args:
        reason: the reason as text, written to the log and to the former champion.
        root: the root whose MLflow store is used, unless tracking_uri is given.
        tracking_uri: address of the MLflow registry.
        name: the model's name in the registry.
    """
    from tasks.register import promotion

    with _registry(root, tracking_uri) as client:
        _log_champion(name, promotion.rollback(client, name, reason))


def live(root: str = DEFAULT_ROOT, tracking_uri: str | None = None, name: str = MODEL_NAME) -> None:
    """Print the champion, since when and why, its scores, its training data, and the last promotions.

    Args:
        root: the root whose MLflow store is used, unless tracking_uri is given.
        tracking_uri: address of the MLflow registry.
        name: the model's name in the registry.
    """
    from infra.tracking import LINEAGE
    from tasks.register import promotion

    with _registry(root, tracking_uri) as client:
        state = promotion.sync_aliases(client, name)
        if state.champions and not state.champion:
            raise UserError(
                f"version {state.champions[-1].number} of {name}, live according to the log, was deleted; promote"
                " another, or roll back"
            )
        if not state.champion:
            raise UserError(f"no version of {name} is live; its versions are {', '.join(state.versions) or 'none'}")
        results(f"{name}: version {state.champion} is live", _why(state))
        champion = state.versions[state.champion]
        origin = {tag.removeprefix(LINEAGE): value for tag, value in champion.tags.items() if tag.startswith(LINEAGE)}
        if origin:
            results("Trained on", dict(sorted(origin.items())))
        results("Scores", _scores(client, champion.run_id or "") or {"none": "the run of this version has no report"})
    if state.entries:
        results("Log", {str(entry.number): _entry_line(entry) for entry in reversed(state.entries[-SHOWN_ENTRIES:])})


@contextlib.contextmanager
def _registry(root: str, tracking_uri: str | None) -> Iterator[Any]:
    from infra.tracking import TROUBLE
    from tasks.register.promotion import open_registry

    uri = existing_store(tracking_uri, root)
    try:
        yield open_registry(uri)
    except TROUBLE as error:
        reason = (redact(str(error)).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"the registry at {uri} failed ({reason}); run the same command again") from error


def _log_champion(name: str, state: PromotionState) -> None:
    earlier = f"; previous is version {state.earlier[-1].number}" if state.earlier else ""
    log(f"version {state.champion} of {name} is champion{earlier}")
    if "PREFECT_API_URL" in os.environ:  # automations of that server may follow
        from flows.events import PROMOTED, emit

        emit(PROMOTED, f"{name}.{state.champion}", {"name": name, "version": state.champion})


def _why(state: PromotionState) -> dict[str, str]:
    """Returns since when and why the champion is champion, from the last entry of the log and from its promotion."""
    rows = {"since": "before the log began", "why": "the alias was set without a promotion"}
    if state.entries:
        last = state.entries[-1]
        rows = {"since": _time(last), "why": f"{last.action}: {last.reasons}"}
        promoted = [entry for entry in state.entries if (entry.action, entry.promoted) == ("promote", last.promoted)]
        if promoted and promoted[-1] != last:
            rows["promoted"] = f"{_time(promoted[-1])}, {promoted[-1].reasons}"
    rows["previous"] = f"version {state.earlier[-1].number}" if state.earlier else "none"
    rows["candidate"] = f"version {state.aliases['candidate']}" if "candidate" in state.aliases else "none"
    return rows


def _scores(client: Any, run_id: str) -> dict[str, str]:
    """Returns the model's scores of the run's report, with intervals; empty without a report."""
    from infra.tracking import TROUBLE
    from tasks.evaluation_record import REPORT_FILE
    from tasks.register.report_facts import read_report

    with tempfile.TemporaryDirectory() as scratch:
        try:
            report = client.download_artifacts(run_id, f"evaluation/{REPORT_FILE}", scratch)
            scores = read_report(os.path.dirname(report)).scores
        except (*TROUBLE, UserError):
            return {}
    return {metric: value for row, metric, value in scores if row == MODEL_ROW}


def _entry_line(entry: Entry) -> str:
    instead = f" instead of {entry.replaced}" if entry.replaced else ""
    return f"{_time(entry)}  {entry.action} version {entry.version}{instead}: {entry.reasons}"


def _time(entry: Entry) -> str:
    return f"{entry.time:%Y-%m-%d %H:%M:%S} UTC"
