"""The 3D-UNet of the residual path: diffusers' `UNet3DConditionModel`, loaded from a base folder."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet3DConditionModel
from torch import nn

from trip_model.encoders import BaseFolderError


class TemporalConv(nn.Conv3d):
    """A (3, 1, 1) convolution run as a (3, 1) convolution over [B, C, F, H W]: same weights, same numbers.

    CPU kernels for Conv3d fall back to im2col, and several GPU releases had slow or wrong bfloat16 Conv3d.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        batch, _, frames, height, width = input.shape
        out = F.conv2d(input.reshape(batch, -1, frames, height * width), self.weight[..., 0], self.bias, padding=(1, 0))
        return out.view(batch, -1, frames, height, width)


def load_unet(folder: str | Path) -> UNet3DConditionModel:
    """The 3D-UNet of a base or model folder (its `unet/`), float32, with the temporal convolutions of `TemporalConv`.

    Raises:
        BaseFolderError: the folder's `unet/` cannot be read.
    """
    try:
        unet = UNet3DConditionModel.from_pretrained(
            Path(folder) / "unet", torch_dtype=torch.float32, use_safetensors=True, low_cpu_mem_usage=False
        )
    except (OSError, ValueError) as error:
        raise BaseFolderError(f"the 3D-UNet of {folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    return use_temporal_conv(unet)


def use_temporal_conv(unet: UNet3DConditionModel) -> UNet3DConditionModel:
    """Makes every (3, 1, 1) convolution run through `TemporalConv`; parameters and state-dict keys stay as they are."""
    for module in unet.modules():
        if type(module) is nn.Conv3d and module.kernel_size == (3, 1, 1):
            module.__class__ = TemporalConv
    return unet


def widen_input(unet: UNet3DConditionModel) -> UNet3DConditionModel:
    """TRIP_C (Table 5): doubles `conv_in`'s input channels; the new weights are zero, so the output is unchanged."""
    old = unet.conv_in
    wide = nn.Conv2d(2 * old.in_channels, old.out_channels, (3, 3), padding=(1, 1))
    assert old.bias is not None and wide.bias is not None
    with torch.no_grad():
        wide.weight.zero_()
        wide.weight[:, : old.in_channels] = old.weight
        wide.bias.copy_(old.bias)
    unet.conv_in = wide
    unet.register_to_config(in_channels=2 * old.in_channels)
    return unet


def set_dropout(unet: nn.Module, probability: float) -> None:
    """Sets every dropout of the 3D-UNet; diffusers hard-codes 0.1 in its temporal convolutions."""
    for module in unet.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
