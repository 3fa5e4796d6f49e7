"""Computes the plan of a recipe: whether it fits, how long it takes, what it stores, what it costs.

Everything follows from the shapes of the model; the few measured or published numbers are constants below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flows.planning.base import BaseConfig, read_base
from flows.planning.counting import ModelCounts, count_model, count_text, count_vae
from flows.planning.hardware import HERE, Device, find_device
from flows.planning.measuring import measured_device
from flows.planning.memory import MemoryPlan, plan_memory, shortfall
from flows.planning.options import ADAMW_BYTES, Option, find_options
from flows.planning.question import Question, check_question, sample_frames
from flows.planning.units import duration, size, work
from tasks.encode.spec import PrepareSpec
from tasks.train.checkpoints import KEPT
from tasks.train.spec import TrainSpec, check_spec
from tasks.video.frame_sizes import FrameSize, parse_frame_sizes

CLIP_BYTES = 2.15e6  # an mp4 of WebVid: 984 clips are 2.115 GB (iejMac/video2dataset#336)
# To 256 pixels from a 596 x 336 H.264 clip of 15 s, PyAV, one core: best, worst.
DECODE_SECONDS = {"windows": (0.057, 0.129), "track": (0.3, 0.55), "shots": (0.3, 0.55)}  # no thumbnails
PNG_SHARE = 0.31  # of the raw bytes of a first frame; 25 real clips at 256 pixels: 0.27 to 0.36 (10 to 90 %)
SAMPLE_EXTRAS_BYTES = 7000  # caption, provenance, headers, padding and index, as a data set of the demo has them


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
    """A plan: the verdict, then every number, and with `Question.options` the ways to run a step."""

    fits: bool
    verdict: tuple[str, ...]
    rows: tuple[Row, ...]
    options: tuple[Option, ...] = ()


def make_plan(train: TrainSpec, prepare: PrepareSpec, question: Question) -> Plan:
    """Computes a plan. The model is built on fake tensors: half a minute for the paper's.

    Raises:
        UserError: an invalid value, or an unknown device. BaseFolderError: a base without readable shapes.
    """
    check_spec(train)
    check_question(question)
    if question.device == HERE:
        device = measured_device(train.workers, train.cpus_per_worker)
    else:
        device = find_device(question.device, train.workers, train.cpus_per_worker)
    base = read_base(train.base)
    frame_size = largest_frame_size(prepare)
    counts, memory = plan_step(train, device, frame_size)
    text_parameters, text_flops = count_text(base)
    vae_parameters, vae_flops = count_vae(base, frame_size)

    rows = _frame_size_rows(prepare, frame_size)
    rows += _model_rows(train, counts, text_flops, base.source) + _memory_rows(train, device, counts, memory)
    flops = (counts.recomputed if train.recompute_activations else counts.kept).flops + text_flops
    train_rows, train_seconds, least_seconds = _training(train, prepare, question, device, flops, counts.trained)
    rows += train_rows
    prepare_rows, prepare_seconds = _preparing(train, prepare, question, device, vae_flops)
    rows += prepare_rows + _storage(train, prepare, question, base, counts, text_parameters + vae_parameters)
    rows += _cost(train.workers, question.price, train_seconds, prepare_seconds)
    verdict = _verdict(train, question, device, memory, train_seconds, least_seconds)
    options = find_options(train, base, counts, text_parameters, device, frame_size) if question.options else ()
    return Plan(memory.fits, verdict, tuple(rows), options)


def largest_frame_size(prepare: PrepareSpec) -> FrameSize:
    """The frame size of the most pixels, by which everything is planned: clips of all frame sizes must fit."""
    square = FrameSize(prepare.size, prepare.size)
    return max(parse_frame_sizes(prepare.frame_sizes), key=lambda size: size.width * size.height, default=square)


def plan_step(
    train: TrainSpec, device: Device, frame_size: tuple[int, int] | None = None
) -> tuple[ModelCounts, MemoryPlan]:
    """Counts the training step, and computes its memory on a device; `frame_size` as of `count_model`."""
    base = read_base(train.base)
    counts = count_model(base, train, device.name != "cpu", frame_size)
    return counts, plan_memory(train, counts, count_text(base)[0], device)


def _frame_size_rows(prepare: PrepareSpec, largest: FrameSize) -> list[Row]:
    if not prepare.frame_sizes:
        return []
    pixels = math.prod(largest)
    how = f"{largest}, the largest of {', '.join(prepare.frame_sizes)}; everything below is for it"
    return [Row("model", "pixels of a frame", pixels, "pixels", how)]


def _model_rows(train: TrainSpec, counts: ModelCounts, text_flops: int, source: str) -> list[Row]:
    dtype = "bfloat16 autocast" if train.precision == "bfloat16" else "float32"
    return [
        Row("model", "parameters", counts.parameters, "parameters", f"3D-UNet and fusion; {source}"),
        Row("model", "trained", counts.trained, "parameters", f"{train.trained} of the 3D-UNet, and fusion"),
        Row("model", "forward, a clip", counts.forward_flops, "FLOP", "counted on fake tensors, torch's formulas"),
        Row("model", "forward + backward", counts.kept.flops, "FLOP", f"counted the same way; {dtype}"),
        Row("model", "text encoder, a caption", text_flops, "FLOP", "counted; it runs in every step"),
    ]


def _memory_rows(train: TrainSpec, device: Device, counts: ModelCounts, memory: MemoryPlan) -> list[Row]:
    rows = [Row("memory", part.what, part.size_bytes, "B", part.how) for part in memory.parts]
    rows.append(Row("memory", "sum", memory.size_bytes, "B", f"for {memory.at_once} at once"))
    rows.append(Row("memory", f"of one {device.name}", device.memory_bytes, "B", device.memory_source))
    how = "the recipe's micro_batch" if train.micro_batch else "a device's share of the global batch"
    rows.append(Row("batch", "at once", memory.at_once, "clips", how))
    rows.append(Row("batch", "largest that fits", memory.largest, "clips", "memory left / activations a clip"))
    how = f"activations {size(counts.recomputed.activation_bytes)} a clip, a third more work"
    rows.append(Row("batch", "the same, recomputing", memory.largest_recomputed, "clips", how))
    how = f"global batch {train.global_batch} / {train.workers} / {memory.at_once} at once"
    rows.append(Row("batch", "micro-batches a step", memory.accumulation, "", how))
    return rows


def _training(
    train: TrainSpec, prepare: PrepareSpec, question: Question, device: Device, flops: int, trained: int
) -> tuple[list[Row], float, float]:
    """The rows of training, its seconds, and the fewest seconds that the device allows."""
    share = question.mfu or device.utilisation
    source = "--mfu" if question.mfu else device.utilisation_source
    step_flops = train.global_batch * flops
    peak, best = device.flops_per_second[train.precision], device.best_flops_per_second(train.precision)
    seconds = step_flops / (train.workers * peak * share)
    own = trained / (train.workers if train.sharded else 1)  # weights that one device's optimiser moves
    least = step_flops / (train.workers * best) + ADAMW_BYTES * own / device.bytes_per_second
    measured = "measured" if train.precision in device.measured_flops_per_second else device.flops_source
    rows = [
        Row("time", "peak of one device", peak, "FLOP/s", f"{train.precision}; {device.flops_source}"),
        Row("time", "share of it in training", share, "", source),
        Row("time", "a step", seconds, "s", f"{train.global_batch} clips x {work(flops)} / devices / rate"),
        Row("time", "a step, never below", least, "s", f"{work(best)}/s ({measured}) + AdamW's traffic"),
        Row("time", "training", train.steps * seconds, "s", f"{train.steps:,} steps"),
        Row("time", "training, never below", train.steps * least, "s", f"{train.steps:,} steps"),
    ]
    if question.clips:
        seen, samples = train.steps * train.global_batch, question.samples(prepare)
        how = f"{seen:,} samples seen / {samples:,} in the data set"
        rows.append(Row("time", "epochs", seen / samples, "", how))
    return rows, train.steps * seconds, train.steps * least


def _preparing(
    train: TrainSpec, prepare: PrepareSpec, question: Question, device: Device, vae_flops: int
) -> tuple[list[Row], float]:
    """The rows of prepare and its seconds. Download, decoding and the VAE run in parallel: the slowest decides."""
    if question.clips is None or question.clips_are == "prepared":
        return [], 0.0
    share = question.mfu or device.utilisation
    rate = device.encode_flops_per_second
    samples = question.samples(prepare)
    frames = samples * sample_frames(prepare)
    vae = frames * vae_flops / (train.workers * rate * share)
    how = f"{frames:,} frames x {work(vae_flops)} / ({train.workers} x {work(rate)}/s float32 x {share:g})"
    rows = [Row("time", "VAE", vae, "s", how)]
    if question.clips_are == "drawn":
        return rows, vae
    videos = question.clips * CLIP_BYTES
    download = 8 * videos / (question.gbit * 1e9)
    cores = prepare.workers * prepare.cpus_per_worker
    fast, slow = DECODE_SECONDS[prepare.clip]
    low, high = samples * fast / cores, samples * slow / cores
    how = f"{fast} to {slow} s a sample (measured) / {cores} cores"
    slowest = max((download, "the download"), (high, "decoding"), (vae, "the VAE"))
    return [
        Row(
            "time",
            "download",
            download,
            "s",
            f"{size(videos)} (2.15 MB a clip, published) at {question.gbit:g} Gbit/s; --gbit",
        ),
        Row("time", "decoding, at best", low, "s", how),
        Row("time", "decoding, at worst", high, "s", how),
        *rows,
        Row("time", "prepare", slowest[0], "s", f"they run side by side; {slowest[1]} decides"),
    ], slowest[0]


def _storage(
    train: TrainSpec, prepare: PrepareSpec, question: Question, base: BaseConfig, counts: ModelCounts, frozen: int
) -> list[Row]:
    rows = []
    if question.clips:
        frame_size = largest_frame_size(prepare)
        frame, frames, samples = 3 * math.prod(frame_size), sample_frames(prepare), question.samples(prepare)
        channels, _, height, width = base.latent_shape(train.model, frame_size)
        latents, text = 2 * channels * height * width * frames, 2 * math.prod(base.text_shape())  # float16
        parts = {
            "latents": latents,
            "log variance": latents * prepare.keep_logvar,
            "text features": text * prepare.keep_text,
            "frame 1": PNG_SHARE * frame,
            "pixels": frame * frames * prepare.keep_pixels,
            "rest": SAMPLE_EXTRAS_BYTES,
        }
        how = " + ".join(f"{part / 1e3:.0f} {name}" for name, part in parts.items() if part)
        how = f"{samples:,} x ({how} KB); videos are not kept"
        rows.append(Row("storage", "shards", samples * sum(parts.values()), "B", how))
    values = 4 if train.average_decay else 3
    one = 4 * values * counts.trained
    how = (
        f"{counts.trained / 1e6:,.1f} M x {4 * values} B (weights, moments{', average' if train.average_decay else ''})"
    )
    return [
        *rows,
        Row("storage", "a checkpoint", one, "B", how),
        Row("storage", "checkpoints", (KEPT + 1) * one, "B", f"{KEPT} kept + 1 being written"),
        Row("storage", "exported model", 4 * (counts.parameters + frozen), "B", "float32, with VAE and text encoder"),
    ]


def _cost(devices: int, price: float | None, train_seconds: float, prepare_seconds: float) -> list[Row]:
    rows = []
    for name, seconds in (("training", train_seconds), ("prepare", prepare_seconds)):
        if seconds:
            hours = devices * seconds / 3600
            rows.append(Row("cost", f"{name}, device hours", hours, "h", f"{devices} x {seconds / 3600:.4g} h"))
            if price is not None:
                how = f"{hours:,.0f} h x {price:g} USD (--price)"
                rows.append(Row("cost", name, hours * price, "USD", how))
    return rows


def _verdict(
    train: TrainSpec, question: Question, device: Device, memory: MemoryPlan, seconds: float, least: float
) -> tuple[str, ...]:
    unit = "worker" if device.name == "cpu" else "GPU"
    room = f"{size(memory.size_bytes)} of {size(device.memory_bytes)}"
    problem = shortfall(memory, device)
    if problem is not None:
        return (f"does not fit: {problem}",)
    how = "recomputing activations" if memory.recompute else "without recomputing activations"
    steps = f"{memory.accumulation} micro-batches a step" if memory.accumulation > 1 else "no accumulation"
    hours = train.workers * seconds / 3600
    price = (
        f", {hours * question.price:,.0f} USD at {question.price:g} an hour"
        if question.price
        else "; for USD give --price"
    )
    return (
        f"fits: {memory.at_once} clips per {unit} {how} ({room}), global batch {train.global_batch}, {steps}",
        f"time: training takes about {duration(seconds)} on {train.workers} {device.name}, never less than"
        f" {duration(least)}",
        f"cost: {hours:,.4g} {unit} hours{price}",
    )
