"""FSDP2: weights, gradients and optimiser state in shards over the ranks, gathered layer by layer.

Checkpoints contain full tensors, so any number of workers can resume, sharded or not.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from trip_model.model import Trip


def shard(trip: Trip, device: str, world: int, bfloat16: bool) -> None:
    """Shards a TRIP in place over all ranks; its parameters become `DTensor`s, float32 as before.

    With `bfloat16` the layers of the 3D-UNet are gathered in bfloat16, and their gradients summed in float32; all other
    parameters, the fusion module's too, are gathered in float32. Autocast sets the precision of the arithmetic.
    """
    mesh = init_device_mesh(device, (world,))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bfloat16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in trip.unet.layers():
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # By default the root stays gathered after a forward pass, and ignores weights that are replaced between two passes.
    fully_shard(trip, mesh=mesh, reshard_after_forward=True)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this rank's shard of a tensor, sharing its memory; a plain tensor unchanged."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Gathers a sharded tensor; a plain tensor is unchanged. A collective: all ranks call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_tensors(tensors: Mapping[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """Gathers sharded tensors on the CPU, one at a time; plain tensors are unchanged. A collective: all ranks call it.

    Ranks without `keep` get an empty dictionary, and hold one full tensor at most.
    """
    gathered = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        full = full_tensor(tensor)
        if keep:
            gathered[name] = full.cpu() if isinstance(tensor, DTensor) else full
    return gathered


def shard_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Moves a full tensor to a parameter's device, and shards it the same way if the shapes agree. No communication."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
