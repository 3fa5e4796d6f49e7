"""Validation during training: held-out losses by time step and frame, motion, sample clips."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tasks.train.loader import Batch, TrainingData
from tasks.train.spec import ValidationSpec
from trip_model.encoders import TextEncoder, decode_latents
from trip_model.model import Trip
from trip_model.objective import addressed_generator
from trip_model.pipeline import sample_latents

LOSS = "validation_loss"


@dataclass(frozen=True)
class ValidationResult:
    """One validation: metrics by name, and sample clips, uint8 [F, H, W, 3] by the sample's key."""

    metrics: dict[str, float]
    clips: dict[str, np.ndarray]


class Validation:
    """Validates a model on held-out clips. Every validation draws the same noise, so results differ only by the model.

    Raises:
        UserError: a held-out clip cannot be read.
    """

    def __init__(
        self, spec: ValidationSpec, data: TrainingData, vae: Any, text: TextEncoder, batch: int, device: str
    ) -> None:
        self._spec, self._vae, self._text, self._device = spec, vae, text, device
        self._batch = batch
        scaling = float(vae.config.scaling_factor)
        # A group for each frame size.
        self._groups = [_HeldOut.of(held_out, scaling) for held_out in data.held_out(spec.clips)]
        self._count = sum(len(group.keys) for group in self._groups)

    @torch.no_grad()
    def validate(self, trip: Trip) -> ValidationResult:
        """Measures and animates in evaluation mode; the mode of the model and the random state do not change."""
        with _evaluating(trip):
            clips, motion = self._animate(trip) if self._spec.animated else ({}, {})
            return ValidationResult(self._losses(trip) | motion, clips)

    def _losses(self, trip: Trip) -> dict[str, float]:
        """Mean squared errors of the noise in total, by band of time steps and by frame; and of z_0 by band.

        The error of z_0 is the error of the noise times (1 - abar) / abar, as the sampler sees it: hundreds of times
        larger at the noisy end. Frame 1 is known from the image, so its error goes to zero.
        """
        count, bands = self._count, self._spec.bands
        steps_T = trip.config.schedule.num_train_timesteps
        errors = []
        position_B = (torch.arange(count) + 0.5) / count
        times = [((band + position_B) / bands * steps_T).long() for band in range(bands)]  # spread over each band
        for t_B in times:
            error_BF = torch.empty(count, trip.config.num_frames)
            for group in self._groups:
                for part in torch.arange(len(group.keys)).split(self._batch):
                    clips = group.clips_B[part]
                    error_BF[clips] = self._errors(trip, group, part, t_B[clips])
            errors.append(error_BF)
        error_TBF = torch.stack(errors)
        signal, sigma = trip.schedule.signal_and_noise(torch.arange(steps_T), 1)
        gain = (sigma / signal).square()
        metrics = {LOSS: error_TBF.mean().item()}
        for band, error_BF in enumerate(error_TBF):
            first, last = band * steps_T // bands, (band + 1) * steps_T // bands - 1
            metrics[f"validation_loss/t_{first:03d}_{last:03d}"] = error_BF.mean().item()
            metrics[f"validation_z0_error/t_{first:03d}_{last:03d}"] = (
                (gain[times[band]][:, None] * error_BF).mean().item()
            )
        for frame, error in enumerate(error_TBF.mean(dim=(0, 1)).tolist(), 1):
            metrics[f"validation_loss/frame_{frame:02d}"] = error
        return metrics

    def _errors(self, trip: Trip, group: _HeldOut, part: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        z_0 = group.z_0_BCFHW[part].to(self._device)
        noise = group.noise("validation", part, t_B).to(self._device)
        t_B = t_B.to(self._device)
        z_t = trip.schedule.add_noise(z_0, noise, t_B)
        predicted = trip(z_t, z_0[:, :, :1], t_B, self._text.encode(group.tokens_BL[part]))
        return (predicted - noise).square().mean(dim=(1, 3, 4)).cpu()

    def _animate(self, trip: Trip) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        animated = min(self._spec.animated, self._count)
        clips: dict[str, np.ndarray] = {}
        motion = [0.0, 0.0]  # of the generated clips and of the real ones
        for group in self._groups:
            part = torch.nonzero(group.clips_B < animated)[:, 0]
            if not len(part):
                continue
            real = group.z_0_BCFHW[part].to(self._device)
            noise = group.noise("validation-clip", part, torch.zeros_like(part)).to(self._device)
            generated = sample_latents(
                trip,
                real[:, :, :1],
                self._text.encode(group.tokens_BL[part]),
                self._text.encode(self._text.tokenize([""])),
                noise,
                trip.config.schedule.sampling_steps,
                trip.config.guidance,
            )
            for place, z in enumerate((generated, real)):
                motion[place] += z.diff(dim=2).abs().mean().item() * (len(part) / animated)
            self._vae.to(self._device)
            for i, z in zip(part.tolist(), generated, strict=True):
                clips[group.keys[i]] = decode_latents(self._vae, z.permute(1, 0, 2, 3))
            self._vae.to("cpu")
        return clips, {"validation_motion_ratio": motion[0] / motion[1]} if motion[1] > 0 else {}


@dataclass(frozen=True)
class _HeldOut:
    """The held-out clips of one frame size."""

    keys: tuple[str, ...]
    clips_B: torch.Tensor  # int64, the number of each among all held-out clips: the address of its noise
    tokens_BL: torch.Tensor
    z_0_BCFHW: torch.Tensor  # final latents

    @classmethod
    def of(cls, batch: Batch, scaling: float) -> _HeldOut:
        z_0 = batch.raw_latents_BFCHW.permute(0, 2, 1, 3, 4) * scaling
        return cls(batch.keys, torch.tensor(batch.positions), batch.tokens_BL, z_0)

    def noise(self, purpose: str, part: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """Returns the noise of some of the clips: float32 [B, C, F, H, W]."""
        shape = self.z_0_BCFHW.shape[1:]
        return torch.stack(
            [
                torch.randn(shape, generator=addressed_generator(purpose, 0, int(clip), int(t)))
                for clip, t in zip(self.clips_B[part], t_B, strict=True)
            ]
        )


@contextmanager
def _evaluating(trip: Trip) -> Iterator[None]:
    training = trip.training
    trip.eval()
    try:
        yield
    finally:
        trip.train(training)
