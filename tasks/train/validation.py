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
        held_out: Batch = data.held_out(spec.clips)
        self._keys = held_out.keys
        self._tokens = held_out.tokens_BL
        self._z_0 = held_out.raw_latents_BFCHW.permute(0, 2, 1, 3, 4) * float(vae.config.scaling_factor)

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
        count, bands = len(self._keys), self._spec.bands
        steps_T = trip.config.schedule.num_train_timesteps
        errors = []
        position_B = (torch.arange(count) + 0.5) / count
        times = [((band + position_B) / bands * steps_T).long() for band in range(bands)]  # spread over each band
        for t_B in times:
            errors.append(torch.cat([self._errors(trip, part, t_B[part]) for part in self._parts()]))
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

    def _errors(self, trip: Trip, part: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        z_0 = self._z_0[part].to(self._device)
        noise = self._noise("validation", part, t_B).to(self._device)
        t_B = t_B.to(self._device)
        z_t = trip.schedule.add_noise(z_0, noise, t_B)
        predicted = trip(z_t, z_0[:, :, :1], t_B, self._text.encode(self._tokens[part]))
        return (predicted - noise).square().mean(dim=(1, 3, 4)).cpu()

    def _animate(self, trip: Trip) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        part = torch.arange(min(self._spec.animated, len(self._keys)))
        real = self._z_0[part].to(self._device)
        noise = self._noise("validation-clip", part, torch.zeros_like(part)).to(self._device)
        generated = sample_latents(
            trip,
            real[:, :, :1],
            self._text.encode(self._tokens[part]),
            self._text.encode(self._text.tokenize([""])),
            noise,
            trip.config.schedule.sampling_steps,
            trip.config.guidance,
        )
        motion = [z.diff(dim=2).abs().mean().item() for z in (generated, real)]
        self._vae.to(self._device)
        clips = {self._keys[i]: decode_latents(self._vae, z.permute(1, 0, 2, 3)) for i, z in enumerate(generated)}
        self._vae.to("cpu")
        return clips, {"validation_motion_ratio": motion[0] / motion[1]} if motion[1] > 0 else {}

    def _noise(self, purpose: str, part: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        shape = self._z_0.shape[1:]
        return torch.stack(
            [
                torch.randn(shape, generator=addressed_generator(purpose, 0, int(clip), int(t)))
                for clip, t in zip(part, t_B, strict=True)
            ]
        )

    def _parts(self) -> Iterator[torch.Tensor]:
        yield from torch.arange(len(self._keys)).split(self._batch)


@contextmanager
def _evaluating(trip: Trip) -> Iterator[None]:
    training = trip.training
    trip.eval()
    try:
        yield
    finally:
        trip.train(training)
