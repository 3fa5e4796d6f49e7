"""How well a training uses its device: the operations of a clip, counted, and the device's measured matmul peak."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tasks.train.optimizer import choose_trained
from tasks.train.spec import TrainSpec
from trip_model.config import TripConfig
from trip_model.model import Trip
from trip_model.unet import UNet3D, UNetConfig

PEAK_SIZES = {"cuda": 8192, "cpu": 1024}  # of the square matrices whose product is measured
PEAK_REPEATS = 5


class Operations(TorchDispatchMode):
    """Adds up the floating-point operations of all kernels, by the formulas of torch's `FlopCounterMode`.

    `FlopCounterMode` also follows modules, with hooks that keep the graphs of recomputed activations alive.
    """

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def clip_flops(trip: Trip, spec: TrainSpec, latent_shape: Sequence[int], text_shape: Sequence[int]) -> int:
    """Floating-point operations of training on one clip: 3D-UNet and fusion, forward and backward.

    One multiplication with its addition is 2. Operations that recompute activations do not count, so that the shares of
    the peak of two trainings can be compared. A network of these sizes without memory is counted, on the device "meta".

    Args:
        trip: the model, for its configuration.
        spec: the training, which may freeze weights.
        latent_shape: (C, F, h, w) of one clip's latents.
        text_shape: (L, D) of one caption's features.
    """
    config = TripConfig(condition=trip.config.condition, fusion=trip.config.fusion)
    part = TrainSpec("", "", "", trained=spec.trained, lora_rank=spec.lora_rank)
    return _count(trip.unet.config, config, part, tuple(latent_shape), tuple(text_shape))


@functools.cache
def _count(
    unet: UNetConfig, config: TripConfig, spec: TrainSpec, latent_shape: tuple[int, ...], text_shape: tuple[int, ...]
) -> int:
    channels, frames, height, width = latent_shape
    slots = 0 if config.condition == "channel" else 1
    state = torch.get_rng_state()
    with torch.device("meta"):
        trip = Trip(UNet3D(unet), config).train()
        choose_trained(trip, spec)
        x = torch.empty(1, unet.in_channels, frames + slots, height, width)
        prior, t_B = torch.empty(1, channels, frames, height, width), torch.zeros(1, dtype=torch.int64)
        with Operations() as operations:
            output = trip.unet(x, t_B, torch.empty(1, *text_shape))
            if trip.fusion is not None:
                output = trip.fusion.attend(output[:, :, -frames:], prior, t_B)
            output.square().mean().backward()
    torch.set_rng_state(state)
    return operations.flops


@functools.cache
def matmul_flops_per_second(device: str, precision: str) -> float:
    """The best rate of some products of large matrices of that data type on the device, floating-point operations/s."""
    size = PEAK_SIZES["cuda" if device.startswith("cuda") else "cpu"]
    a, b = torch.zeros(2, size, size, device=device, dtype=getattr(torch, precision))
    seconds = []
    for _ in range(PEAK_REPEATS):
        _wait(device)
        begin = time.perf_counter()
        torch.mm(a, b)
        _wait(device)
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
