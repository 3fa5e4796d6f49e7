"""How much of a device's memory a training step takes, and the largest batch that fits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flows.planning.counting import ModelCounts
from flows.planning.hardware import Device
from flows.planning.spec import PlanSpec
from flows.planning.units import size

# CUDA's context, the workspaces of its libraries, and what a caching allocator cannot use again.
RESERVE = 0.08


@dataclass(frozen=True)
class Part:
    """One user of memory."""

    what: str
    size_bytes: float
    how: str


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of one device for the step that the recipe asks for, and what else would fit."""

    parts: tuple[Part, ...]
    largest: int  # clips at once, every activation kept
    largest_recomputed: int  # with activations recomputed
    at_once: int  # clips of the recipe's step
    recompute: bool
    accumulation: int  # micro-batches to a step

    @property
    def size_bytes(self) -> float:
        return sum(part.size_bytes for part in self.parts)

    @property
    def fits(self) -> bool:
        return self.at_once <= (self.largest_recomputed if self.recompute else self.largest)


def plan_memory(spec: PlanSpec, counts: ModelCounts, text_parameters: int, device: Device) -> MemoryPlan:
    """Memory is linear in the batch, so the largest batch is a division."""
    standing = _standing(spec, counts, text_parameters, device)
    free = device.memory_bytes - sum(part.size_bytes for part in standing)
    passes = {False: counts.kept, True: counts.recomputed}
    largest = {how: max(0, int((free - one.fixed_bytes) // one.activation_bytes)) for how, one in passes.items()}
    chosen = passes[spec.recompute]
    copies = "; bfloat16 copies of the weights" if spec.precision == "bfloat16" and not spec.sharded else ""
    recomputed = ", recomputed" if spec.recompute else ""
    moving = (
        Part("held whatever the batch", chosen.fixed_bytes, f"counted on fake tensors{copies}"),
        Part(
            "activations",
            chosen.activation_bytes * spec.at_once,
            f"counted on fake tensors: {size(chosen.activation_bytes)} a clip x {spec.at_once}{recomputed}",
        ),
    )
    accumulation = math.ceil(spec.share / spec.at_once)
    return MemoryPlan((*standing, *moving), largest[False], largest[True], spec.at_once, spec.recompute, accumulation)


def shortfall(memory: MemoryPlan, device: Device) -> str | None:
    """What to change where a recipe's step does not fit into a device, in one sentence; None where it fits."""
    if memory.fits:
        return None
    if memory.largest or memory.recompute and memory.largest_recomputed:
        remedy = f"a micro_batch of {memory.largest_recomputed if memory.recompute else memory.largest} fits"
    elif memory.largest_recomputed:
        most = min(memory.largest_recomputed, memory.at_once)
        remedy = f"with recompute_activations a micro_batch of {most} fits"
    else:
        remedy = "take a device with more memory, more workers with sharding 'fsdp2', or a smaller model"
    clips = "one clip needs" if memory.at_once == 1 else f"{memory.at_once} clips at once need"
    return f"{clips} {size(memory.size_bytes)} of {size(device.memory_bytes)} of a {device.name}; {remedy}"


def _standing(spec: PlanSpec, counts: ModelCounts, text_parameters: int, device: Device) -> list[Part]:
    """What lies in memory at every moment of a step."""
    ranks = spec.workers if spec.sharded else 1
    over = f" / {ranks} workers" if spec.sharded else ""
    trained = f"{counts.trained / 1e6:,.1f} M trained x"
    parts = [
        Part("weights", 4 * counts.parameters / ranks, f"{counts.parameters / 1e6:,.1f} M parameters x 4 B{over}"),
        Part("gradients", 4 * counts.trained / ranks, f"{trained} 4 B{over}"),
        Part("AdamW's two moments", 8 * counts.trained / ranks, f"{trained} 8 B{over}"),
    ]
    if spec.average:
        parts.append(Part("moving average", 4 * counts.trained / ranks, f"{trained} 4 B{over}"))
    if spec.sharded:
        value = 2 if spec.precision == "bfloat16" else 4
        how = f"derived: weights of two layers x {value} B, gradients of one x {value} + 4 B"
        gathered = counts.largest_layer * (2 * value + value + 4)
        parts.append(Part("gathered layers", gathered, f"{how}; {counts.largest_layer / 1e6:,.1f} M"))
    elif spec.workers > 1:
        parts.append(Part("buckets of DDP", 4 * counts.trained, f"{trained} 4 B, a second copy of the gradients"))
    parts.append(Part("text encoder", 4 * text_parameters, f"{text_parameters / 1e6:,.1f} M parameters x 4 B, frozen"))
    if device.name != "cpu":
        reserve = RESERVE * device.memory_bytes
        parts.append(Part("left free", reserve, f"assumed {100 * RESERVE:g} %: context, workspaces, fragmentation"))
    return parts
