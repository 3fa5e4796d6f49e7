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
    """alpha-bar of every time step in float32, with forward diffusion and DDIM.

    Time steps are 0-based as in diffusers: the paper's t = 1..T is t - 1 here.
    """

    def __init__(self, config: ScheduleConfig = PAPER) -> None:
        self.config = config
        self.alphas_cumprod_T: torch.Tensor = self.ddim().alphas_cumprod
        self._conditioning_steps_T = None if config.base is None else matched_steps(self.alphas_cumprod_T, config.base)
        self._copies: dict[tuple[str, torch.device], torch.Tensor] = {}

    def ddim(self) -> DDIMScheduler:
        """Returns diffusers' DDIM scheduler without clipping of x0. Sampling uses `ddim_step` instead of its `step`."""
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
        """Returns (t, t_next) of each of `steps` DDIM steps; t_next is None for the clean latent.

        Raises:
            ValueError: the grid starts in the clean half of the schedule, where a start from noise means nothing.
        """
        scheduler: Any = self.ddim()
        scheduler.set_timesteps(steps)
        # For 62 values of `steps`, the first is 61, diffusers' trailing grid ends with an additional time step -1.
        times = scheduler.timesteps.tolist()[:steps]
        self.check_start(times[0], steps)
        return list(zip(times, [*times[1:], None], strict=True))

    def check_start(self, t: int, steps: int) -> None:
        """Raises ValueError if sampling from noise would start at `t`, in the clean half of the schedule."""
        last = self.config.num_train_timesteps - 1
        if t <= last / 2:
            raise ValueError(
                f"a grid of {steps} steps with timestep_spacing {self.config.timestep_spacing!r} starts at time step"
                f" {t}, expected one near the last, {last}, which is noise; use another number of steps, or 'trailing'"
            )

    def ddim_step(self, z_t: torch.Tensor, noise: torch.Tensor, t: int, t_next: int | None) -> torch.Tensor:
        """One DDIM step (eta 0) from time step `t` to `t_next`, None for the clean latent.

        diffusers' step goes to t - T // steps, which is the next time step of the grid only if `steps` divides T.
        """
        abar = self.alphas_cumprod_T[t]
        abar_next = torch.ones(()) if t_next is None else self.alphas_cumprod_T[t_next]
        z_0 = (z_t - (1 - abar) ** 0.5 * noise) / abar**0.5
        return abar_next**0.5 * z_0 + (1 - abar_next) ** 0.5 * noise

    def conditioning_step(self, t_B: torch.Tensor) -> torch.Tensor:
        """Returns the time steps passed to the 3D-UNet: `t_B`, or the base's steps of equal SNR if `bridge="snr"`."""
        if self._conditioning_steps_T is None:
            return t_B
        return self._on_device("conditioning_steps", self._conditioning_steps_T, t_B.device)[t_B]

    def signal_and_noise(self, t_B: torch.Tensor, ndim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (sqrt(abar_t), sqrt(1 - abar_t)) of Equation 1, float32 [B, 1, ...] with `ndim` dimensions."""
        abar_B = self._on_device("alphas_cumprod", self.alphas_cumprod_T, t_B.device)[t_B]
        shape = (-1, *(1,) * (ndim - 1))
        return abar_B.sqrt().view(shape), (1 - abar_B).sqrt().view(shape)

    def _on_device(self, name: str, table_T: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Returns the table on a device, copied there once: each copy makes the process wait for a GPU."""
        if device == table_T.device:
            return table_T
        if (name, device) not in self._copies:
            self._copies[name, device] = table_T.to(device)
        return self._copies[name, device]

    def add_noise(self, z_0: torch.Tensor, noise: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """Forward diffusion (Equation 1): z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps, in float32."""
        signal, sigma = self.signal_and_noise(t_B, z_0.ndim)
        return signal * z_0.float() + sigma * noise.float()


def to_base_schedule(config: ScheduleConfig, base: str | Path) -> ScheduleConfig:
    """Returns the schedule of a training on this base: applies and records `config.bridge`.

    Raises:
        ValueError: the base's scheduler has a `beta_schedule` other than linear or scaled_linear.
    """
    if config.bridge == "paper":
        return config
    base_schedule = read_base_schedule(base)
    if config.bridge == "snr":
        return replace(config, base=base_schedule)
    return replace(
        config,
        beta_start=base_schedule.beta_start,
        beta_end=base_schedule.beta_end,
        beta_schedule=base_schedule.beta_schedule,
        num_train_timesteps=base_schedule.num_train_timesteps,
    )


def read_base_schedule(base: str | Path) -> BaseSchedule:
    """Returns the schedule of a base folder; values missing in `scheduler_config.json` are diffusers' defaults."""
    file = Path(base) / "scheduler" / "scheduler_config.json"
    settings: dict[str, Any] = json.loads(file.read_text())
    kind = settings.get("beta_schedule", "linear")
    if kind not in ("linear", "scaled_linear") or settings.get("trained_betas"):
        raise ValueError(f"{file}: beta_schedule {kind!r}, expected 'linear' or 'scaled_linear'")
    return BaseSchedule(
        beta_start=float(settings.get("beta_start", 1e-4)),
        beta_end=float(settings.get("beta_end", 2e-2)),
        beta_schedule=kind,
        num_train_timesteps=int(settings.get("num_train_timesteps", 1000)),
    )


def matched_steps(alphas_cumprod_T: torch.Tensor, base: BaseSchedule) -> torch.Tensor:
    """Returns the base's fractional time step of equal signal-to-noise ratio for every step of a schedule, float32 [T].

    z_t depends on t only through abar_t, so at the matched step the input of the 3D-UNet is distributed as in its
    training. Steps noisier than the base's last step are clamped to it.
    """
    theirs = NoiseSchedule(replace(ScheduleConfig(), **vars(base))).alphas_cumprod_T.double()
    ours = alphas_cumprod_T.double()
    steps = np.interp(-ours.logit().numpy(), -theirs.logit().numpy(), np.arange(base.num_train_timesteps))
    return torch.from_numpy(steps).float()
