"""Compares the ways to run a training step: micro-batch, recomputed activations, sharding.

A pass takes the sum over its kernels of the larger of operations / rate and bytes / rate, divided by the share of that
bound that real passes reach. Gradients travel while a step computes, so the longer of the two counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from flows.planning.base import BaseConfig
from flows.planning.counting import Kernels, ModelCounts, StepCounts, count_model
from flows.planning.hardware import Device
from flows.planning.memory import plan_memory
from tasks.train.spec import TrainSpec

# Of the kernels' bound; measured on a CPU (`python -m benchmarks.roofline`: 0.973 of 1.494 s), assumed for a GPU.
REACHED = 0.65
ADAMW_BYTES = 28  # read and written for each trained parameter: four values in, three out, float32
UPDATE_BYTES = ADAMW_BYTES + 12  # with the norm of the gradients (one in) and their clipping (one in, one out)
AVERAGE_BYTES = 12  # two values in, one out
ACCUMULATE_BYTES = 12  # of a trained parameter for each micro-batch after the first: two values in, one out


@dataclass(frozen=True)
class Option:
    """One way to run a step of the same global batch; seconds are predicted.

    Attributes:
        micro_batch: clips of one pass.
        recompute: whether activations are recomputed.
        sharding: of the training state.
        size_bytes: memory of one device.
        fits: whether the device has it.
        compute_seconds: passes and update of one device.
        link_seconds: gradients and gathered weights between the devices.
        chosen: whether it is the recipe's.
    """

    micro_batch: int
    recompute: bool
    sharding: Literal["none", "fsdp2"]
    size_bytes: float
    fits: bool
    compute_seconds: float
    link_seconds: float
    chosen: bool

    @property
    def seconds(self) -> float:
        """Of one step."""
        return max(self.compute_seconds, self.link_seconds)


def find_options(
    train: TrainSpec,
    base: BaseConfig,
    counts: ModelCounts,
    text_parameters: int,
    device: Device,
    frame_size: tuple[int, int] | None = None,
) -> tuple[Option, ...]:
    """All options of a recipe's step on a device: those that fit first, the fastest of them first.

    A prediction is not exact to a percent, so that of options that differ by less the simplest comes first.

    Shards are compared where there are several workers and the global batch has equal shares.

    Args:
        train: the training.
        base: the sizes of the base's networks.
        counts: the step of `train`, as it is configured.
        text_parameters: of the text encoder.
        device: one of the devices.
        frame_size: as of `count_model`.
    """
    found = []
    for sharding in _shardings(train):
        variant = replace(train, sharding=sharding)
        same = variant.sharded == train.sharded
        counted = counts if same else count_model(base, variant, device.name != "cpu", frame_size)
        for recompute in (False, True):
            for micro_batch in micro_batches(train.largest_share):
                one = replace(variant, recompute_activations=recompute, micro_batch=micro_batch)
                memory = plan_memory(one, counted, text_parameters, device)
                chosen = same and (recompute, micro_batch) == (train.recompute_activations, train.samples_per_pass)
                found.append(
                    Option(
                        micro_batch,
                        recompute,
                        sharding,
                        memory.size_bytes,
                        memory.fits,
                        compute_seconds(one, counted, device),
                        link_seconds(one, counted, device),
                        chosen,
                    )
                )
    return tuple(sorted(found, key=_rank))


def _rank(option: Option) -> tuple[bool, float, bool, bool, int]:
    """Fits, then fast; of options whose seconds agree in two digits the simplest, with the largest micro-batch."""
    return (
        not option.fits,
        float(f"{option.seconds:.2g}"),
        option.sharding != "none",
        option.recompute,
        -option.micro_batch,
    )


def _shardings(train: TrainSpec) -> Iterator[Literal["none", "fsdp2"]]:
    yield "none"
    if train.workers > 1 and train.global_batch % train.workers == 0:
        yield "fsdp2"


def micro_batches(share: int) -> list[int]:
    """Powers of two below a device's share of the global batch, and the share."""
    return [*(2**k for k in range((share - 1).bit_length())), share]


def pass_seconds(step: StepCounts, clips: int, device: Device, precision: str) -> float:
    """Seconds of a forward and backward pass, linear in the clips."""
    one, two = (_bound(kernels, device, precision) / REACHED for kernels in step.kernels)
    return one + (clips - 1) * (two - one)


def compute_seconds(train: TrainSpec, counts: ModelCounts, device: Device) -> float:
    """Seconds of the passes of one device's share of the global batch, and of the update."""
    step = counts.recomputed if train.recompute_activations else counts.kept
    full, rest = divmod(train.largest_share, train.samples_per_pass)
    parts = [train.samples_per_pass] * full + ([rest] if rest else [])
    passes = sum(pass_seconds(step, clips, device, train.precision) for clips in parts)
    own = counts.trained / (train.workers if train.sharded else 1)
    each = UPDATE_BYTES + (AVERAGE_BYTES if train.average_decay else 0) + (len(parts) - 1) * ACCUMULATE_BYTES
    return passes + own * each / device.bytes_per_second


def link_seconds(train: TrainSpec, counts: ModelCounts, device: Device) -> float:
    """Seconds of what one device sends: gradients, in float32; of shards also the weights of every pass, twice."""
    others = (train.workers - 1) / train.workers
    if not train.sharded:
        return 2 * others * 4 * counts.trained / device.link_bytes_per_second
    passes = -(-train.largest_share // train.samples_per_pass)
    value = 2 if train.precision == "bfloat16" else 4
    sent = passes * (2 * value * counts.parameters + 4 * counts.trained)
    return others * sent / device.link_bytes_per_second


def _bound(kernels: tuple[Kernels, ...], device: Device, precision: str) -> float:
    """The least seconds of these kernels."""
    flops, moved = device.best_flops_per_second(precision), device.bytes_per_second
    return sum(kernel.calls * max(kernel.flops / flops, kernel.bytes_moved / moved) for kernel in kernels)
