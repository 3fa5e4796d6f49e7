"""The training loop (Equation 10, Section 4.1's optimiser), independent of Ray.

Every random number has an address and the order of samples is a function of the step, so a run that was killed and
resumed equals an uninterrupted run bitwise.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from torch import nn

from infra import storage
from tasks.records import UserError, digest
from tasks.shards import ShardDataset
from tasks.train.ahead import ReadAhead, StepInput
from tasks.train.checkpoints import (
    Checkpoint,
    CheckpointListener,
    CheckpointStore,
    Tensors,
    optimizer_tensors,
    restore_optimizer,
)
from tasks.train.export import export
from tasks.train.initial import initial_model, initial_state, parent_config
from tasks.train.loader import TrainingData, share
from tasks.train.optimizer import MovingAverage, choose_trained, learning_rate_factor, make_optimizer, trained_weights
from tasks.train.profiling import peak_memory_bytes, profiler
from tasks.train.sharding import full_tensor, full_tensors, shard, shard_like
from tasks.train.spec import TrainReport, TrainSpec, check_spec, finished_report, spec_digest
from tasks.train.utilisation import clip_flops, matmul_flops_per_second
from tasks.train.validation import LOSS, Validation, ValidationResult
from trip_model.checkpoint import config_from_json
from trip_model.config import TripConfig
from trip_model.encoders import load_text_encoder, load_vae
from trip_model.folders import resolve_base
from trip_model.images import video_bytes
from trip_model.model import base_unet_output, measure_residual_std
from trip_model.objective import draw, training_loss
from trip_model.schedule import to_base_schedule

Tick = Callable[[dict[str, Any]], None]
# Called on every rank after every step, with the same result on all: continue, checkpoint and continue, or checkpoint
# and stop.
ControlSignal = Callable[[], Literal["", "save", "stop"]]


class TrainingStopped(UserError):
    """The training was stopped and has written a checkpoint; the same command continues it."""


def run_training(
    spec: TrainSpec,
    rank: int = 0,
    world: int = 1,
    device: str = "cpu",
    on_tick: Tick | None = None,
    listener: CheckpointListener | None = None,
    control: ControlSignal | None = None,
) -> TrainReport:
    """Trains to `spec.steps`, from the newest complete checkpoint if there is one; rank 0 writes.

    With `world` above 1 a process group must exist.

    Args:
        spec: the training.
        rank: of this worker, 0 to world - 1.
        world: number of workers.
        device: as torch names it.
        on_tick: called every `tick_every` steps with "step", "steps", "seconds_left", the means of "loss", "frame_1"
            and "frame_last" since the last tick, and of the last step "grad_norm" (before clipping), "lr_unet" and
            "lr_fusion" (if there is a fusion module). Since the last tick, without validations: "samples_per_second",
            "samples_per_second_device" (of one worker), "mfu", the share of the device's matmul peak, both measured
            (`tasks.train.utilisation`), and "data_wait", the share of the time in which rank 0 waited for its batches.
            "peak_memory_gb" is rank 0's since its start: allocated on its GPU, or resident in GB (1e9 bytes).
            "damaged" counts skipped samples, if there are any. After a validation the tick has its metrics, too.
        listener: called for every checkpoint.
        control: requests a checkpoint between the regular ones, or a stop.

    Raises:
        UserError: an invalid spec.
        TrainingStopped: `control` returned "stop"; the checkpoint is written.
    """
    done = finished_report(spec)
    if done is not None:
        return done
    check_spec(spec)
    started = time.monotonic()
    with CheckpointStore(storage.join(spec.output, "checkpoints"), best=LOSS, listener=listener) as checkpoints:
        training = Training(spec, rank, world, device, checkpoints.newest())
        training.run(checkpoints, on_tick or (lambda _: None), control)
        checkpoints.wait()
    report = TrainReport(
        output=spec.output,
        model=storage.join(spec.output, "model"),
        step=spec.steps,
        loss_first=training.losses.first,
        loss_last=training.losses.last,
        samples_seen=spec.steps * spec.global_batch,
        seconds=time.monotonic() - started,
        model_digest="",
        spec_digest=spec_digest(spec),
    )
    trained = training.trained_tensors()
    if rank != 0:
        return report
    return export(spec, training.dataset, training.base, training.trip.config, trained, report)


class Training:
    """One rank's part of a training: the model, its optimiser and the data.

    Raises:
        UserError: the data set or the checkpoint does not belong to this spec.
    """

    def __init__(self, spec: TrainSpec, rank: int, world: int, device: str, resumed: Checkpoint | None) -> None:
        if resumed is not None and resumed.facts["spec_digest"] != spec_digest(spec):
            raise UserError(f"{spec.output} contains checkpoints of another training; give another output address")
        self.spec, self._rank, self._world, self._device = spec, rank, world, device
        self.dataset = ShardDataset(spec.dataset)
        self.base = resolve_base(spec.base)
        self._text = load_text_encoder(self.base, device)
        self._data = TrainingData(
            self.dataset,
            spec.held_out_fraction,
            spec.seed,
            spec.model.num_frames,
            spec.sample_posterior,
            spec.stored_text,
            self._text.vocab_size,
            storage.join(spec.output, "quarantine"),
        )
        vae: Any = load_vae(self.base)
        self._scaling = float(vae.config.scaling_factor)
        self._empty_text = self._text.encode(self._text.tokenize([""]))
        state = resumed or initial_state(spec.start)
        if resumed is not None:
            config = config_from_json(resumed.facts["config"])
        else:
            config = self._new_config(parent_config(spec.start, state))
        torch.manual_seed(spec.seed)  # initialises the fusion module and adapters
        self.trip = initial_model(spec, self.base, config).train()
        self.trip.unet.recompute_activations = spec.recompute_activations
        choose_trained(self.trip, spec)
        self.trip.to(device)
        self._sharded = spec.sharding == "fsdp2" and world > 1
        if self._sharded:
            shard(self.trip, device, world, spec.precision == "bfloat16")
        self._trained = trained_weights(self.trip)
        self._optimizer = make_optimizer(self.trip, spec)
        self.average = MovingAverage(self._trained, spec.average_decay)
        self.losses = _Losses()
        self._grad_norm = torch.tensor(math.nan)
        self._unsettled: list[torch.Tensor] = []
        self._latent_shapes: Counter[torch.Size] = Counter()  # of one clip, by steps since the last tick
        self._step = 0
        if state is not None:
            self._restore(state)
        here = torch.tensor(self._step, dtype=torch.float64, device=device)
        if self._over_ranks(here.clone()) != here:
            raise RuntimeError(f"rank {rank} of {world} resumes from step {self._step}, other ranks from another step")
        copies = world > 1 and not self._sharded
        # Gradients are views of what is sent, and no buffers differ between ranks: the model has none.
        self._model: nn.Module = (
            nn.parallel.DistributedDataParallel(self.trip, gradient_as_bucket_view=True, broadcast_buffers=False)
            if copies
            else self.trip
        )
        self._share = len(share(spec.global_batch, rank, world))
        self._micro = min(spec.micro_batch or self._share, self._share)
        self._validation: Validation | None = None
        if spec.validation.every and (rank == 0 or self._sharded):  # all ranks of a sharded model
            self._validation = Validation(spec.validation, self._data, vae, self._text, self._micro, device)

    def _new_config(self, parent: TripConfig | None) -> TripConfig:
        """The model's configuration. A trained model keeps the deviations of the residual that it was trained with."""
        model = self.spec.model
        if parent is not None and parent.num_frames == model.num_frames:
            residual_std = parent.residual_std
        else:
            raw = self._data.measured_latents(self.spec.measure_clips)
            residual_std = measure_residual_std(*(z.permute(0, 2, 1, 3, 4) * self._scaling for z in raw))
        return replace(
            model,
            residual_std=residual_std,
            unet_output=base_unet_output(self.base),
            schedule=to_base_schedule(model.schedule, self.base),
        )

    def run(self, checkpoints: CheckpointStore, on_tick: Tick, control: ControlSignal | None) -> None:
        """Runs the remaining steps, with ticks, validations and checkpoints."""
        spec = self.spec
        with (
            profiler(spec, self._rank, self._device) as profile,
            ReadAhead(self._read, self._step, spec.steps) as ahead,
        ):
            clock = _Clock(self._step)
            while self._step < spec.steps:
                with clock.waiting():
                    given = ahead.take()
                self._train_step(given)
                if profile is not None:
                    profile.step()
                step, finished = self._step, self._step == spec.steps
                validate = spec.validation.every > 0 and (step % spec.validation.every == 0 or finished)
                if step % spec.tick_every == 0 or finished or validate:
                    self._settle()
                metrics: dict[str, float] = {}
                if self._validation is not None and validate:
                    with clock.stopped(), self.average.applied():
                        result = self._validation.validate(self.trip)
                    if self._rank == 0:
                        self._write_clips(result)
                    metrics = result.metrics
                if self._rank == 0 and (step % spec.tick_every == 0 or finished or metrics):
                    on_tick(self._tick(clock, metrics))
                    clock = _Clock(step)
                request = control() if control is not None else ""
                if request or finished or step % spec.checkpoint_every == 0:
                    self._settle()
                    parts = self._parts()
                    if self._rank == 0:
                        checkpoints.save(step, parts, self._facts(), {"loss": self.losses.last} | metrics)
                if request == "stop" and not finished:
                    checkpoints.wait()
                    raise TrainingStopped(
                        f"stopped at step {step} of {spec.steps} on request; the same command continues"
                    )

    def _tick(self, clock: _Clock, metrics: dict[str, float]) -> dict[str, Any]:
        """The numbers of the steps since the last tick."""
        spec, step = self.spec, self._step
        with clock.stopped():
            shapes, text_shape = self._latent_shapes, (self._text.length, self._text.width)
            flops = sum(clip_flops(self.trip, spec, shape, text_shape) * n for shape, n in shapes.items())
            flops /= shapes.total()
            self._latent_shapes = Counter()
            peak = matmul_flops_per_second(self._device, spec.precision)
        steps_per_second = (step - clock.first_step) / clock.seconds()
        damaged = self._data.damaged
        return (
            self.losses.take()
            | metrics
            | ({"damaged": damaged} if damaged else {})
            | {f"lr_{group['name']}": group["lr"] for group in self._optimizer.param_groups}
            | {
                "step": step,
                "steps": spec.steps,
                "grad_norm": self._grad_norm.item(),
                "samples_per_second": steps_per_second * spec.global_batch,
                "samples_per_second_device": steps_per_second * spec.global_batch / self._world,
                "mfu": steps_per_second * spec.global_batch / self._world * flops / peak,
                "data_wait": clock.waited / clock.seconds(),
                "peak_memory_gb": peak_memory_bytes(self._device) / 1e9,
                "seconds_left": (spec.steps - step) / steps_per_second,
            }
        )

    def _read(self, step: int) -> StepInput:
        """This rank's share of a global batch and its draws; runs in a thread, ahead of the step."""
        spec = self.spec
        batch = self._data.batch(step, spec.global_batch, self._rank, self._world)
        _, frames, channels, height, width = batch.raw_latents_BFCHW.shape
        drawn = draw(
            spec.seed, step, batch.positions, spec.global_batch, (channels, frames, height, width),
            self.trip.config.schedule.num_train_timesteps, spec.objective.text_dropout,
        )  # fmt: skip
        given = StepInput.of(batch, self._scaling, drawn)
        return given.pinned() if self._device.startswith("cuda") else given

    def _train_step(self, given: StepInput) -> None:
        """One step on one global batch: the gradients of this rank's share, clipping, the update and the average.

        Nothing in it waits for the device: what is computed for the log stays there until `_settle`.
        """
        spec, step = self.spec, self._step
        factor = learning_rate_factor(step, spec)
        for group in self._optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self._optimizer.zero_grad(set_to_none=True)
        self._latent_shapes[given.z_0_BCFHW.shape[1:]] += 1
        intact_B, given = given.intact_B, given.to(self._device)
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        errors = []
        parts = torch.arange(self._share).split(self._micro)
        for number, part in enumerate(parts):
            # A damaged sample has no term in the mean over the global batch. All ranks make the same number of passes:
            # a part without an intact sample passes one row of zeros with weight zero.
            intact = part[intact_B[part]]
            rows: Any = slice(int(part[0]), int(part[-1]) + 1)
            if len(intact) < len(part):
                rows = (intact if len(intact) else part[:1]).to(self._device)
            torch.manual_seed(_dropout_seed(spec.seed, step, self._rank, number))
            with self._between_ranks(last=number + 1 == len(parts)):
                text = given.text[rows]
                loss, error_BF = training_loss(
                    self._model,
                    given.z_0_BCFHW[rows],
                    text if spec.stored_text else self._text.encode(text),
                    self._empty_text,
                    given.drawn.part(rows),
                    spec.objective,
                    torch.bfloat16 if spec.precision == "bfloat16" else None,
                )
                # Gradients are averaged over ranks, and their shares of the batch may differ by a sample.
                weight = len(intact) * self._world / spec.global_batch
                loss = loss * weight
                loss.backward()
            total += loss.detach()
            errors.append(error_BF.mean(dim=0) * weight)
        damaged = torch.full_like(total, len(intact_B) - int(intact_B.sum()))
        self._unsettled.append(torch.cat([total[None], damaged[None], torch.stack(errors).sum(dim=0).double()]))
        grad_norm = torch.nn.utils.clip_grad_norm_(self._trained.values(), spec.clip_norm)
        self._grad_norm = full_tensor(grad_norm)
        self._optimizer.step()
        self.average.update(step)
        self._step = step + 1

    def _settle(self) -> None:
        """Reads the losses of the steps since the last call from the device; all ranks call it after the same step.

        Raises:
            FloatingPointError: a loss is not finite. No checkpoint has been written since.
        """
        if not self._unsettled:
            return
        rows = self._over_ranks(torch.stack(self._unsettled)).tolist()
        self._unsettled = []
        for step, (total, _, *by_frame) in enumerate(rows, self._step - len(rows)):
            if not math.isfinite(total):
                raise FloatingPointError(f"the loss is {total} at step {step}; lower the learning rates")
            self.losses.add(total, by_frame)
        if self._rank == 0 and any(damaged for _, damaged, *_ in rows):
            self._data.refresh_damaged()  # the sample may be another rank's

    def _over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Means over all ranks, bitwise equal on each rank."""
        if self._world > 1:
            torch.distributed.all_reduce(values)
            values = values / self._world
        return values

    def _between_ranks(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are averaged over the ranks once per step, with the last part of the batch."""
        if isinstance(self._model, nn.parallel.DistributedDataParallel) and not last:
            return self._model.no_sync()
        return contextlib.nullcontext()

    def trained_tensors(self) -> Tensors:
        """The trained weights to export: the average if there is one. A collective; rank 0 gets them."""
        return full_tensors(self.average.tensors or self._trained, keep=self._rank == 0)

    def _parts(self) -> dict[str, Tensors]:
        """The tensors of a checkpoint. Frozen weights are in the base and not written again."""
        parts = {"weights": self._trained, "optimizer": optimizer_tensors(self._optimizer)}
        if self.average.tensors:
            parts["average"] = self.average.tensors
        return {name: full_tensors(tensors, keep=self._rank == 0) for name, tensors in parts.items()}

    def _facts(self) -> dict[str, Any]:
        return {
            "spec_digest": spec_digest(self.spec),
            "config": asdict(self.trip.config),
            "losses": self.losses.state(),
        }

    def _restore(self, state: Checkpoint) -> None:
        weights = state.parts["weights"]
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(shard_like(weights[name], parameter))
        restore_optimizer(self._optimizer, state.parts["optimizer"])
        self.average.restore(state.parts.get("average", weights))
        self._step = state.step
        if "losses" in state.facts:
            self.losses.restore(state.facts["losses"])

    def _write_clips(self, result: ValidationResult) -> None:
        """Writes `samples/step-00000200-KEY.mp4` below the output."""
        for key, pixels in result.clips.items():
            name = f"step-{self._step:08d}-{key}.mp4"
            content = video_bytes(pixels, self.trip.config.fps, "mp4")
            storage.write_bytes(storage.join(self.spec.output, "samples", name), content)


class _Losses:
    """Means since the last tick; the loss of the first step, and its exponential moving average (decay 0.98)."""

    def __init__(self) -> None:
        self.first, self.last = math.nan, math.nan
        self._sum: dict[str, float] = {}
        self._count = 0

    def add(self, loss: float, by_frame: list[float]) -> None:
        values = {"loss": loss, "frame_1": by_frame[0], "frame_last": by_frame[-1]}
        self._sum = {name: self._sum.get(name, 0.0) + value for name, value in values.items()}
        self._count += 1
        self.first = loss if math.isnan(self.first) else self.first
        self.last = loss if math.isnan(self.last) else 0.98 * self.last + 0.02 * loss

    def take(self) -> dict[str, Any]:
        means = {name: value / self._count for name, value in self._sum.items()}
        self._sum, self._count = {}, 0
        return means

    def state(self) -> dict[str, Any]:
        """The state in a checkpoint. With the sums, the first tick after a resume is a mean over all of its steps."""
        return {"first": self.first, "last": self.last, "sum": self._sum, "count": self._count}

    def restore(self, state: dict[str, Any]) -> None:
        self.first, self.last, self._sum, self._count = (state[name] for name in ("first", "last", "sum", "count"))


class _Clock:
    """Training time since a step, and how much of it was spent on waiting for data."""

    def __init__(self, first_step: int) -> None:
        self.first_step, self.waited = first_step, 0.0
        self._begin = time.monotonic()

    def seconds(self) -> float:
        return max(time.monotonic() - self._begin, 1e-9)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self.waited += time.monotonic() - begin

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Does not count the time inside the block, such as that of a validation."""
        begin = time.monotonic()
        yield
        self._begin += time.monotonic() - begin


def _dropout_seed(seed: int, step: int, rank: int, part: int) -> int:
    return int(digest(["dropout", seed, step, rank, part]), 16) & (2**63 - 1)
