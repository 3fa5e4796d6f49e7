"""The spec of a training, its report, and its identity."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from infra import storage
from infra.settings import MlflowAccess
from tasks.records import Artifact, UserError, digest
from trip_model.config import BEFORE, ObjectiveConfig, TripConfig

REPORT = "report.json"  # next to the model; written last, so it marks the training as complete
SPOOL = "tracking.jsonl"  # undelivered tracking records (`tasks/train/spool.py`)
NO_CLUSTER = "train.detached true needs a Ray cluster; set RAY_ADDRESS, or leave it out"
# Metadata of a field that does not change the result, up to rounding, and so is not part of the identity.
MEANS = {"means": True}


@dataclass(frozen=True)
class ValidationSpec:
    """Validation during training. It does not change the training."""

    every: int = 0  # steps between two validations; 0 is never
    clips: int = 32  # held-out clips, each measured in every band of time steps
    bands: int = 5
    animated: int = 2  # of these, clips that are generated, for the motion ratio and to watch


@dataclass(frozen=True)
class Start:
    """The trained model that a training continues (`tasks.train.start`). Its identity is content, never an address."""

    parent: str  # sha256 of the model folder that is continued
    model: str = field(default="", metadata=MEANS)  # model folder whose weights are loaded first; empty: the base's
    model_sha256: str = ""
    state: str = field(default="", metadata=MEANS)  # checkpoint whose weights, average and Adam's moments come next
    state_digest: str = ""
    step: int = 0  # the steps are counted on from here; 0: a new training, with a new order of the samples
    steps_before: int = field(default=0, metadata=MEANS)  # that the parent was trained for, its own parents' included
    samples_before: int = field(default=0, metadata=MEANS)


@dataclass(frozen=True)
class TrainSpec:
    """One training: addresses and numbers. The defaults are the paper's where it gives them (Section 4.1)."""

    dataset: str
    output: str = field(metadata=MEANS)
    base: str
    model: TripConfig = field(default_factory=TripConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    steps: int = 100_000  # the paper gives no number of steps
    global_batch: int = 32  # nor a batch size; peers use 24 to 64
    # Of the 3D-UNet: all weights, those that mix frames, or low-rank adapters; the fusion module is always trained.
    trained: Literal["all", "temporal", "lora"] = "all"
    lora_rank: int = 32
    lora_alpha: int = 32  # the adapters' product is multiplied with alpha / rank
    learning_rate_unet: float = 2e-6
    learning_rate_fusion: float = 2e-4
    weight_decay: float = 1e-2
    clip_norm: float = 1.0
    warmup_steps: int = 0
    cosine: bool = False  # decay the learning rates to zero over the run
    average_decay: float = 0.0  # exponential moving average of the weights that is exported; 0 is off
    precision: Literal["float32", "bfloat16"] = "float32"  # of the networks' arithmetic; the weights are float32
    held_out_fraction: float = 0.1
    measure_clips: int = 256  # training clips, one window of each, from which the residual's deviation is measured
    sample_posterior: bool = False  # draw latents from the VAE's posterior, of a data set made with keep_logvar
    stored_text: bool = False  # take text features from a data set made with keep_text
    seed: int = 0
    # What is continued, instead of the untrained base; of it, `take` chooses: everything, its trained weights (the
    # average if there is one), or also Adam's moments. `auto` goes on with all of the same training, else the weights.
    start: Start | None = field(default=None, metadata={BEFORE: None})
    take: Literal["auto", "weights", "optimizer"] = field(default="auto", metadata=MEANS | {BEFORE: "auto"})
    validation: ValidationSpec = field(default=ValidationSpec(), metadata=MEANS)
    checkpoint_every: int = field(default=1000, metadata=MEANS)
    tick_every: int = field(default=10, metadata=MEANS)
    # Steps in a trace of torch's profiler, below `profile/` of the output, after two that warm up; 0: no trace.
    profile: int = field(default=0, metadata=MEANS | {BEFORE: 0})
    workers: int = field(default=1, metadata=MEANS)
    # Continue with at least this number when machines are lost; None: wait for all `workers`.
    least_workers: int | None = field(default=None, metadata=MEANS)
    cpus_per_worker: int = field(default=2, metadata=MEANS)
    gpus_per_worker: int = field(default=0, metadata=MEANS)
    # On a Ray cluster: the training outlives the process that started it (`tasks.train.detached_job`).
    detached: bool = field(default=False, metadata=MEANS | {BEFORE: False})
    # Samples of one forward pass on one worker; None: its complete share.
    micro_batch: int | None = field(default=None, metadata=MEANS)
    # A third more computation, for a fraction of the memory.
    recompute_activations: bool = field(default=False, metadata=MEANS)
    # "none": every worker holds the complete state; "fsdp2": a shard, and weights are gathered layer by layer.
    sharding: Literal["none", "fsdp2"] = field(default="none", metadata=MEANS)
    # Hashes of the data set's manifest and of the base's files. Where they are given they take the place of the two
    # addresses in the identity, so that a training survives the move of its data.
    dataset_sha256: str | None = field(default=None, metadata={BEFORE: None})
    base_sha256: str | None = field(default=None, metadata={BEFORE: None})

    @property
    def largest_share(self) -> int:
        """Samples of a global batch on one worker; where the split is uneven, the most."""
        return math.ceil(self.global_batch / self.workers)

    @property
    def samples_per_pass(self) -> int:
        """Samples of one forward pass on one worker."""
        return min(self.micro_batch or self.largest_share, self.largest_share)

    @property
    def sharded(self) -> bool:
        """Whether the training state is sharded over the workers."""
        return self.sharding == "fsdp2" and self.workers > 1


@dataclass(frozen=True)
class TrackingSpec:
    """Where the run is logged in MLflow; an empty `uri` logs nowhere."""

    uri: str = ""
    experiment: str = "trip"
    run_name: str = "train"
    access: MlflowAccess = field(default_factory=MlflowAccess)
    artifact_location: str | None = None  # of a new experiment; None: next to a SQLite file, else the server's choice
    tags: dict[str, str] = field(default_factory=dict)  # of the run, such as the commit and the flow run

    def key(self, spec: TrainSpec) -> str:
        """The key by which a training finds its run again."""
        return f"train-{spec_digest(spec)}"


@dataclass(frozen=True)
class TrainReport:
    """The result of a training; written next to the model as the mark of completion."""

    output: str
    model: str
    step: int
    loss_first: float  # of the first step
    loss_last: float  # exponential moving average over the steps, decay 0.98
    samples_seen: int
    seconds: float
    model_digest: str
    spec_digest: str

    @property
    def exported(self) -> Artifact:
        """The model folder, ready to use."""
        return Artifact(self.model, self.model_digest)


def identity(value: Any, means: bool = True) -> Any:
    """A record as JSON-able data, for a digest; newer fields with their neutral value are left out.

    The metadata of such a field gives the value that its absence means (`trip_model.fusion`), so a training keeps the
    digest that it had before the field existed. Without `means`, fields that are means are left out, too.
    """
    if is_dataclass(value):
        items = [(f, getattr(value, f.name)) for f in fields(value) if means or "means" not in f.metadata]
        return {
            f.name: identity(item, means) for f, item in items if BEFORE not in f.metadata or item != f.metadata[BEFORE]
        }
    if isinstance(value, dict):
        return {name: identity(item, means) for name, item in value.items()}
    return [identity(item, means) for item in value] if isinstance(value, (list, tuple)) else value


def spec_digest(spec: TrainSpec) -> str:
    """The identity of a training: all fields that are not means. Another split of a batch changes the last bits.

    Data and base count by their hashes, if these are given, else by their addresses.
    """
    goals = identity(spec, means=False)
    moved = [name for name in ("dataset", "base") if f"{name}_sha256" in goals]
    return digest({name: value for name, value in goals.items() if name not in moved})


def spool_file(spec: TrainSpec) -> Path:
    """The file of undelivered tracking records: in the output, or in a local cache if the output is remote."""
    output = storage.local_path(spec.output)
    if output is not None:
        return output / SPOOL
    return Path.home() / ".cache" / "trip-i2v" / "tracking" / f"{digest(spec.output)}.jsonl"


_BOUNDS = (
    ("learning_rate_unet", 0.0, math.inf),
    ("learning_rate_fusion", 0.0, math.inf),
    ("weight_decay", 0.0, math.inf),
    ("clip_norm", 0.0, math.inf),
    ("warmup_steps", 0, math.inf),
    ("average_decay", 0.0, 1.0),
    ("held_out_fraction", 0.0, 1.0),
    ("measure_clips", 1, math.inf),
    ("profile", 0, math.inf),
    ("cpus_per_worker", 1, math.inf),
    ("gpus_per_worker", 0, math.inf),
)


def check_spec(spec: TrainSpec) -> None:
    """Raises UserError for invalid values."""
    for name, least in (("steps", 1), ("global_batch", 1), ("workers", 1), ("checkpoint_every", 1), ("tick_every", 1)):
        if getattr(spec, name) < least:
            raise UserError(f"{name} {getattr(spec, name)}, expected at least {least}")
    for name, least, most in _BOUNDS:
        value = getattr(spec, name)
        if not least <= value <= most:
            expected = f"{least:g} to {most:g}" if math.isfinite(most) else f"at least {least:g}"
            raise UserError(f"{name} {value:g}, expected {expected}")
    if not 0 <= spec.objective.text_dropout <= 1:
        raise UserError(f"objective.text_dropout {spec.objective.text_dropout:g}, expected a share from 0 to 1")
    if spec.workers > spec.global_batch:
        raise UserError(
            f"a global batch of {spec.global_batch} leaves some of {spec.workers} workers without a sample;"
            f" give {spec.global_batch} workers at most"
        )
    if spec.least_workers is not None and not 1 <= spec.least_workers <= spec.workers:
        raise UserError(f"least_workers {spec.least_workers}, expected 1 to {spec.workers}, the number of workers")
    if spec.sharding == "fsdp2":
        uneven = [n for n in range(spec.least_workers or spec.workers, spec.workers + 1) if spec.global_batch % n]
        if uneven:
            raise UserError(
                f"sharding 'fsdp2' needs equal shares, and a global batch of {spec.global_batch} cannot be split over"
                f" {uneven[0]} workers evenly; give workers (and least_workers) that divide it"
            )
    if spec.micro_batch is not None and spec.micro_batch < 1:
        raise UserError(f"micro_batch {spec.micro_batch}, expected at least 1 sample")
    for name, least in (("every", 0), ("clips", 1), ("bands", 1), ("animated", 0)):
        if getattr(spec.validation, name) < least:
            raise UserError(f"validation.{name} {getattr(spec.validation, name)}, expected at least {least}")
    if spec.trained == "lora" and (spec.lora_rank < 1 or spec.lora_alpha <= 0):
        raise UserError(f"lora_rank {spec.lora_rank} and lora_alpha {spec.lora_alpha}, expected numbers above 0")
    if spec.trained != "all" and spec.model.condition == "channel":
        raise UserError(
            f"trained {spec.trained!r} leaves the input layer as it is, so the first frame along the channels would"
            " never be seen; train 'all', or take condition 'head'"
        )


def finished_report(spec: TrainSpec) -> TrainReport | None:
    """The report of the finished training of this spec, or None.

    Raises:
        UserError: the output contains the training of another spec.
    """
    address = storage.join(spec.output, REPORT)
    if not storage.exists(address):
        return None
    report = TrainReport(**storage.read_json(address))
    if report.spec_digest != spec_digest(spec):
        raise UserError(f"{spec.output} contains another training ({report.spec_digest}); give another output address")
    return report
