"""The noise schedule (Equation 1, Section 4.1) and the DDIM sampler, built on diffusers' schedulers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler

from trip_model.config import BaseSchedule, ScheduleConfig

PAPER = ScheduleConfig()  # Section 4.1


class NoiseSchedule:
    """alpha-bar of every time step in float32, and what is computed from it.

    A time step t is the 0-based index of diffusers: the paper's t = 1..T is t - 1 here.
    """

    def __init__(self, config: ScheduleConfig = PAPER) -> None:
        self.config = config
        self.alphas_cumprod_T: torch.Tensor = self.ddim().alphas_cumprod
        self._unet_steps_T = None if config.base is None else matched_steps(self.alphas_cumprod_T, config.base)

    def ddim(self) -> DDIMScheduler:
        """diffusers' DDIM with the settings that are right for latents: no clipping of x0. `ddim_step` is our own."""
        config = self.config
        return DDIMScheduler(
            num_train_timesteps=config.num_train_timesteps,
            beta_start=config.beta_start,
            beta_end=config.beta_end,
            beta_schedule=config.beta_schedule,
            timestep_spacing=config.timestep_spacing,
            clip_sample=False,
            set_alpha_to_one=True,
            steps_offset=0,
            prediction_type="epsilon",
        )

    def sampling_times(self, steps: int) -> list[tuple[int, int | None]]:
        """The time step of each of `steps` DDIM steps and the one it goes to, None for the clean latent."""
        scheduler: Any = self.ddim()
        scheduler.set_timesteps(steps)
        # For 62 numbers of steps, 61 the first, diffusers' trailing grid has one time more, which is -1.
        times = scheduler.timesteps.tolist()[:steps]
        return list(zip(times, [*times[1:], None], strict=True))

    def ddim_step(self, z_t: torch.Tensor, noise: torch.Tensor, t: int, t_next: int | None) -> torch.Tensor:
        """One DDIM step (eta 0) from time step `t` to `t_next`, None for the clean latent.

        diffusers' own goes to t - T // steps, which is not the next time of the grid unless `steps` divides T.
        """
        abar = self.alphas_cumprod_T[t]
        abar_next = torch.ones(()) if t_next is None else self.alphas_cumprod_T[t_next]
        z_0 = (z_t - (1 - abar) ** 0.5 * noise) / abar**0.5
        return abar_next**0.5 * z_0 + (1 - abar_next) ** 0.5 * noise

    def unet_steps(self, t_B: torch.Tensor) -> torch.Tensor:
        """What the 3D-UNet is told for time steps `t_B`: themselves, or under the bridge `snr` the matched ones."""
        return t_B if self._unet_steps_T is None else self._unet_steps_T.to(t_B.device)[t_B]

    def signal_and_noise(self, t_B: torch.Tensor, ndim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(sqrt(abar_t), sqrt(1 - abar_t)) of Equation 1, float32, shaped [B, 1, ...] to meet a tensor of `ndim`."""
        abar_B = self.alphas_cumprod_T.to(t_B.device)[t_B]
        shape = (-1, *(1,) * (ndim - 1))
        return abar_B.sqrt().view(shape), (1 - abar_B).sqrt().view(shape)

    def add_noise(self, z_0: torch.Tensor, noise: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """Forward diffusion (Equation 1): z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps, in float32."""
        signal, sigma = self.signal_and_noise(t_B, z_0.ndim)
        return signal * z_0.float() + sigma * noise.float()


def bridged(config: ScheduleConfig, base: str | Path) -> ScheduleConfig:
    """The schedule as it is trained with on a base: its `bridge` carried out, and recorded.

    Raises:
        ValueError: betas that the base's scheduler names and this project does not know.
    """
    if config.bridge == "paper":
        return config
    found = read_base_schedule(base)
    if config.bridge == "snr":
        return replace(config, base=found)
    return replace(
        config,
        beta_start=found.beta_start,
        beta_end=found.beta_end,
        beta_schedule=found.beta_schedule,
        num_train_timesteps=found.num_train_timesteps,
    )


def read_base_schedule(base: str | Path) -> BaseSchedule:
    """The schedule of a base folder; what its `scheduler_config.json` leaves out is as diffusers has it."""
    file = Path(base) / "scheduler" / "scheduler_config.json"
    said = json.loads(file.read_text())
    if said.get("beta_schedule", "linear") not in ("linear", "scaled_linear") or said.get("trained_betas"):
        raise ValueError(f"{file}: beta_schedule {said.get('beta_schedule')!r}, expected 'linear' or 'scaled_linear'")
    return BaseSchedule(
        beta_start=float(said.get("beta_start", 1e-4)),
        beta_end=float(said.get("beta_end", 2e-2)),
        beta_schedule=said.get("beta_schedule", "linear"),
        num_train_timesteps=int(said.get("num_train_timesteps", 1000)),
    )


def matched_steps(alphas_cumprod_T: torch.Tensor, base: BaseSchedule) -> torch.Tensor:
    """The base's time step of equal signal-to-noise ratio for every step of a schedule, float32 [T], fractional.

    z_t depends on t through abar_t alone, so at the matched step the 3D-UNet meets exactly what it was trained on.
    Steps noisier than the base's last one are told as that one: its range ends there.
    """
    theirs = NoiseSchedule(replace(ScheduleConfig(), **vars(base))).alphas_cumprod_T.double()
    ours = alphas_cumprod_T.double()
    steps = np.interp(-ours.logit().numpy(), -theirs.logit().numpy(), np.arange(base.num_train_timesteps))
    return torch.from_numpy(steps).float()
