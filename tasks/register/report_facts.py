"""Reads what registration needs from an evaluation's report folder: scores, gate, remarks, files worth keeping."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from infra import storage
from tasks.records import EVALUATION_REPORT, UserError, digest

_METRIC_NAME = re.compile(r"[^\w./ :-]")


@dataclass(frozen=True)
class ReportFacts:
    """`metrics`: numbers by `row/metric`; `scores`: the same as text with intervals; `digest`: its identity.

    `model` is the sha256 of the model that was judged, "" where the report does not say; `champion` the digest of the
    report and the sha256 of the model that the gate compared it with, None where it compared with none.
    """

    uri: str
    digest: str
    metrics: dict[str, float]
    scores: tuple[tuple[str, str, str], ...]
    passed: bool
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    files: tuple[str, ...]
    model: str = ""
    champion: tuple[str, str] | None = None

    def origin(self) -> dict[str, str]:
        """What a later promotion must know of the report, as tags of the version."""
        of = dict(zip(("trip.compared_report", "trip.compared_model"), self.champion or (), strict=False))
        return {tag: value for tag, value in {"trip.judged_model": self.model, **of}.items() if value}

    def copy_files(self, folder: Path) -> None:
        """Copies the report with its tables, plots and clips; the lossless frames of every clip stay where they are."""
        for name in self.files:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(storage.read_bytes(storage.join(self.uri, name)))


def read_report(uri: str) -> ReportFacts:
    """The facts of one report folder.

    Raises:
        UserError: no report there, or one without rows or a gate.
    """
    try:
        report = storage.read_json(storage.join(uri, EVALUATION_REPORT))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"no report.json at {uri!r}; give the folder that the evaluation wrote") from error
    except ValueError as error:
        raise UserError(f"the report.json at {uri!r} is not JSON ({error}); run the evaluation again") from error
    gate, rows = report.get("gate"), report.get("rows")
    if not isinstance(gate, dict) or not isinstance(gate.get("passed"), bool) or not isinstance(rows, dict):
        raise UserError(f"the report.json at {uri!r} lacks rows or a gate; run the evaluation again")
    files = [str(name) for name in report.get("files", ())]
    if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in files):
        raise UserError(f"the report.json at {uri!r} names files outside its folder; run the evaluation again")
    numbers = {(str(row), name): item for row, metrics in rows.items() for name, item in _numbers(metrics)}
    return ReportFacts(
        uri=uri,
        digest=digest(report),
        metrics={_METRIC_NAME.sub("_", f"{row}/{name}"): value for (row, name), (value, _, _) in numbers.items()},
        scores=tuple((row, name, _with_interval(item)) for (row, name), item in numbers.items()),
        passed=gate["passed"],
        reasons=tuple(str(reason) for reason in gate.get("reasons", ())),
        notes=tuple(str(note) for note in report.get("notes", ())),
        files=(*files, EVALUATION_REPORT),
        model=_model(report),
        champion=_champion(report),
    )


def _model(report: dict[str, Any]) -> str:
    return str(report.get("provenance", {}).get("model_sha256", ""))


def _champion(report: dict[str, Any]) -> tuple[str, str] | None:
    address = report.get("provenance", {}).get("folders", {}).get("champion")
    if address is None:
        return None
    try:
        compared = storage.read_json(storage.join(address, EVALUATION_REPORT))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return "cannot be read", ""  # which is the report of no champion
    return digest(compared), _model(compared)


def _numbers(value: Any, prefix: str = "") -> Iterator[tuple[str, tuple[float, float | None, float | None]]]:
    """The named numbers below a value: a plain number, or an estimate {value, ci_low, ci_high}."""
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        if math.isfinite(value):
            yield prefix, (float(value), None, None)
    elif isinstance(value, dict):
        if isinstance(value.get("value"), int | float):
            yield prefix, (float(value["value"]), value.get("ci_low"), value.get("ci_high"))
            return
        for name, item in value.items():
            yield from _numbers(item, f"{prefix}/{name}" if prefix else str(name))


def _with_interval(item: tuple[float, float | None, float | None]) -> str:
    value, low, high = item
    return f"{value:.4g}" if low is None or high is None else f"{value:.4g} [{low:.4g}, {high:.4g}]"
