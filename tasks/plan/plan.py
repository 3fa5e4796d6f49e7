"""From the numbers of a recipe to its plan: what fits, how long it takes, what it stores, what it costs.

Everything is computed from the model's own shapes; the few numbers that were measured or published stand below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tasks.plan.base import BaseConfig, read_base
from tasks.plan.counting import ModelCounts, count_model, count_text, count_vae
from tasks.plan.hardware import Device, find_device
from tasks.plan.memory import MemoryPlan, plan_memory
from tasks.plan.units import duration, size, work
from tasks.records import UserError
from trip_model.model import TripConfig

CLIP_BYTES = 2.15e6  # an mp4 of WebVid: 984 clips are 2.115 GB (iejMac/video2dataset#336)
CLIP_SECONDS = 17.5  # the mean of WebVid
# To 256 pixels from a 596 x 336 H.264 clip of 15 s, PyAV, one core: best, worst.
DECODE_SECONDS = {"windows": (0.057, 0.129), "track": (0.3, 0.55)}
PNG_SHARE = 0.31  # of the raw bytes of a first frame; 25 real clips at 256 pixels: 0.27 to 0.36 (10 to 90 %)
SAMPLE_EXTRAS_BYTES = 7000  # caption, provenance, headers, padding and index, as a data set of the demo has them
ADAMW_BYTES = 28  # read and written for each parameter: four values in, three out, float32


@dataclass(frozen=True)
class PlanSpec:
    """What a plan is asked about. `clips` None leaves out what depends on the data."""

    base: str
    model: TripConfig
    steps: int
    global_batch: int
    workers: int  # GPUs, or CPU workers
    device: str
    cores: int = 1  # of one CPU worker
    average: bool = False
    checkpoints_kept: int = 2
    clips: int | None = None
    clips_are: Literal["linked", "drawn", "prepared"] = "linked"  # links to videos, drawn on the spot, latents already
    stored: Literal["windows", "track"] = "windows"
    windows_per_clip: int = 1
    keep_pixels: bool = False
    keep_logvar: bool = False
    keep_text: bool = False
    prepare_cores: int = 1  # all workers of the prepare stage together
    longest_track: int = 240  # frames
    price: float | None = None  # USD for an hour of one GPU
    mfu: float | None = None  # share of the device's peak, instead of the table's
    gbit: float = 1.0  # download, Gbit/s

    @property
    def samples(self) -> int:
        """Of the data set: windows, or a track for each clip."""
        return (self.clips or 0) * (1 if self.stored == "track" else self.windows_per_clip)

    @property
    def sample_frames(self) -> int:
        """Frames that a sample stores."""
        if self.stored == "windows":
            return self.model.num_frames
        return min(self.longest_track, round(CLIP_SECONDS * self.model.fps))


@dataclass(frozen=True)
class Row:
    """One number of the plan with its arithmetic or its source. Units: B, s, FLOP, FLOP/s, USD, or a word."""

    part: str
    quantity: str
    value: float | None
    unit: str
    how: str


@dataclass(frozen=True)
class Plan:
    """The plan: what to know first, then every number."""

    fits: bool
    verdict: tuple[str, ...]
    rows: tuple[Row, ...]


def make_plan(spec: PlanSpec) -> Plan:
    """Computes a plan; the model is built on fake tensors, half a minute for the paper's.

    Raises:
        UserError: a number that no run could start with. BaseFolderError: a base without readable shapes.
    """
    _check(spec)
    device = find_device(spec.device, spec.workers, spec.cores)
    base, gpu = read_base(spec.base), spec.device != "cpu"
    counts = count_model(base, spec.model, gpu)
    text_parameters, text_flops = count_text(base)
    vae_parameters, vae_flops = count_vae(base, spec.model.size)
    share = spec.global_batch // spec.workers
    memory = plan_memory(counts, text_parameters, device, share, spec.workers, spec.average)

    rows = _model_rows(counts, text_flops, base.source, gpu) + _memory_rows(spec, device, counts, memory)
    flops = (counts.recomputed_flops if memory.recompute else counts.flops) + text_flops
    training, train_seconds, least_seconds = _training(spec, device, flops, counts.parameters)
    rows += training
    open_clips = spec.clips and spec.clips_are != "prepared"
    preparing, prepare_seconds = _preparing(spec, device, vae_flops) if open_clips else ([], 0.0)
    rows += preparing + _storage(spec, base, counts.parameters, text_parameters + vae_parameters)
    rows += _cost(spec, train_seconds, prepare_seconds)
    return Plan(bool(memory.micro_batch), _verdict(spec, device, memory, train_seconds, least_seconds), tuple(rows))


def _check(spec: PlanSpec) -> None:
    for name, least in (("workers", 1), ("steps", 1), ("global_batch", 1), ("clips", 1)):
        value = getattr(spec, name)
        if value is not None and value < least:
            raise UserError(f"{name} {value}, expected at least {least}")
    if spec.mfu is not None and not 0 < spec.mfu <= 1:
        raise UserError(f"mfu {spec.mfu}, expected a share of the peak above 0 and at most 1")
    for name in ("gbit", "price"):
        value = getattr(spec, name)
        if value is not None and not value > 0:
            raise UserError(f"{name} {value}, expected a number above 0")
    if spec.global_batch % spec.workers:
        divisors = [n for n in range(1, spec.global_batch + 1) if spec.global_batch % n == 0]
        raise UserError(
            f"a global batch of {spec.global_batch} cannot be split over {spec.workers} workers evenly;"
            f" it can over {', '.join(map(str, divisors))}"
        )


def _model_rows(counts: ModelCounts, text_flops: int, source: str, gpu: bool) -> list[Row]:
    dtype = "bfloat16 autocast" if gpu else "float32"
    return [
        Row("model", "parameters", counts.parameters, "parameters", f"3D-UNet and fusion; {source}"),
        Row("model", "forward, a clip", counts.forward_flops, "FLOP", "counted on fake tensors, torch's formulas"),
        Row("model", "forward + backward", counts.flops, "FLOP", f"counted the same way; {dtype}"),
        Row("model", "text encoder, a caption", text_flops, "FLOP", "counted; it runs in every step"),
    ]


def _memory_rows(spec: PlanSpec, device: Device, counts: ModelCounts, memory: MemoryPlan) -> list[Row]:
    rows = [Row("memory", part.what, part.size_bytes, "B", part.how) for part in memory.parts]
    rows.append(Row("memory", "sum", memory.size_bytes, "B", f"for {max(memory.micro_batch, 1)} at once"))
    rows.append(Row("memory", f"of one {device.name}", device.memory_bytes, "B", device.memory_source))
    rows.append(Row("batch", "largest that fits", memory.largest, "clips", "memory left / activations a clip"))
    if memory.largest_recomputed is None:
        how = "activation checkpointing is not available in this 3D-UNet"
        rows.append(Row("batch", "the same, recomputing", None, "clips", how))
    else:
        how = f"activations {size(counts.recomputed_activation_bytes)} a clip, a third more work"
        rows.append(Row("batch", "the same, recomputing", memory.largest_recomputed, "clips", how))
    how = f"global batch {spec.global_batch} / {spec.workers} / {memory.micro_batch or '-'} at once"
    rows.append(Row("batch", "micro-batches a step", memory.accumulation, "", how))
    return rows


def _training(spec: PlanSpec, device: Device, flops: int, parameters: int) -> tuple[list[Row], float, float]:
    share = spec.mfu or device.utilisation
    source = "--mfu" if spec.mfu else device.utilisation_source
    step_flops = spec.global_batch * flops
    seconds = step_flops / (spec.workers * device.flops_per_second * share)
    best = device.best_flops_per_second
    least = step_flops / (spec.workers * best) + ADAMW_BYTES * parameters / device.bytes_per_second
    measured = "measured" if device.measured_flops_per_second else device.flops_source
    rows = [
        Row("time", "peak of one device", device.flops_per_second, "FLOP/s", device.flops_source),
        Row("time", "share of it in training", share, "", source),
        Row("time", "a step", seconds, "s", f"{spec.global_batch} clips x {work(flops)} / devices / rate"),
        Row("time", "a step, never below", least, "s", f"{work(best)}/s ({measured}) + AdamW's traffic"),
        Row("time", "training", spec.steps * seconds, "s", f"{spec.steps:,} steps"),
        Row("time", "training, never below", spec.steps * least, "s", f"{spec.steps:,} steps"),
    ]
    if spec.clips:
        seen = spec.steps * spec.global_batch
        how = f"{seen:,} samples seen / {spec.samples:,} in the data set"
        rows.append(Row("time", "epochs", seen / spec.samples, "", how))
    return rows, spec.steps * seconds, spec.steps * least


def _preparing(spec: PlanSpec, device: Device, vae_flops: int) -> tuple[list[Row], float]:
    """Download, decoding and the VAE run beside one another: the slowest decides."""
    assert spec.clips is not None
    share = spec.mfu or device.utilisation
    rate = device.encode_flops_per_second
    frames = spec.samples * spec.sample_frames
    vae = frames * vae_flops / (spec.workers * rate * share)
    how = f"{frames:,} frames x {work(vae_flops)} / ({spec.workers} x {work(rate)}/s float32 x {share:g})"
    rows = [Row("time", "VAE", vae, "s", how)]
    if spec.clips_are == "drawn":
        return rows, vae
    videos = spec.clips * CLIP_BYTES
    download = 8 * videos / (spec.gbit * 1e9)
    low, high = (spec.samples * s / spec.prepare_cores for s in DECODE_SECONDS[spec.stored])
    fast, slow = DECODE_SECONDS[spec.stored]
    how = f"{fast} to {slow} s a sample (measured) / {spec.prepare_cores} cores"
    slowest = max((download, "the download"), (high, "decoding"), (vae, "the VAE"))
    return [
        Row(
            "time",
            "download",
            download,
            "s",
            f"{size(videos)} (2.15 MB a clip, published) at {spec.gbit:g} Gbit/s; --gbit",
        ),
        Row("time", "decoding, at best", low, "s", how),
        Row("time", "decoding, at worst", high, "s", how),
        *rows,
        Row("time", "prepare", slowest[0], "s", f"they run side by side; {slowest[1]} decides"),
    ], slowest[0]


def _storage(spec: PlanSpec, base: BaseConfig, parameters: int, frozen: int) -> list[Row]:
    rows = []
    if spec.clips:
        frame, frames = 3 * spec.model.size**2, spec.sample_frames
        channels, _, height, side = base.latent_shape(spec.model)
        latents, text = 2 * channels * height * side * frames, 2 * math.prod(base.text_shape())  # float16
        parts = {
            "latents": latents,
            "log variance": latents * spec.keep_logvar,
            "text features": text * spec.keep_text,
            "frame 1": PNG_SHARE * frame,
            "pixels": frame * frames * spec.keep_pixels,
            "rest": SAMPLE_EXTRAS_BYTES,
        }
        how = " + ".join(f"{part / 1e3:.0f} {name}" for name, part in parts.items() if part)
        how = f"{spec.samples:,} x ({how} KB); videos are not kept"
        rows.append(Row("storage", "shards", spec.samples * sum(parts.values()), "B", how))
    values = 4 if spec.average else 3
    one = 4 * values * parameters
    how = f"{parameters / 1e6:,.1f} M x {4 * values} B (weights, moments{', average' if spec.average else ''})"
    kept = spec.checkpoints_kept + 1
    return rows + [
        Row("storage", "a checkpoint", one, "B", how),
        Row("storage", "checkpoints", kept * one, "B", f"{spec.checkpoints_kept} kept + 1 being written"),
        Row("storage", "exported model", 4 * (parameters + frozen), "B", "float32, with VAE and text encoder"),
    ]


def _cost(spec: PlanSpec, train_seconds: float, prepare_seconds: float) -> list[Row]:
    rows = []
    for name, seconds in (("training", train_seconds), ("prepare", prepare_seconds)):
        if seconds:
            hours = spec.workers * seconds / 3600
            rows.append(Row("cost", f"{name}, device hours", hours, "h", f"{spec.workers} x {seconds / 3600:.4g} h"))
            if spec.price is not None:
                how = f"{hours:,.0f} h x {spec.price:g} USD (--price)"
                rows.append(Row("cost", name, hours * spec.price, "USD", how))
    return rows


def _verdict(spec: PlanSpec, device: Device, memory: MemoryPlan, seconds: float, least: float) -> tuple[str, ...]:
    unit = "worker" if device.name == "cpu" else "GPU"
    room = f"{size(memory.size_bytes)} of {size(device.memory_bytes)}"
    if not memory.micro_batch:
        remedy = "take a device with more memory, or a smaller model"
        return (f"does not fit: one clip needs {room} of a {device.name}; {remedy}",)
    how = "recomputing activations" if memory.recompute else "without recomputing activations"
    steps = f"{memory.accumulation} micro-batches a step" if memory.accumulation > 1 else "no accumulation"
    hours = spec.workers * seconds / 3600
    price = f", {hours * spec.price:,.0f} USD at {spec.price:g} an hour" if spec.price else "; for USD give --price"
    return (
        f"fits: {memory.micro_batch} clips per {unit} {how} ({room}), global batch {spec.global_batch}, {steps}",
        f"time: training takes about {duration(seconds)} on {spec.workers} {device.name}, never less than"
        f" {duration(least)}",
        f"cost: {hours:,.4g} {unit} hours{price}",
    )
