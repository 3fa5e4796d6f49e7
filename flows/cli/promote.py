"""The commands `promote`, `rollback` and `live`: which version of a registered model is in use, and why."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from flows.console import log, results
from flows.mlflow_store import existing_store
from infra.redaction import redact
from infra.settings import DEFAULT_ROOT
from tasks.records import UserError

if TYPE_CHECKING:
    from tasks.register.promotion import Entry, Standing

LAST = 10  # entries of the log that are shown
JUDGED = "trip"  # the row of a report that is the model's own


def promote(
    version: int, reason: str = "", root: str = DEFAULT_ROOT, tracking_uri: str | None = None, name: str = "trip"
) -> None:
    """Make a version champion if the gate of its report passed; the champion of before becomes `previous`.

    Args:
        version: its number in the registry.
        reason: why, in words; needed only for a version that was rolled back.
        root: folder whose MLflow store is asked, unless another is named.
        tracking_uri: where MLflow keeps models.
        name: the model's name in the registry.
    """
    from tasks.register import promotion

    with _registry(root, tracking_uri) as client:
        _say(name, promotion.promote(client, name, str(version), reason))


def rollback(reason: str = "", root: str = DEFAULT_ROOT, tracking_uri: str | None = None, name: str = "trip") -> None:
    """Make the champion of before champion again; repeated, it goes back one further.

    Args:
        reason: why, in words; kept in the log and on the version that was champion.
        root: folder whose MLflow store is asked, unless another is named.
        tracking_uri: where MLflow keeps models.
        name: the model's name in the registry.
    """
    from tasks.register import promotion

    with _registry(root, tracking_uri) as client:
        _say(name, promotion.rollback(client, name, reason))


def live(root: str = DEFAULT_ROOT, tracking_uri: str | None = None, name: str = "trip") -> None:
    """Print what is live, since when and why, its scores, what it was trained on, and the last promotions.

    Args:
        root: folder whose MLflow store is asked, unless another is named.
        tracking_uri: where MLflow keeps models.
        name: the model's name in the registry.
    """
    from tasks.register import promotion

    with _registry(root, tracking_uri) as client:
        standing = promotion.settle(client, name)
        if standing.champions and not standing.champion:
            raise UserError(
                f"version {standing.champions[-1].number} of {name}, which the log says is live, was deleted; promote"
                " another, or roll back"
            )
        if not standing.champion:
            raise UserError(f"no version of {name} is live; its versions are {', '.join(standing.versions) or 'none'}")
        results(f"{name}: version {standing.champion} is live", _why(standing))
        found = standing.versions[standing.champion]
        origin = {tag.removeprefix("lineage."): of for tag, of in found.tags.items() if tag.startswith("lineage.")}
        if origin:
            results("Trained on", dict(sorted(origin.items())))
        results("Scores", _scores(client, found.run_id or "") or {"none": "the run of this version holds no report"})
    if standing.entries:
        results("Log", {str(entry.number): _told(entry) for entry in reversed(standing.entries[-LAST:])})


@contextlib.contextmanager
def _registry(root: str, tracking_uri: str | None) -> Iterator[Any]:
    from infra.tracking import TROUBLE
    from tasks.register.promotion import open_registry

    uri = existing_store(tracking_uri, root)
    try:
        yield open_registry(uri)
    except TROUBLE as error:
        reason = (redact(str(error)).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"the registry at {uri} failed ({reason}); the same command continues") from error


def _say(name: str, standing: Standing) -> None:
    earlier = f"; previous is version {standing.earlier[-1].number}" if standing.earlier else ""
    log(f"version {standing.champion} of {name} is champion{earlier}")


def _why(standing: Standing) -> dict[str, str]:
    """Since when and why the champion is champion: the log's last word, and why it was promoted at first."""
    rows = {"since": "before the log began", "why": "the alias was set without a promotion"}
    if standing.entries:
        last = standing.entries[-1]
        rows = {"since": _time(last), "why": f"{last.action}: {last.reasons}"}
        promoted = [entry for entry in standing.entries if (entry.action, entry.promoted) == ("promote", last.promoted)]
        if promoted and promoted[-1] != last:
            rows["promoted"] = f"{_time(promoted[-1])}, {promoted[-1].reasons}"
    rows["previous"] = f"version {standing.earlier[-1].number}" if standing.earlier else "none"
    rows["candidate"] = f"version {standing.aliases['candidate']}" if "candidate" in standing.aliases else "none"
    return rows


def _scores(client: Any, run_id: str) -> dict[str, str]:
    """The model's own row of the report that the run keeps, with intervals; empty where there is none."""
    from infra.tracking import TROUBLE
    from tasks.register.report_facts import REPORT, read_report

    with tempfile.TemporaryDirectory() as scratch:
        try:
            report = client.download_artifacts(run_id, f"evaluation/{REPORT}", scratch)
            scores = read_report(os.path.dirname(report)).scores
        except (*TROUBLE, UserError):
            return {}
    return {metric: value for row, metric, value in scores if row == JUDGED}


def _told(entry: Entry) -> str:
    instead = f" instead of {entry.replaced}" if entry.replaced else ""
    return f"{_time(entry)}  {entry.action} version {entry.version}{instead}: {entry.reasons}"


def _time(entry: Entry) -> str:
    return f"{entry.time:%Y-%m-%d %H:%M:%S} UTC"
