"""The mid-size 3D-UNet of the CPU benchmarks, ours and diffusers' eager class with the same weights."""

from __future__ import annotations

import json

from diffusers import UNet3DConditionModel
from torch import nn

from trip_model.unet import UNet3D, UNetConfig, set_dropout


def mid_size(head_width: int = 8, layers: int = 1) -> UNetConfig:
    """14 million parameters in four levels."""
    return UNetConfig(
        block_out_channels=(64, 128, 128, 128),
        layers_per_block=layers,
        attention_head_dim=head_width,
        cross_attention_dim=256,
    )


def both_networks(config: UNetConfig) -> tuple[UNet3D, UNet3DConditionModel]:
    """Returns ours and diffusers', without dropout, with equal random weights."""
    ours = UNet3D(config)
    for module in ours.modules():
        if isinstance(module, nn.Conv3d):  # a new network's temporal convolutions end in zeros
            nn.init.normal_(module.weight, std=0.02)
    settings = {k: v for k, v in json.loads(config.to_json()).items() if not k.startswith("_")}
    theirs = UNet3DConditionModel(**settings)
    theirs.load_state_dict(ours.state_dict())
    for unet in (ours, theirs):
        set_dropout(unet, 0.0)
    return ours, theirs
