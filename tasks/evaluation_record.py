"""The record of an evaluation: its file report.json, which registration and comparisons read back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from infra import storage
from tasks.json_records import parse_record
from tasks.metrics.statistics import Estimate
from tasks.records import UserError, digest

REPORT_FILE = "report.json"  # written last, so it marks the evaluation as complete
REPORT_SCHEMA = 4
PAGE_FILE = "report.html"
PER_CLIP_FILE = "per_clip.npz"
# Rows of every report: the first frame repeated, the untrained base, the true clips, the model under evaluation.
FROZEN, BASE, REAL, TRIP = "frozen", "base", "real", "trip"
PROTOCOL_FILE = "protocol.json"
PROTOCOL_SCHEMA = "trip-protocol/1"


@dataclass(frozen=True)
class Verdict:
    """One rule of the gate as it was applied.

    Attributes:
        rule: what is measured.
        value: with its interval; None if it could not be measured.
        threshold: what is required, in words.
        passed: whether the rule is met.
        reason: why the rule is not met, in words; "" if it is.
    """

    rule: str
    value: Estimate | None
    threshold: str
    passed: bool
    reason: str = ""


@dataclass(frozen=True)
class Gate:
    """Whether a model may become champion, with every reason against it, and every rule."""

    passed: bool
    reasons: tuple[str, ...]
    rules: tuple[Verdict, ...] = ()


@dataclass(frozen=True)
class EvaluationRecord:
    """The content of report.json.

    Attributes:
        key: digest of everything that the numbers depend on; evaluations of equal keys have equal numbers.
        rows: estimates by row of the table ("frozen", "trip", "real", ...) and metric.
        differences: a row minus the evaluated model, paired by clip, by row and metric.
        floors: distance of two halves of the real clips, not paired, by metric.
        infinity: a distance at infinitely many clips, by row and metric.
        curves: estimates by name ("consecutive", "psnr", ...), row and frame.
        counts: how many items there are, and how many were excluded by row and reason.
        clips: number of unique clips.
        items: number of items (a clip may have several).
        files: names of the report's other files, relative to its folder.
        generations: folder of the generated clips, relative to the report's.
        samples: folders of the second, third .. clip of each item, if there are any.
        best: hash of the best model so far by measure ("score", "motion"); best.npz has its values.
        provenance: hashes and settings that the numbers come from.
    """

    key: str
    gate: Gate
    rows: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, Estimate]]
    floors: dict[str, Estimate]
    infinity: dict[str, dict[str, Estimate]]
    curves: dict[str, dict[str, list[Estimate]]]
    counts: dict[str, Any]
    notes: list[str]
    clips: int
    items: int
    files: tuple[str, ...]
    generations: str
    provenance: dict[str, Any]
    samples: tuple[str, ...]
    best: dict[str, str]
    schema_version: int = REPORT_SCHEMA

    def __post_init__(self) -> None:
        for name in (*self.files, self.generations, *self.samples):
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"files: {name!r} lies outside the report's folder")

    @property
    def digest(self) -> str:
        """Identity of the report, 16 hex digits."""
        return digest(self)

    @property
    def model_sha256(self) -> str:
        """Hash of the evaluated model folder, "" if the report has none."""
        return str(self.provenance.get("model_sha256", ""))

    @property
    def champion(self) -> str | None:
        """Address of the champion's report that the gate compared with, None without a comparison."""
        return self.provenance.get("folders", {}).get("champion")


@dataclass(frozen=True)
class EvaluatedItem:
    """One item of a finished evaluation: `key` names its clips, `clip` is its source clip."""

    key: str
    clip: str
    caption: str


@dataclass(frozen=True)
class EvaluatedItems:
    """The items of a finished evaluation in their order, and their clips' frames, fps and pixels a side."""

    items: tuple[EvaluatedItem, ...]
    frames: int
    fps: float
    size: int


def read_items(uri: str) -> EvaluatedItems:
    """Reads the items of a finished evaluation from its protocol.

    Args:
        uri: address of the evaluation's folder.

    Raises:
        UserError: no protocol there, or one of another schema version.
    """
    address = storage.join(uri, PROTOCOL_FILE)
    try:
        content: dict[str, Any] = json.loads(storage.read_bytes(address))
        if content.get("schema") != PROTOCOL_SCHEMA:
            raise ValueError(f"schema {content.get('schema')!r}, expected {PROTOCOL_SCHEMA!r}")
        lines: list[dict[str, Any]] = content["items"]
        items = tuple(EvaluatedItem(str(i["key"]), str(i["clip"]), str(i["caption"])) for i in lines)
        return EvaluatedItems(items, int(content["frames"]), float(content["fps"]), int(content["size"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{address} is not the protocol of an evaluation ({error}); run the evaluation again"
        ) from error


def read_evaluation(uri: str) -> EvaluationRecord:
    """Reads the record of a finished evaluation.

    Args:
        uri: address of the evaluation's folder.

    Raises:
        UserError: no report there, or one that is damaged or of another schema version.
    """
    address = storage.join(uri, REPORT_FILE)
    try:
        content = storage.read_bytes(address)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"no {REPORT_FILE} at {uri!r}; give the folder that the evaluation wrote") from error
    try:
        schema_version = json.loads(content).get("schema_version")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{address} is not JSON ({error}); run the evaluation again") from error
    if schema_version != REPORT_SCHEMA:
        raise UserError(f"{address} has schema {schema_version!r}, expected {REPORT_SCHEMA}; run the evaluation again")
    try:
        return parse_record(EvaluationRecord, content)
    except ValueError as error:
        raise UserError(f"{address} is damaged ({error}); run the evaluation again") from error
