"""From the numbers of a recipe to its plan: what fits, how long it takes, what it stores, what it costs.

Everything is computed from the model's own shapes; the few numbers that were measured or published stand below.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from flows.planning.base import BaseConfig, read_base
from flows.planning.counting import ModelCounts, count_model, count_text, count_vae
from flows.planning.hardware import Device, find_device
from flows.planning.memory import MemoryPlan, plan_memory, shortfall
from flows.planning.spec import PlanSpec, check_plan
from flows.planning.units import duration, size, work
from trip_model.model import Trip

CLIP_BYTES = 2.15e6  # an mp4 of WebVid: 984 clips are 2.115 GB (iejMac/video2dataset#336)
# To 256 pixels from a 596 x 336 H.264 clip of 15 s, PyAV, one core: best, worst.
DECODE_SECONDS = {"windows": (0.057, 0.129), "track": (0.3, 0.55)}
PNG_SHARE = 0.31  # of the raw bytes of a first frame; 25 real clips at 256 pixels: 0.27 to 0.36 (10 to 90 %)
SAMPLE_EXTRAS_BYTES = 7000  # caption, provenance, headers, padding and index, as a data set of the demo has them
ADAMW_BYTES = 28  # read and written for each parameter: four values in, three out, float32


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


def make_plan(spec: PlanSpec, freeze: Callable[[Trip], object] = lambda trip: None) -> Plan:
    """Computes a plan; the model is built on fake tensors, half a minute for the paper's.

    Args:
        freeze: leaves only the trained weights of a TRIP with gradients, after adding adapters to it perhaps.
    Raises:
        UserError: a number that no run could start with. BaseFolderError: a base without readable shapes.
    """
    check_plan(spec)
    device = find_device(spec.device, spec.workers, spec.cores)
    base = read_base(spec.base)
    counts, memory = plan_step(spec, device, freeze)
    text_parameters, text_flops = count_text(base)
    vae_parameters, vae_flops = count_vae(base, spec.model.size)

    rows = _model_rows(spec, counts, text_flops, base.source) + _memory_rows(spec, device, counts, memory)
    flops = (counts.recomputed if spec.recompute else counts.kept).flops + text_flops
    training, train_seconds, least_seconds = _training(spec, device, flops, counts.trained)
    rows += training
    open_clips = spec.clips and spec.clips_are != "prepared"
    preparing, prepare_seconds = _preparing(spec, device, vae_flops) if open_clips else ([], 0.0)
    rows += preparing + _storage(spec, base, counts, text_parameters + vae_parameters)
    rows += _cost(spec, train_seconds, prepare_seconds)
    return Plan(memory.fits, _verdict(spec, device, memory, train_seconds, least_seconds), tuple(rows))


def plan_step(
    spec: PlanSpec, device: Device, freeze: Callable[[Trip], object] = lambda trip: None
) -> tuple[ModelCounts, MemoryPlan]:
    """Counts the model's training step and lays it into a device's memory."""
    base, bfloat16 = read_base(spec.base), spec.precision == "bfloat16"
    counts = count_model(base, spec.model, device.name != "cpu", bfloat16, spec.sharded, freeze)
    return counts, plan_memory(spec, counts, count_text(base)[0], device)


def _model_rows(spec: PlanSpec, counts: ModelCounts, text_flops: int, source: str) -> list[Row]:
    dtype = "bfloat16 autocast" if spec.precision == "bfloat16" else "float32"
    return [
        Row("model", "parameters", counts.parameters, "parameters", f"3D-UNet and fusion; {source}"),
        Row("model", "trained", counts.trained, "parameters", f"{spec.trained} of the 3D-UNet, and fusion"),
        Row("model", "forward, a clip", counts.forward_flops, "FLOP", "counted on fake tensors, torch's formulas"),
        Row("model", "forward + backward", counts.kept.flops, "FLOP", f"counted the same way; {dtype}"),
        Row("model", "text encoder, a caption", text_flops, "FLOP", "counted; it runs in every step"),
    ]


def _memory_rows(spec: PlanSpec, device: Device, counts: ModelCounts, memory: MemoryPlan) -> list[Row]:
    rows = [Row("memory", part.what, part.size_bytes, "B", part.how) for part in memory.parts]
    rows.append(Row("memory", "sum", memory.size_bytes, "B", f"for {memory.at_once} at once"))
    rows.append(Row("memory", f"of one {device.name}", device.memory_bytes, "B", device.memory_source))
    how = "the recipe's micro_batch" if spec.micro_batch else "a device's share of the global batch"
    rows.append(Row("batch", "at once", memory.at_once, "clips", how))
    rows.append(Row("batch", "largest that fits", memory.largest, "clips", "memory left / activations a clip"))
    how = f"activations {size(counts.recomputed.activation_bytes)} a clip, a third more work"
    rows.append(Row("batch", "the same, recomputing", memory.largest_recomputed, "clips", how))
    how = f"global batch {spec.global_batch} / {spec.workers} / {memory.at_once} at once"
    rows.append(Row("batch", "micro-batches a step", memory.accumulation, "", how))
    return rows


def _training(spec: PlanSpec, device: Device, flops: int, trained: int) -> tuple[list[Row], float, float]:
    share = spec.mfu or device.utilisation
    source = "--mfu" if spec.mfu else device.utilisation_source
    step_flops = spec.global_batch * flops
    peak, best = device.flops_per_second[spec.precision], device.best_flops_per_second(spec.precision)
    seconds = step_flops / (spec.workers * peak * share)
    own = trained / (spec.workers if spec.sharded else 1)  # weights that one device's optimiser moves
    least = step_flops / (spec.workers * best) + ADAMW_BYTES * own / device.bytes_per_second
    measured = "measured" if spec.precision in device.measured_flops_per_second else device.flops_source
    rows = [
        Row("time", "peak of one device", peak, "FLOP/s", f"{spec.precision}; {device.flops_source}"),
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


def _storage(spec: PlanSpec, base: BaseConfig, counts: ModelCounts, frozen: int) -> list[Row]:
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
    one = 4 * values * counts.trained
    how = f"{counts.trained / 1e6:,.1f} M x {4 * values} B (weights, moments{', average' if spec.average else ''})"
    kept = spec.checkpoints_kept + 1
    return rows + [
        Row("storage", "a checkpoint", one, "B", how),
        Row("storage", "checkpoints", kept * one, "B", f"{spec.checkpoints_kept} kept + 1 being written"),
        Row("storage", "exported model", 4 * (counts.parameters + frozen), "B", "float32, with VAE and text encoder"),
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
    told = shortfall(memory, device)
    if told is not None:
        return (f"does not fit: {told}",)
    how = "recomputing activations" if memory.recompute else "without recomputing activations"
    steps = f"{memory.accumulation} micro-batches a step" if memory.accumulation > 1 else "no accumulation"
    hours = spec.workers * seconds / 3600
    price = f", {hours * spec.price:,.0f} USD at {spec.price:g} an hour" if spec.price else "; for USD give --price"
    return (
        f"fits: {memory.at_once} clips per {unit} {how} ({room}), global batch {spec.global_batch}, {steps}",
        f"time: training takes about {duration(seconds)} on {spec.workers} {device.name}, never less than"
        f" {duration(least)}",
        f"cost: {hours:,.4g} {unit} hours{price}",
    )
