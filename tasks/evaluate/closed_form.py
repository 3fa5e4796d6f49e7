"""The prior with its best weight and no network: the system "closed form" of the results table."""

from __future__ import annotations

import torch
from torch import nn

from trip_model.config import TripConfig
from trip_model.noise_prior import image_noise_prior, optimal_shrinkage
from trip_model.schedule import NoiseSchedule


class ClosedForm(nn.Module):
    """noise = lambda*(t, i) prior: a model of `Trip`'s interface without 3D-UNet and fusion.

    lambda* follows from s_i, which training measured on its data and the export keeps. This is the exact prediction for
    frames z_0^1 + s_i n with white n, so DDIM samples the photo under noise that grows with the frame.
    """

    def __init__(self, config: TripConfig) -> None:
        super().__init__()
        self.config = config
        self.schedule = NoiseSchedule(config.schedule)

    def forward(
        self, z_t_BCFHW: torch.Tensor, z_first_BC1HW: torch.Tensor, t_B: torch.Tensor, text_BLD: torch.Tensor
    ) -> torch.Tensor:
        """Returns the predicted noise, float32 [B, C, F, H, W]; the text is not read."""
        frames, known = z_t_BCFHW.shape[2], self.config.residual_std
        std_F = [known[min(i, len(known) - 1)] for i in range(frames)]
        std = torch.tensor(std_F, dtype=torch.float32, device=z_t_BCFHW.device).view(1, 1, frames, 1, 1)
        signal, sigma = self.schedule.signal_and_noise(t_B, 5)
        prior = image_noise_prior(z_t_BCFHW, z_first_BC1HW, signal, sigma)
        return optimal_shrinkage(signal, sigma, std) * prior
