"""How much of a device's memory a training step takes, and the largest batch that fits."""

from __future__ import annotations

from dataclasses import dataclass

from tasks.plan.counting import ModelCounts
from tasks.plan.hardware import Device
from tasks.plan.units import size

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
    """Memory of one device; the global batch is kept, whatever fits at once."""

    parts: tuple[Part, ...]
    largest: int  # clips at once, every activation kept
    largest_recomputed: int | None  # with activations recomputed; None where the 3D-UNet cannot
    recompute: bool
    micro_batch: int  # clips at once, a divisor of the device's share of the global batch; 0: not even one fits
    accumulation: int  # micro-batches to a step

    @property
    def size_bytes(self) -> float:
        return sum(part.size_bytes for part in self.parts)


def plan_memory(
    counts: ModelCounts, text_parameters: int, device: Device, share: int, workers: int, average: bool
) -> MemoryPlan:
    """Solves for the batch. Recomputing costs a third of the speed, so it is chosen only where nothing fits without.

    Args:
        share: clips of a global batch that fall to one device. average: a moving average of the weights is kept.
    """
    standing = _standing(counts.parameters, text_parameters, device, workers, average)
    free = device.memory_bytes - sum(part.size_bytes for part in standing)
    largest = max(0, int((free - counts.fixed_bytes) // counts.activation_bytes))
    largest_recomputed = None
    if counts.recomputed_activation_bytes:
        largest_recomputed = max(0, int((free - counts.recomputed_fixed_bytes) // counts.recomputed_activation_bytes))
    recompute = not largest and bool(largest_recomputed)
    usable = (largest_recomputed or 0) if recompute else largest
    micro_batch = max((n for n in range(1, min(share, usable) + 1) if share % n == 0), default=0)
    per_clip = counts.recomputed_activation_bytes if recompute else counts.activation_bytes
    fixed = counts.recomputed_fixed_bytes if recompute else counts.fixed_bytes
    moving = (
        Part("held whatever the batch", fixed, "counted on fake tensors; on a GPU bfloat16 copies of the weights"),
        Part(
            "activations",
            per_clip * max(micro_batch, 1),
            f"counted on fake tensors: {size(per_clip)} a clip x {max(micro_batch, 1)}"
            + (", recomputed" if recompute else ""),
        ),
    )
    accumulation = share // micro_batch if micro_batch else 0
    return MemoryPlan((*standing, *moving), largest, largest_recomputed, recompute, micro_batch, accumulation)


def _standing(parameters: int, text_parameters: int, device: Device, workers: int, average: bool) -> list[Part]:
    """What lies in memory at every moment of a step."""
    millions = f"{parameters / 1e6:,.1f} M parameters x"
    parts = [
        Part("weights", 4 * parameters, f"{millions} 4 B (float32)"),
        Part("gradients", 4 * parameters, f"{millions} 4 B"),
        Part("AdamW's two moments", 8 * parameters, f"{millions} 8 B"),
    ]
    if average:
        parts.append(Part("moving average", 4 * parameters, f"{millions} 4 B"))
    if workers > 1:
        parts.append(Part("buckets of DDP", 4 * parameters, f"{millions} 4 B, a second copy of the gradients"))
    parts.append(Part("text encoder", 4 * text_parameters, f"{text_parameters / 1e6:,.1f} M parameters x 4 B, frozen"))
    if device.name != "cpu":
        reserve = RESERVE * device.memory_bytes
        parts.append(Part("left free", reserve, f"assumed {100 * RESERVE:g} %: context, workspaces, fragmentation"))
    return parts
