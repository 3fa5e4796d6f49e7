"""First-frame conditioning of the 3D-UNet (Section 3.2 and Table 5): TRIP, TRIP_TE and TRIP_C.

Legend of shape suffixes: B batch, C latent channels, F frames, H and W latent height and width.
"""

from __future__ import annotations

import torch

from trip_model.config import Condition


def unet_input(z_t_BCFHW: torch.Tensor, z_first_BC1HW: torch.Tensor, condition: Condition) -> torch.Tensor:
    """Concatenates the noised frames and the clean first frame: {z_0^1, z_t^1 .. z_t^N} for TRIP.

    Returns:
        [B, C, F + 1, H, W] for head and tail, [B, 2C, F, H, W] for channel.
    """
    z_first = z_first_BC1HW.to(z_t_BCFHW.dtype)
    if condition == "head":
        return torch.cat([z_first, z_t_BCFHW], dim=2)
    if condition == "tail":
        return torch.cat([z_t_BCFHW, z_first], dim=2)
    if condition == "channel":
        return torch.cat([z_t_BCFHW, z_first.expand_as(z_t_BCFHW)], dim=1)
    raise ValueError(f"condition {condition!r}, expected 'head', 'tail' or 'channel'")


def drop_condition_slot(output_BCFHW: torch.Tensor, condition: Condition) -> torch.Tensor:
    """Returns the 3D-UNet's output without the conditioning slot: [B, C, F, H, W]."""
    if condition == "head":
        return output_BCFHW[:, :, 1:]
    if condition == "tail":
        return output_BCFHW[:, :, :-1]
    return output_BCFHW
