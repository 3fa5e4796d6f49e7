"""Selects the trained weights, and defines their optimiser, learning rates and moving average."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tasks.train.checkpoints import Tensors
from tasks.train.lora import add_adapters, is_projection
from tasks.train.sharding import local, shard_like
from tasks.train.spec import TrainSpec
from trip_model.model import Trip

# Parts of the 3D-UNet that mix frames; all others come from the image model that the base was built on.
TEMPORAL = ("transformer_in", "temp_convs", "temp_attentions")


def choose_trained(model: Trip, spec: TrainSpec) -> None:
    """Freezes the weights that `spec.trained` excludes; for "lora", adds adapters first."""
    if spec.trained == "lora":
        add_adapters(model.unet, spec)
    elif spec.trained == "temporal":
        for name, parameter in model.unet.named_parameters():
            parameter.requires_grad_(_is_temporal(name))


def trained_parameters(shapes: Mapping[str, Sequence[int]], spec: TrainSpec) -> int:
    """Number of parameters of a 3D-UNet with these shapes that `choose_trained` leaves trainable."""
    if spec.trained == "lora":
        adapted = (sum(shape) for name, shape in shapes.items() if is_projection(name))  # [out, in]
        return spec.lora_rank * sum(adapted)
    return sum(math.prod(shape) for name, shape in shapes.items() if spec.trained == "all" or _is_temporal(name))


def _is_temporal(name: str) -> bool:
    return any(part in name.split(".") for part in TEMPORAL)


def trained_weights(model: Trip) -> dict[str, nn.Parameter]:
    """Returns the weights that are not frozen, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_optimizer(model: Trip, spec: TrainSpec) -> torch.optim.AdamW:
    """AdamW with the paper's two learning rates: 2e-6 for the 3D-UNet and 2e-4 for TNF."""
    unet = [parameter for parameter in model.unet.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"name": "unet", "params": unet, "base_lr": spec.learning_rate_unet}]
    if model.fusion is not None:
        groups.append(
            {"name": "fusion", "params": list(model.fusion.parameters()), "base_lr": spec.learning_rate_fusion}
        )
    return torch.optim.AdamW(groups, lr=spec.learning_rate_unet, weight_decay=spec.weight_decay, fused=True)


def learning_rate_factor(step: int, spec: TrainSpec) -> float:
    """The factor of both learning rates at a step: linear warm-up, then constant or cosine."""
    warm = min(1.0, (step + 1) / spec.warmup_steps) if spec.warmup_steps else 1.0
    if not spec.cosine:
        return warm
    through = max(0, step - spec.warmup_steps) / max(1, spec.steps - spec.warmup_steps)
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, through)))


class MovingAverage:
    """Exponential moving average of the trained weights; empty if the decay is 0.

    If weights are sharded, each rank averages its shards.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], decay: float) -> None:
        self._weights, self._decay = weights, decay
        self.tensors: Tensors = {name: p.detach().clone() for name, p in weights.items()} if decay else {}

    @torch.no_grad()
    def restore(self, tensors: Tensors) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(shard_like(tensors[name], tensor))

    @torch.no_grad()
    def update(self, step: int) -> None:
        if self.tensors:
            # EMA warm-up: a lower decay at the start.
            keep = min(self._decay, (1 + step) / (10 + step))
            averages = [local(average) for average in self.tensors.values()]
            torch._foreach_lerp_(averages, [local(p) for p in self._weights.values()], 1 - keep)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model uses the average inside the block; its own weights are restored afterwards, bit for bit."""
        own = {name: self._weights[name].detach().clone() for name in self.tensors}
        self._put(self.tensors)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            self._weights[name].copy_(tensor)
