"""What registration takes from an evaluation's record: numbers for MLflow, the champion, files to keep."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from infra import storage
from infra.tracking import EVALUATED_MODEL
from tasks.evaluation_record import REPORT_FILE, EvaluationRecord, read_evaluation
from tasks.metrics.statistics import Estimate
from tasks.records import UserError

_METRIC_NAME = re.compile(r"[^\w./ :-]")


@dataclass(frozen=True)
class ReportFacts:
    """An evaluation's record with its address; `champion`: digest of the report and sha256 of the model compared with.

    Without a comparison `champion` is None.
    """

    uri: str
    record: EvaluationRecord
    champion: tuple[str, str] | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """The finite numbers by `row/metric`, in names that MLflow accepts."""
        return {_METRIC_NAME.sub("_", f"{row}/{name}"): item.value for row, name, item in self._numbers()}

    @property
    def scores(self) -> tuple[tuple[str, str, str], ...]:
        """Row, metric and number with its interval as text."""
        return tuple((row, name, _with_interval(item)) for row, name, item in self._numbers())

    def origin(self) -> dict[str, str]:
        """Tags of the version that a later promotion needs."""
        compared = dict(zip(("trip.compared_report", "trip.compared_model"), self.champion or (), strict=False))
        tags = {EVALUATED_MODEL: self.record.model_sha256, **compared}
        return {tag: value for tag, value in tags.items() if value}

    def copy_files(self, folder: Path) -> None:
        """Copies the report with its tables, plots and clips, without the lossless frames of every clip."""
        for name in (*self.record.files, REPORT_FILE):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(storage.read_bytes(storage.join(self.uri, name)))

    def _numbers(self) -> Iterator[tuple[str, str, Estimate]]:
        for row, metrics in self.record.rows.items():
            for name, item in metrics.items():
                if math.isfinite(item.value):
                    yield row, name, item


def read_report(uri: str) -> ReportFacts:
    """Reads a finished evaluation and the record of the champion that it compared with.

    Raises:
        UserError: no report there, or one that is damaged or of another schema version.
    """
    record = read_evaluation(uri)
    if record.champion is None:
        return ReportFacts(uri, record)
    try:
        compared = read_evaluation(record.champion)
    except UserError:
        return ReportFacts(uri, record, ("cannot be read", ""))  # no champion's report has this digest
    return ReportFacts(uri, record, (compared.digest, compared.model_sha256))


def _with_interval(item: Estimate) -> str:
    if item.ci_low is None or item.ci_high is None:
        return f"{item.value:.4g}"
    return f"{item.value:.4g} [{item.ci_low:.4g}, {item.ci_high:.4g}]"
