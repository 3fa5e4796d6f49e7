"""FSDP2: weights, gradients and optimiser state in shards over the ranks, gathered layer by layer as they are used.

What lies in checkpoints is whole tensors, so that any number of workers continues, sharded or not.
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

    With `bfloat16` the layers of the 3D-UNet are gathered in it, and their gradients summed in float32; what is left,
    the fusion module with it, is gathered in float32. Autocast decides about the arithmetic, as without shards.
    """
    mesh = init_device_mesh(device, (world,))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bfloat16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in trip.unet.layers():
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # By default the root stays gathered after a forward pass, and would not see weights that are put in between two.
    fully_shard(trip, mesh=mesh, reshard_after_forward=True)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a tensor, the same memory; a plain tensor as it is."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def whole(tensors: Mapping[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """Sharded tensors in full, on the CPU, one after another; plain ones as they are. All ranks must ask.

    Ranks that do not `keep` them get none, and never hold more than one.
    """
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            found[name] = full.cpu() if isinstance(tensor, DTensor) else full
    return found


def like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor on the device of a parameter and sharded as it is, if it has its shape; without communication."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
