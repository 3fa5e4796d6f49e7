"""The noise schedule (Equation 1, Section 4.1) and the DDIM sampler, built on diffusers' schedulers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler


@dataclass(frozen=True)
class ScheduleConfig:
    """The schedule that a model was trained with; it travels with the model.

    The defaults are the paper's (Section 4.1). Spacing is not in the paper: `trailing` starts DDIM at the last trained
    step and never visits index 0, where the prior's gain is 100 (docs/decisions/schedule.md).
    """

    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 2e-2
    beta_schedule: Literal["linear", "scaled_linear"] = "linear"
    timestep_spacing: Literal["trailing", "leading", "linspace"] = "trailing"
    sampling_steps: int = 50


class NoiseSchedule:
    """alpha-bar of every time step in float32, and what is computed from it.

    A time step t is the 0-based index of diffusers: the paper's t = 1..T is t - 1 here.
    """

    def __init__(self, config: ScheduleConfig = ScheduleConfig()) -> None:
        self.config = config
        self.alphas_cumprod_T: torch.Tensor = self.ddim().alphas_cumprod

    def ddim(self) -> DDIMScheduler:
        """A fresh DDIM sampler (eta 0) with the settings that are right for latents: no clipping of x0."""
        known: dict[str, Any] = asdict(self.config)
        known.pop("sampling_steps")
        return DDIMScheduler(
            **known, clip_sample=False, set_alpha_to_one=True, steps_offset=0, prediction_type="epsilon"
        )

    def signal_and_noise(self, t_B: torch.Tensor, ndim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(sqrt(abar_t), sqrt(1 - abar_t)) of Equation 1, float32, shaped [B, 1, ...] to meet a tensor of `ndim`."""
        abar_B = self.alphas_cumprod_T.to(t_B.device)[t_B]
        shape = (-1, *(1,) * (ndim - 1))
        return abar_B.sqrt().view(shape), (1 - abar_B).sqrt().view(shape)

    def add_noise(self, z_0: torch.Tensor, noise: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """Forward diffusion (Equation 1): z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps, in float32."""
        signal, sigma = self.signal_and_noise(t_B, z_0.ndim)
        return signal * z_0.float() + sigma * noise.float()
