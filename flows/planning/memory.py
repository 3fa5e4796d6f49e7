"""The memory of a training step on one device, and the largest batch that fits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flows.planning.counting import ModelCounts
from flows.planning.hardware import Device
from flows.planning.units import size
from tasks.train.spec import TrainSpec

# CUDA's context, the workspaces of its libraries, and what a caching allocator cannot use again.
RESERVE = 0.08


@dataclass(frozen=True)
class Part:
    """One part of a step's memory."""

    what: str
    size_bytes: float
    how: str


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of a training step on one device, and the largest batches that fit."""

    parts: tuple[Part, ...]
    largest: int  # clips at once, every activation kept
    largest_recomputed: int  # with activations recomputed
    at_once: int  # clips of one forward pass
    recompute: bool
    accumulation: int  # micro-batches per step

    @property
    def size_bytes(self) -> float:
        return sum(part.size_bytes for part in self.parts)

    @property
    def fits(self) -> bool:
        return self.at_once <= (self.largest_recomputed if self.recompute else self.largest)


def plan_memory(train: TrainSpec, counts: ModelCounts, text_parameters: int, device: Device) -> MemoryPlan:
    """Computes the memory of a step. Memory is linear in the batch, so the largest batch is a division."""
    fixed = _fixed_parts(train, counts, text_parameters, device)
    free = device.memory_bytes - sum(part.size_bytes for part in fixed)
    passes = {False: counts.kept, True: counts.recomputed}
    largest = {how: max(0, int((free - one.fixed_bytes) // one.activation_bytes)) for how, one in passes.items()}
    step = passes[train.recompute_activations]
    copies = "; bfloat16 copies of the weights" if train.precision == "bfloat16" and not train.sharded else ""
    recomputed = ", recomputed" if train.recompute_activations else ""
    at_once = train.samples_per_pass
    variable = (
        Part("held whatever the batch", step.fixed_bytes, f"counted on fake tensors{copies}"),
        Part(
            "activations",
            step.activation_bytes * at_once,
            f"counted on fake tensors: {size(step.activation_bytes)} a clip x {at_once}{recomputed}",
        ),
    )
    return MemoryPlan(
        parts=(*fixed, *variable),
        largest=largest[False],
        largest_recomputed=largest[True],
        at_once=at_once,
        recompute=train.recompute_activations,
        accumulation=math.ceil(train.largest_share / at_once),
    )


def shortfall(memory: MemoryPlan, device: Device) -> str | None:
    """One sentence about a step that does not fit, with a remedy; None if it fits."""
    if memory.fits:
        return None
    if memory.largest or (memory.recompute and memory.largest_recomputed):
        remedy = f"a micro_batch of {memory.largest_recomputed if memory.recompute else memory.largest} fits"
    elif memory.largest_recomputed:
        most = min(memory.largest_recomputed, memory.at_once)
        remedy = f"with recompute_activations a micro_batch of {most} fits"
    else:
        remedy = "take a device with more memory, more workers with sharding 'fsdp2', or a smaller model"
    clips = "one clip needs" if memory.at_once == 1 else f"{memory.at_once} clips at once need"
    return f"{clips} {size(memory.size_bytes)} of {size(device.memory_bytes)} of a {device.name}; {remedy}"


def _fixed_parts(train: TrainSpec, counts: ModelCounts, text_parameters: int, device: Device) -> list[Part]:
    """What takes memory during the complete step, whatever the batch."""
    ranks = train.workers if train.sharded else 1
    over = f" / {ranks} workers" if train.sharded else ""
    per_trained = f"{counts.trained / 1e6:,.1f} M trained x"
    parts = [
        Part("weights", 4 * counts.parameters / ranks, f"{counts.parameters / 1e6:,.1f} M parameters x 4 B{over}"),
        Part("gradients", 4 * counts.trained / ranks, f"{per_trained} 4 B{over}"),
        Part("AdamW's two moments", 8 * counts.trained / ranks, f"{per_trained} 8 B{over}"),
    ]
    if train.average_decay:
        parts.append(Part("moving average", 4 * counts.trained / ranks, f"{per_trained} 4 B{over}"))
    if train.sharded:
        value = 2 if train.precision == "bfloat16" else 4
        how = f"derived: weights of two layers x {value} B, gradients of one x {value} + 4 B"
        gathered = counts.largest_layer * (2 * value + value + 4)
        parts.append(Part("gathered layers", gathered, f"{how}; {counts.largest_layer / 1e6:,.1f} M"))
    parts.append(Part("text encoder", 4 * text_parameters, f"{text_parameters / 1e6:,.1f} M parameters x 4 B, frozen"))
    if device.name != "cpu":
        reserve = RESERVE * device.memory_bytes
        parts.append(Part("left free", reserve, f"assumed {100 * RESERVE:g} %: context, workspaces, fragmentation"))
    return parts
