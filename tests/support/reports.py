"""Writes the record of an evaluation, for tests of what reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from infra import storage
from tasks.evaluation_record import REPORT_FILE, EvaluationRecord, Gate
from tasks.records import to_json


def write_record(folder: Path | str, passed: bool = True, reasons: tuple[str, ...] = (), **fields: Any) -> str:
    """Writes report.json with the given fields into a folder and returns the folder's address."""
    maps = ("rows", "differences", "floors", "infinity", "curves", "counts", "provenance", "best")
    empty = {name: {} for name in maps} | {
        "notes": [],
        "clips": 0,
        "items": 0,
        "files": (),
        "samples": (),
        "generations": "",
    }
    record = EvaluationRecord(key="test", gate=Gate(passed, reasons), **(empty | fields))
    storage.write_json(storage.join(str(folder), REPORT_FILE), to_json(record))
    return str(folder)
