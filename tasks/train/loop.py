"""The training loop (Equation 10, Section 4.1's optimiser), which knows nothing of Ray and runs in any process.

Every random number has an address and the order of samples is a function of the step, so a run that was killed and
continued is bitwise the run that was not.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from infra import storage
from tasks.records import UserError, digest
from tasks.shards import ShardDataset
from tasks.train.checkpoints import CheckpointStore, Tensors, Watcher, optimizer_tensors, restore_optimizer
from tasks.train.loader import TrainingData
from trip_model.checkpoint import config_from_json, save_model
from trip_model.encoders import folder_hash, load_text_encoder, load_vae, resolve_base
from trip_model.model import Trip, TripConfig, base_unet_output, measure_residual_std
from trip_model.objective import ObjectiveConfig, draw, training_loss
from trip_model.schedule import bridged

Tick = Callable[[dict[str, Any]], None]
# Asked on every rank after every step, and must say the same on all: go on, write a checkpoint and go on, or and stop.
Notice = Callable[[], Literal["", "save", "stop"]]
BEST_BY = "validation_loss"  # the checkpoint with the lowest is kept beside the newest ones, once it is measured


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
    learning_rate_unet: float = 2e-6
    learning_rate_fusion: float = 2e-4
    weight_decay: float = 1e-2
    clip_norm: float = 1.0
    warmup_steps: int = 0
    cosine: bool = False  # decay the learning rates to zero over the run
    average_decay: float = 0.0  # exponential moving average of the weights that is exported; 0 is off
    checkpoint_every: int = 1000
    tick_every: int = 10
    held_out_fraction: float = 0.1
    measure_clips: int = 256  # training samples from which the residual's deviation is measured
    sample_posterior: bool = False  # draw latents from the VAE's posterior, of a data set made with keep_logvar
    stored_text: bool = False  # take text features from a data set made with keep_text
    seed: int = 0
    recompute_activations: bool = False  # less memory for a third more work; the same numbers
    workers: int = 1
    cpus_per_worker: int = 2
    gpus_per_worker: int = 0


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


class TrainingStopped(UserError):
    """A training that was told to stop has written a checkpoint and stopped; the same command continues it."""


def spec_digest(spec: TrainSpec) -> str:
    """The identity of what a spec trains: everything but where it is put and how it is spread over machines."""
    neutral = asdict(replace(spec, output="", workers=1, cpus_per_worker=1, gpus_per_worker=0, tick_every=1))
    later = ("sample_posterior", "stored_text", "recompute_activations")
    return digest({name: value for name, value in neutral.items() if value or name not in later})


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


def learning_rate_factor(step: int, spec: TrainSpec) -> float:
    """What both learning rates are multiplied with at a step: linear warm-up, then constant or cosine."""
    warm = min(1.0, (step + 1) / spec.warmup_steps) if spec.warmup_steps else 1.0
    if not spec.cosine:
        return warm
    through = max(0, step - spec.warmup_steps) / max(1, spec.steps - spec.warmup_steps)
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, through)))


def make_optimizer(model: Trip, spec: TrainSpec) -> torch.optim.AdamW:
    """AdamW with the paper's two learning rates: 2e-6 for the 3D-UNet and 2e-4 for TNF."""
    groups: list[dict[str, Any]] = [{"params": list(model.unet.parameters()), "base_lr": spec.learning_rate_unet}]
    if model.fusion is not None:
        groups.append({"params": list(model.fusion.parameters()), "base_lr": spec.learning_rate_fusion})
    return torch.optim.AdamW(groups, lr=spec.learning_rate_unet, weight_decay=spec.weight_decay, fused=True)


def run_training(
    spec: TrainSpec,
    rank: int = 0,
    world: int = 1,
    device: str = "cpu",
    on_tick: Tick | None = None,
    watcher: Watcher | None = None,
    notice: Notice | None = None,
) -> TrainReport:
    """Trains to `spec.steps`, from the newest complete checkpoint if there is one; rank 0 writes.

    `on_tick` gets {"step", "steps", "loss", "frame_1", "frame_last", "learning_rate", "samples_per_second",
    "seconds_left"} every `tick_every` steps, averaged since the last one. With `world` above 1 a process group exists.
    `watcher` follows the checkpoints, `notice` asks for one between the regular ones.

    Raises:
        TrainingStopped: `notice` said "stop"; the checkpoint is written.
    """
    done = finished_report(spec)
    if done is not None:
        return done
    with CheckpointStore(storage.join(spec.output, "checkpoints"), best=BEST_BY, watcher=watcher) as checkpoints:
        return _train(spec, checkpoints, rank, world, device, on_tick, notice)


def _train(
    spec: TrainSpec,
    checkpoints: CheckpointStore,
    rank: int,
    world: int,
    device: str,
    on_tick: Tick | None,
    notice: Notice | None,
) -> TrainReport:
    started = time.monotonic()
    dataset = ShardDataset(spec.dataset)
    base = resolve_base(spec.base)
    data = TrainingData(
        dataset, spec.held_out_fraction, spec.seed, spec.model.num_frames, spec.sample_posterior, spec.stored_text
    )
    made_by = dataset.published.recipe.get("text_encoder_sha256")
    if spec.stored_text and made_by != folder_hash(base, "text_encoder"):
        raise UserError(f"the stored text of {spec.dataset} is not by the text encoder of {base}; train without it")
    resumed = checkpoints.newest()
    if resumed is not None and resumed.facts["spec_digest"] != spec_digest(spec):
        raise UserError(f"{checkpoints.uri} holds checkpoints of another training; give another output address")

    vae: Any = load_vae(base)
    scaling = float(vae.config.scaling_factor)
    text = load_text_encoder(base, device)
    empty_text = text.encode(text.tokenize([""]))
    if resumed is not None:
        config = config_from_json(resumed.facts["config"])
    else:
        z_0 = data.first_latents(spec.measure_clips).permute(0, 2, 1, 3, 4) * scaling
        config = replace(
            spec.model,
            residual_std=measure_residual_std(z_0),
            unet_output=base_unet_output(base),
            schedule=bridged(spec.model.schedule, base),
        )
    torch.manual_seed(spec.seed)  # the fusion module's first weights
    trip = Trip.from_base(base, config).to(device).train()
    trip.unet.recompute_activations = spec.recompute_activations
    trained = dict(trip.named_parameters())
    optimizer = make_optimizer(trip, spec)
    average = {name: p.detach().clone() for name, p in trained.items()} if spec.average_decay else {}
    first_step, losses = 0, _Losses()
    if resumed is not None:
        trip.load_state_dict(resumed.parts["weights"])
        restore_optimizer(optimizer, resumed.parts["optimizer"])
        average = {name: resumed.parts["average"][name].to(device) for name in average}
        first_step = resumed.step
        losses.first = resumed.facts["loss_first"]
        losses.last = resumed.facts["loss_last"]
    model: nn.Module = nn.parallel.DistributedDataParallel(trip) if world > 1 else trip

    def checkpoint(step: int) -> None:
        parts: dict[str, Tensors] = {"weights": dict(trip.state_dict()), "optimizer": optimizer_tensors(optimizer)}
        facts = {"spec_digest": spec_digest(spec), "config": asdict(config)}
        facts |= {"loss_first": losses.first, "loss_last": losses.last}
        checkpoints.save(step, parts | ({"average": average} if average else {}), facts, {"loss": losses.last})

    tick_time, tick_step = time.monotonic(), first_step
    for step in range(first_step, spec.steps):
        batch = data.batch(step, spec.global_batch, rank, world)
        z_0 = (batch.raw_latents_BFCHW.permute(0, 2, 1, 3, 4) * scaling).to(device)
        drawn = draw(
            spec.seed, step, batch.positions, spec.global_batch, z_0.shape[1:],
            config.schedule.num_train_timesteps, spec.objective.text_dropout,
        )  # fmt: skip
        torch.manual_seed(_dropout_seed(spec.seed, step, rank))
        text_BLD = text.encode(batch.tokens_BL) if batch.text_BLD is None else batch.text_BLD.to(device)
        loss, error_BF = training_loss(model, z_0, text_BLD, empty_text, drawn, spec.objective)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}; lower the learning rates")
        factor = learning_rate_factor(step, spec)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trip.parameters(), spec.clip_norm)
        optimizer.step()
        if average:
            # A young average forgets faster, so that the first weights do not linger in a short run.
            keep = min(spec.average_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.values()), [p.detach() for p in trained.values()], 1 - keep)
        losses.add(loss.item(), error_BF)

        finished = step + 1 == spec.steps
        if rank == 0 and on_tick is not None and ((step + 1) % spec.tick_every == 0 or finished):
            seconds = max(time.monotonic() - tick_time, 1e-9)
            steps_per_second = (step + 1 - tick_step) / seconds
            on_tick(
                losses.take()
                | {
                    "step": step + 1,
                    "steps": spec.steps,
                    "learning_rate": spec.learning_rate_fusion * factor,
                    "samples_per_second": steps_per_second * spec.global_batch,
                    "seconds_left": (spec.steps - step - 1) / steps_per_second,
                }
            )
            tick_time, tick_step = time.monotonic(), step + 1
        asked = notice() if notice is not None else ""
        if rank == 0 and (asked or finished or (step + 1) % spec.checkpoint_every == 0):
            checkpoint(step + 1)
        if asked == "stop" and not finished:
            checkpoints.wait()
            raise TrainingStopped(f"stopped at step {step + 1} of {spec.steps} as told; the same command continues")

    checkpoints.wait()
    report = TrainReport(
        output=spec.output,
        model=storage.join(spec.output, "model"),
        step=spec.steps,
        loss_first=losses.first,
        loss_last=losses.last,
        samples_seen=spec.steps * spec.global_batch,
        seconds=time.monotonic() - started,
        model_digest="",
        spec_digest=spec_digest(spec),
    )
    if rank == 0:
        if average:
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(average[name])
        report = _export(spec, trip, base, dataset, report)
    return report


class _Losses:
    """Running means between ticks, and the first and last of them."""

    def __init__(self) -> None:
        self.first, self.last = math.nan, math.nan
        self._sum: dict[str, float] = {}
        self._count = 0

    def add(self, loss: float, error_BF: torch.Tensor) -> None:
        by_frame = error_BF.mean(dim=0)
        values = {"loss": loss, "frame_1": by_frame[0].item(), "frame_last": by_frame[-1].item()}
        self._sum = {name: self._sum.get(name, 0.0) + value for name, value in values.items()}
        self._count += 1
        self.first = loss if math.isnan(self.first) else self.first
        self.last = loss if math.isnan(self.last) else 0.98 * self.last + 0.02 * loss

    def take(self) -> dict[str, Any]:
        means = {name: value / self._count for name, value in self._sum.items()}
        self._sum, self._count = {}, 0
        return means


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    return int(digest(["dropout", seed, step, rank]), 16) & (2**63 - 1)


def _export(spec: TrainSpec, trip: Trip, base: Path, dataset: ShardDataset, report: TrainReport) -> TrainReport:
    """Writes the model folder, then the report as the mark of completion."""
    provenance = {
        "dataset": spec.dataset,
        "dataset_manifest_sha256": dataset.manifest_sha256,
        "base_sha256": folder_hash(base),
        "spec_digest": spec_digest(spec),
        "steps": spec.steps,
        "seed": spec.seed,
        **({"latents": "drawn from the posterior"} if spec.sample_posterior else {}),
    }
    spool = Path(tempfile.mkdtemp(prefix="trip-export-"))
    try:
        folder = save_model(spool / "model", trip, base, provenance)
        report = replace(report, model_digest=folder_hash(folder))
        storage.delete(report.model)
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            storage.upload_file(path, storage.join(report.model, *path.relative_to(folder).parts))
        storage.write_json(storage.join(spec.output, "report.json"), asdict(report))
    finally:
        shutil.rmtree(spool)
    return report
