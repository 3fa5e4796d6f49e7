"""Counts floating-point operations and bytes of the real model on fake tensors, by torch's own formulas.

A pass on fake tensors dispatches every operation of a real pass, at any size, in seconds and without memory. Without a
GPU, fake CUDA tensors have no backward pass, so a GPU is planned on fake CPU tensors with the GPU's rules.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from flows.planning.base import BaseConfig
from tasks.train.optimizer import choose_trained
from tasks.train.spec import TrainSpec
from tasks.train.utilisation import Operations
from trip_model import unet_blocks
from trip_model.config import TripConfig
from trip_model.model import Trip
from trip_model.unet import UNet3D, UNetConfig


@dataclass(frozen=True)
class Kernels:
    """Kernels of the same cost: floating-point operations and bytes read and written of one, and how many there are."""

    flops: int
    bytes_moved: int
    calls: int


@dataclass(frozen=True)
class PassCounts:
    """One forward and backward pass of a batch; one multiplication with its addition is 2 FLOPs."""

    forward_flops: int
    flops: int  # forward and backward, recomputed activations included
    saved_bytes: int  # kept from forward for backward, without parameters
    peak_bytes: int  # the peak, without parameters, their gradients and the inputs
    kernels: tuple[Kernels, ...] = ()


@dataclass(frozen=True)
class StepCounts:
    """The cost of a training step, with activations kept or recomputed."""

    flops: int  # of one clip, forward and backward
    activation_bytes: int  # added to the peak by each further clip
    fixed_bytes: int  # the rest of the peak, whatever the batch: autocast's copies of the weights
    kernels: tuple[tuple[Kernels, ...], tuple[Kernels, ...]] = ((), ())  # of a pass of one clip and of two


@dataclass(frozen=True)
class ModelCounts:
    """The size of a model, and the cost of a training step."""

    parameters: int
    trained: int  # of them
    largest_layer: int  # parameters of the largest part that is gathered at once when sharded
    forward_flops: int  # of one clip
    kept: StepCounts
    recomputed: StepCounts


def count_model(
    base: BaseConfig, train: TrainSpec, gpu: bool, frame_size: tuple[int, int] | None = None
) -> ModelCounts:
    """Counts one training step of TRIP on this base. Memory is linear in the batch: two batches give both terms.

    Sharded layers have the precision of the arithmetic, in which FSDP2 gathers them.

    Args:
        base: the sizes of the base's networks.
        train: the training, whose batch and precision count.
        gpu: count by a GPU's rules; else by a CPU's.
        frame_size: (width, height) of the frames; None is the model's square.
    """
    config, bfloat16 = train.model, train.precision == "bfloat16"
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        trip = new_trip(base, config)
    _refill(trip.unet, "meta")  # peft moves what it adds, which fake tensors refuse
    choose_trained(trip, train)
    with fake:
        _refill(trip.unet, "cpu")
        layers = list(trip.unet.layers())
        if train.sharded and bfloat16:
            for layer in layers:
                _refill(layer, "cpu", torch.bfloat16)

        def step(recompute: bool) -> tuple[int, StepCounts]:
            trip.unet.recompute_activations = recompute
            one, two = (
                count_pass(trip, new_inputs(base, config, batch, frame_size), gpu, bfloat16) for batch in (1, 2)
            )
            per_clip = two.peak_bytes - one.peak_bytes
            fixed = one.peak_bytes - per_clip
            return one.forward_flops, StepCounts(one.flops, per_clip, fixed, (one.kernels, two.kernels))

        forward_flops, kept = step(recompute=False)
        _, recomputed = step(recompute=True)
    return ModelCounts(
        parameters=sum(p.numel() for p in trip.parameters()),
        trained=sum(p.numel() for p in trip.parameters() if p.requires_grad),
        largest_layer=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
        forward_flops=forward_flops,
        kept=kept,
        recomputed=recomputed,
    )


def _refill(module: nn.Module, device: str, dtype: torch.dtype = torch.float32) -> None:
    """Replaces all parameters of a module by new ones of the same shapes."""
    for part in module.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(torch.empty(p.shape, device=device, dtype=dtype), p.requires_grad))


def new_trip(base: BaseConfig, config: TripConfig) -> Trip:
    """TRIP in training mode, on a 3D-UNet with fresh weights."""
    return Trip(UNet3D(UNetConfig.from_json(base.unet)), config).train()


def new_inputs(
    base: BaseConfig, config: TripConfig, batch: int, frame_size: tuple[int, int] | None = None
) -> tuple[torch.Tensor, ...]:
    """Arguments of `Trip.forward` for a batch, shaped as training's."""
    channels, frames, height, width = base.latent_shape(config, frame_size)
    return (
        torch.empty(batch, channels, frames, height, width),
        torch.empty(batch, channels, 1, height, width),
        torch.zeros(batch, dtype=torch.int64),
        torch.empty(batch, *base.text_shape()),
    )


def count_pass(trip: Trip, inputs: tuple[torch.Tensor, ...], gpu: bool = False, bfloat16: bool = False) -> PassCounts:
    """Runs and counts one forward and backward pass; on real or fake tensors."""
    owned = {p.untyped_storage()._cdata for p in trip.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    rules = _gpu_rules(bfloat16) if gpu else contextlib.nullcontext()
    trained = [p for p in trip.parameters() if p.requires_grad]
    with rules, torch.autocast("cpu", torch.bfloat16, enabled=bfloat16), StepCounter(owned) as counter:
        hooks = [p.register_post_accumulate_grad_hook(lambda p: counter.forget(p.grad)) for p in trained]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = trip(*inputs).square().mean()
        forward_flops = counter.flops
        loss.backward()
    for hook in hooks:
        hook.remove()
    trip.zero_grad(set_to_none=True)
    kernels = tuple(Kernels(*cost, calls) for cost, calls in sorted(counter.costs.items()))
    return PassCounts(forward_flops, counter.flops, sum(saved.values()), counter.peak, kernels)


class StepCounter(Operations):
    """Counts the FLOPs of all operations, the bytes that each moves, and the peak of the bytes that are live."""

    def __init__(self, ignored: set[int]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.costs: Counter[tuple[int, int]] = Counter()  # calls by FLOPs and bytes moved
        self._ignored = ignored
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.flops
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        if not func.is_view:
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            self.costs[self.flops - before, sum(x.nbytes for x in tensors)] += 1
        return out

    def forget(self, tensor: Any) -> None:
        """Stops counting a tensor."""
        storage = tensor.untyped_storage()
        if self._known.pop(storage._cdata, None) is not None:
            self.live -= storage.nbytes()

    def _add(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._known or address in self._ignored:
            return

        def drop(_: Any) -> None:
            if self._known.pop(address, None) is not None:
                self.live -= size

        self._known[address] = weakref.ref(storage, drop)
        self.live += size
        self.peak = max(self.peak, self.live)


@contextlib.contextmanager
def _gpu_rules(bfloat16: bool) -> Iterator[None]:
    """CUDA's rules for CPU tensors: norms in float32 under autocast, fused attention whatever the length.

    The CPU's autocast has the same list of bfloat16 operations, but leaves norms in bfloat16. The functions are
    replaced because a `TorchFunctionMode` is off while the backward pass recomputes activations.
    """
    kept = (F.scaled_dot_product_attention, F.group_norm, F.layer_norm, unet_blocks.SHORT)
    attention, group_norm, layer_norm, _ = kept

    def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: Any = None, *rest: Any, **more: Any) -> Any:
        if attn_mask is not None or not bfloat16:
            return attention(q, k, v, attn_mask, *rest, **more)
        q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]

    def exact(norm: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *values: norm(*(v.float() if isinstance(v, torch.Tensor) else v for v in values))

    try:
        F.scaled_dot_product_attention = flash
        F.group_norm, F.layer_norm = exact(group_norm), exact(layer_norm)
        unet_blocks.SHORT = 0
        yield
    finally:
        F.scaled_dot_product_attention, F.group_norm, F.layer_norm, unet_blocks.SHORT = kept


def count_text(base: BaseConfig) -> tuple[int, int]:
    """(parameters, FLOPs of one caption) of the text encoder."""
    with FakeTensorMode():
        model = CLIPTextModel(CLIPTextConfig(**base.text)).eval()
        return _forward(model, lambda: model(torch.zeros(1, base.text["max_position_embeddings"], dtype=torch.int64)))


def count_vae(base: BaseConfig, frame_size: tuple[int, int]) -> tuple[int, int]:
    """(parameters, FLOPs of encoding one frame of (width, height) pixels) of the VAE."""
    with FakeTensorMode():
        vae: Any = AutoencoderKL.from_config(base.vae)
        return _forward(vae, lambda: vae.eval().encode(torch.empty(1, 3, *frame_size[::-1])))


def _forward(model: nn.Module, run: Any) -> tuple[int, int]:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()
