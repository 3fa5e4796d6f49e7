"""What a training is asked for, what it answers, and what tells one training from another."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

from infra import storage
from tasks.records import UserError, digest
from trip_model.model import TripConfig
from trip_model.objective import ObjectiveConfig


@dataclass(frozen=True)
class ValidationSpec:
    """What is looked at while training goes on. It changes nothing in the training."""

    every: int = 0  # steps between two looks; 0 is never
    clips: int = 32  # held-out clips whose loss is measured, each in every band of time steps
    bands: int = 5
    animated: int = 2  # of those, clips that are animated, for the motion ratio and to look at


@dataclass(frozen=True)
class TrainSpec:
    """One training, by addresses and numbers. The defaults are the paper's where it gives them (Section 4.1)."""

    dataset: str
    output: str
    base: str
    model: TripConfig = field(default_factory=TripConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    steps: int = 100_000  # the paper gives no number of steps
    global_batch: int = 32  # nor a batch size; peers use 24 to 64
    trained: Literal["all", "temporal"] = "all"  # of the 3D-UNet; the fusion module is always trained
    learning_rate_unet: float = 2e-6
    learning_rate_fusion: float = 2e-4
    weight_decay: float = 1e-2
    clip_norm: float = 1.0
    warmup_steps: int = 0
    cosine: bool = False  # decay the learning rates to zero over the run
    average_decay: float = 0.0  # exponential moving average of the weights that is exported; 0 is off
    precision: Literal["float32", "bfloat16"] = "float32"  # of the networks' arithmetic; the weights are float32
    held_out_fraction: float = 0.1
    measure_clips: int = 256  # training samples from which the residual's deviation is measured
    sample_posterior: bool = False  # draw latents from the VAE's posterior, of a data set made with keep_logvar
    stored_text: bool = False  # take text features from a data set made with keep_text
    seed: int = 0
    # From here on: means, which do not change what is trained.
    validation: ValidationSpec = ValidationSpec()
    checkpoint_every: int = 1000
    tick_every: int = 10
    workers: int = 1
    least_workers: int | None = None  # go on with as few when machines are lost; None: wait for all of `workers`
    cpus_per_worker: int = 2
    gpus_per_worker: int = 0
    micro_batch: int | None = None  # samples of one forward pass on one worker; None: all of its share
    recompute_activations: bool = False  # a third more work for a fraction of the memory


MEANS = (
    "output",
    "validation",
    "checkpoint_every",
    "tick_every",
    "workers",
    "least_workers",
    "cpus_per_worker",
    "gpus_per_worker",
    "micro_batch",
    "recompute_activations",
)


@dataclass(frozen=True)
class TrainReport:
    """What a training made; written beside the model as the mark of completion."""

    output: str
    model: str
    step: int
    loss_first: float
    loss_last: float
    samples_seen: int
    seconds: float
    model_digest: str
    spec_digest: str


def spec_digest(spec: TrainSpec) -> str:
    """The identity of what a spec trains: everything but its means. Another split of a batch changes the last bits."""
    return digest({name: value for name, value in asdict(spec).items() if name not in MEANS})


def check_spec(spec: TrainSpec) -> None:
    """Raises UserError for numbers that no training can have."""
    for name, least in (("steps", 1), ("global_batch", 1), ("workers", 1), ("checkpoint_every", 1), ("tick_every", 1)):
        if getattr(spec, name) < least:
            raise UserError(f"{name} {getattr(spec, name)}, expected at least {least}")
    if spec.workers > spec.global_batch:
        raise UserError(
            f"a global batch of {spec.global_batch} leaves some of {spec.workers} workers without a sample;"
            f" give {spec.global_batch} workers at most"
        )
    if spec.least_workers is not None and not 1 <= spec.least_workers <= spec.workers:
        raise UserError(f"least_workers {spec.least_workers}, expected 1 to {spec.workers}, the number of workers")
    if spec.micro_batch is not None and spec.micro_batch < 1:
        raise UserError(f"micro_batch {spec.micro_batch}, expected at least 1 sample")
    for name in ("every", "clips", "bands", "animated"):
        if getattr(spec.validation, name) < (name in ("clips", "bands")):
            raise UserError(f"validation.{name} {getattr(spec.validation, name)}, expected a number above 0")


def finished_report(spec: TrainSpec) -> TrainReport | None:
    """The report of a completed training of this very spec, or None.

    Raises:
        UserError: the output holds the training of another spec.
    """
    address = storage.join(spec.output, "report.json")
    if not storage.exists(address):
        return None
    report = TrainReport(**storage.read_json(address))
    if report.spec_digest != spec_digest(spec):
        raise UserError(f"{spec.output} holds another training ({report.spec_digest}); give another output address")
    return report
