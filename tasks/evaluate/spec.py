"""The spec of an evaluation and its report."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from infra import storage
from infra.redaction import redact
from tasks.evaluate.baseline_pipelines import RECORD
from tasks.evaluate.gate import GateRule
from tasks.evaluate.protocol.protocol import Protocol
from tasks.evaluation_record import REPORT_FILE, Gate, read_evaluation
from tasks.metrics.extractors.files import ExtractorFiles
from tasks.records import Artifact, UserError
from tasks.shards import ShardDataset

if TYPE_CHECKING:
    from tasks.metrics.extractors.extractor import ExtractorInfo

# The packages whose numbers a report depends on.
VERSIONS = ("torch", "diffusers", "open_clip_torch", "numpy", "opencv-python-headless", "ray")


@dataclass(frozen=True)
class EvaluateSpec:
    """What to evaluate, on what, and with which feature extractors; the rest are means.

    `model` is the folder of a model export and `dataset` that of a shard data set with pixels; `output` receives the
    report. `protocol` names a preset, or is the address of a file: a preset's .toml, a manifest's .json. Where a preset
    leaves it to the run, at most `clips` windows are taken; `held_out_fraction` is the one training split by. None for
    `steps` and `guidance`: the model's own values. `methods` are folders of other methods' videos by the name of their
    row, and `champion` is the folder of an earlier report, whose model this one must not be worse than. `base` is the
    base that the model was trained from: untrained, it is a row of the table (None: no such row). Its clips lie below
    `base_clips`, which evaluations of several models of one base share (None: below `output`). With `references` the
    table also has the closed form, the round trip through the VAE, and the best of an item's samples.

    `samples` clips are made of each item, each from its own seed; the energy score needs two. Where the data set has
    `deterministic_motion`, the first frame and the caption decide the clip, so the distance to the true clip decides in
    the gate; elsewhere the energy score does. `gate` holds the thresholds.
    """

    model: str
    dataset: str
    output: str
    model_sha256: str = ""  # of the model folder, where it is known
    protocol: str = "held-out"
    clips: int = 48
    held_out_fraction: float = 0.1
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    batch: int = 8
    methods: dict[str, str] = field(default_factory=dict)
    champion: str | None = None
    base: Artifact | None = None
    base_clips: str | None = None
    references: bool = True
    samples: int = 2
    deterministic_motion: bool = False
    gate: GateRule = field(default_factory=GateRule)
    judges: ExtractorFiles = ExtractorFiles()  # the feature extractors; a recipe's hash covers this field's name
    bootstrap: int = 2000
    examples: int = 6
    workers: int | None = None  # 0: this process, without Ray; None: one for every `cpus_per_worker` that Ray has
    cpus_per_worker: int = 1  # also its torch threads
    gpus_per_worker: float = 0.0
    ray_address: str | None = None


@dataclass(frozen=True)
class EvaluateReport:
    """The report's address and its content that later stages need.

    `metrics` is row ("frozen", "base", "trip", "real", and other methods) -> metric -> {"value", "ci_low", "ci_high"},
    `clips` the number of unique clips, `files` the names below `uri`; `key` is equal for evaluations that must agree.
    """

    uri: str
    key: str
    metrics: dict[str, dict[str, dict[str, float | None]]]
    gate: Gate
    clips: int
    items: int
    files: tuple[str, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        return self.gate.passed


def check_spec(spec: EvaluateSpec) -> None:
    """Raises UserError for a number that no evaluation can use."""
    for name in ("clips", "batch", "bootstrap", "examples", "cpus_per_worker", "samples"):
        if getattr(spec, name) < 1:
            raise UserError(f"{name} {getattr(spec, name)}, expected at least 1")
    if spec.steps is not None and spec.steps < 1:
        raise UserError(f"steps {spec.steps}, expected at least 1, or none for the model's own number")


def finished_report(output: str, key: str, start: float) -> EvaluateReport | None:
    """The report at an address, if it is complete and of this key; `start` is the clock at the start of the call."""
    try:
        record = read_evaluation(output)
    except UserError:  # none, or of another schema: this evaluation writes it
        return None
    if record.key != key or not all(storage.exists(storage.join(output, name)) for name in record.files):
        return None
    return EvaluateReport(
        uri=output,
        key=key,
        metrics=asdict(record)["rows"],
        gate=record.gate,
        clips=record.clips,
        items=record.items,
        files=(*record.files, REPORT_FILE),
        seconds=time.monotonic() - start,
    )


def provenance_of(
    spec: EvaluateSpec, dataset: ShardDataset, protocol: Protocol, extractors: Sequence[ExtractorInfo]
) -> dict[str, Any]:
    """Where the numbers come from; no clock and no host, so that equal evaluations give equal reports."""
    return {
        "model": redact(spec.model),
        "dataset": redact(spec.dataset),
        "dataset_recipe": dataset.manifest["recipe_hash"],
        "protocol": protocol.name,
        "held_out_fraction": spec.held_out_fraction,
        "seed": spec.seed,
        "folders": {
            name: redact(folder)
            for name, folder in (
                spec.methods | {"champion": spec.champion, "base": spec.base.uri if spec.base else None}
            ).items()
            if folder
        },
        "baselines": {
            name: storage.read_json(storage.join(folder, RECORD))
            for name, folder in spec.methods.items()
            if storage.exists(storage.join(folder, RECORD))
        },
        "judges": {
            extractor.metric: {
                "official": extractor.official,
                "sha256": extractor.sha256,
                "features": ", ".join(extractor.features),
                "geometry": extractor.geometry,
            }
            for extractor in extractors
        },
        "versions": {"python": platform.python_version()}
        | {
            name: version(name)
            for name in ("torch", "diffusers", "open_clip_torch", "numpy", "opencv-python-headless", "ray")
        },
    }
