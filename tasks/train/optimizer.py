"""Which weights are trained and how they move: AdamW, its learning rates, and the moving average that is exported."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tasks.train.checkpoints import Tensors
from tasks.train.lora import add_adapters, is_projection
from tasks.train.sharding import like, local
from tasks.train.spec import TrainSpec
from trip_model.model import Trip

# Parts of the 3D-UNet that mix frames; the others came with the image model that the base was grown from.
TEMPORAL = ("transformer_in", "temp_convs", "temp_attentions")


def choose_trained(model: Trip, spec: TrainSpec) -> None:
    """Freezes what `spec.trained` leaves out, after adding adapters if it asks for them."""
    if spec.trained == "lora":
        add_adapters(model.unet, spec)
    elif spec.trained == "temporal":
        for name, parameter in model.unet.named_parameters():
            parameter.requires_grad_(_is_temporal(name))


def trained_parameters(shapes: Mapping[str, Sequence[int]], spec: TrainSpec) -> int:
    """How many parameters `choose_trained` would leave to train of a 3D-UNet whose weights have these shapes."""
    if spec.trained == "lora":
        adapted = (sum(shape) for name, shape in shapes.items() if is_projection(name))  # [out, in]
        return spec.lora_rank * sum(adapted)
    return sum(math.prod(shape) for name, shape in shapes.items() if spec.trained == "all" or _is_temporal(name))


def _is_temporal(name: str) -> bool:
    return any(part in name.split(".") for part in TEMPORAL)


def trained_weights(model: Trip) -> dict[str, nn.Parameter]:
    """The weights that are not frozen, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_optimizer(model: Trip, spec: TrainSpec) -> torch.optim.AdamW:
    """AdamW with the paper's two learning rates: 2e-6 for the 3D-UNet and 2e-4 for TNF."""
    unet = [parameter for parameter in model.unet.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": unet, "base_lr": spec.learning_rate_unet}]
    if model.fusion is not None:
        groups.append({"params": list(model.fusion.parameters()), "base_lr": spec.learning_rate_fusion})
    return torch.optim.AdamW(groups, lr=spec.learning_rate_unet, weight_decay=spec.weight_decay, fused=True)


def learning_rate_factor(step: int, spec: TrainSpec) -> float:
    """What both learning rates are multiplied with at a step: linear warm-up, then constant or cosine."""
    warm = min(1.0, (step + 1) / spec.warmup_steps) if spec.warmup_steps else 1.0
    if not spec.cosine:
        return warm
    through = max(0, step - spec.warmup_steps) / max(1, spec.steps - spec.warmup_steps)
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, through)))


class MovingAverage:
    """The exponential moving average of the trained weights; with a decay of 0 there is none, and it holds nothing.

    Of sharded weights every rank averages its shards.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], decay: float) -> None:
        self._weights, self._decay = weights, decay
        self.tensors: Tensors = {name: p.detach().clone() for name, p in weights.items()} if decay else {}

    @torch.no_grad()
    def restore(self, tensors: Tensors) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(like(tensors[name], tensor))

    @torch.no_grad()
    def update(self, step: int) -> None:
        if self.tensors:
            # A young average forgets faster, so that the first weights do not linger in a short run.
            keep = min(self._decay, (1 + step) / (10 + step))
            averages = [local(average) for average in self.tensors.values()]
            torch._foreach_lerp_(averages, [local(p) for p in self._weights.values()], 1 - keep)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """The model with the average for its weights; afterwards it has its own again, bit for bit."""
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
