"""The TRIP model (Figure 2): fuses the shortcut path and the residual path into the predicted noise (Equation 11).

Legend of shape suffixes: B batch, C latent channels, F frames, H and W latent height and width, L text tokens, D width.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from trip_model.conditioning import drop_condition_slot, unet_input
from trip_model.config import TripConfig
from trip_model.fusion import Shrinkage, TemporalNoiseFusion, closed_form_fusion, linear_decay, linear_fusion
from trip_model.noise_prior import image_noise_prior, normalised_prior, optimal_shrinkage, unknown_share
from trip_model.schedule import NoiseSchedule
from trip_model.unet import DeepFeatures, UNet3D, load_unet, set_dropout, widen_input
from trip_model.unet_blocks import repeat_texts

MIN_RESIDUAL_STD = 0.02  # lower bound, so that a data set of still clips cannot make lambda* 1 at every time step


class Trip(nn.Module):
    """Predicts the noise eps(z_t, t, c, z_0^1) from a 3D-UNet, the image noise prior and their fusion."""

    def __init__(self, unet: UNet3D, config: TripConfig, fusion: TemporalNoiseFusion | None = None) -> None:
        """Assembles a model; without `fusion` the fusion module is new, if the configuration has one."""
        super().__init__()
        self.config = config
        self.unet = widen_input(unet) if config.condition == "channel" and unet.config.in_channels == 4 else unet
        set_dropout(self.unet, config.unet_dropout)
        channels = unet.config.out_channels
        if fusion is None and config.fusion.kind == "tnf":
            fusion = TemporalNoiseFusion(config.fusion, channels)
        self.fusion = fusion
        self.schedule = NoiseSchedule(config.schedule)
        self._residual_std: dict[tuple[int, torch.device, int], torch.Tensor] = {}

    @classmethod
    def from_base(cls, base: str | Path, config: TripConfig) -> Trip:
        """Returns a new model on the 3D-UNet of a base folder; `config.unet_output` must be its prediction type."""
        return cls(load_unet(base), config)

    def residual_std(self, frames: int, device: torch.device, offset: int = 0) -> torch.Tensor:
        """Returns s_i from frame `offset` on, [1, 1, F, 1, 1]; frames beyond the trained ones repeat the last value."""
        if (frames, device, offset) in self._residual_std:
            return self._residual_std[frames, device, offset]
        known = self.config.residual_std
        values = [known[min(i, len(known) - 1)] for i in range(offset, offset + frames)]
        std = torch.tensor(values, dtype=torch.float32, device=device).view(1, 1, frames, 1, 1)
        if device.type == "cuda":  # each copy to a GPU makes the process wait for it
            self._residual_std[frames, device, offset] = std
        return std

    def shrinkage(self, t_B: torch.Tensor, frames: int) -> torch.Tensor:
        """Returns lambda*(t, i), float32 [B, 1, F, 1, 1]."""
        signal, sigma = self.schedule.signal_and_noise(t_B, 5)
        return optimal_shrinkage(signal, sigma, self.residual_std(frames, t_B.device))

    def unknown_share(self, t_B: torch.Tensor, frames: int) -> torch.Tensor:
        """Returns 1 - lambda*(t, i), the share of the noise not explained by the prior, float32 [B, 1, F, 1, 1]."""
        signal, sigma = self.schedule.signal_and_noise(t_B, 5)
        return unknown_share(signal, sigma, self.residual_std(frames, t_B.device))

    def forward(
        self,
        z_t_BCFHW: torch.Tensor,
        z_first_BC1HW: torch.Tensor,
        t_B: torch.Tensor,
        text_BLD: torch.Tensor,
        offset: int = 0,
        deep: DeepFeatures | None = None,
        unet_first_BC1HW: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the predicted noise, float32 [B, C, F, H, W].

        Args:
            z_t_BCFHW: noised final latents, float32.
            z_first_BC1HW: clean final latent of the first frame.
            t_B: time steps, int64, 0-based.
            text_BLD: text features c, one for each sample, or several, text by text; the result has one for each.
            offset: 0-based index of the first of these frames in its video, for a window of a longer one.
            deep: features of the 3D-UNet to reuse from an earlier step, or an empty object that keeps them.
            unet_first_BC1HW: what the 3D-UNet gets instead of the first frame, for guidance on the image; the prior is
                always that of the first frame.
        """
        frames = z_t_BCFHW.shape[2]
        seen = z_first_BC1HW if unet_first_BC1HW is None else unet_first_BC1HW
        joined = unet_input(z_t_BCFHW, seen, self.config.condition)
        t = self.schedule.conditioning_step(t_B)
        if self.config.clean_frame_timestep == "zero":
            t_BF = t[:, None].expand(-1, frames)
            clean_B1 = torch.zeros_like(t_BF[:, :1])
            t = torch.cat([clean_B1, t_BF] if self.config.condition == "head" else [t_BF, clean_B1], dim=1)
        reuse = {} if deep is None else {"deep": deep}
        output = drop_condition_slot(self.unet(joined, t, text_BLD, **reuse), self.config.condition)
        texts = len(output) // len(t_B)
        z_t_BCFHW, z_first_BC1HW, t_B = (repeat_texts(x, texts) for x in (z_t_BCFHW, z_first_BC1HW, t_B))

        fusion = self.config.fusion
        with torch.autocast(z_t_BCFHW.device.type, enabled=False):
            signal, sigma = self.schedule.signal_and_noise(t_B, 5)
            if fusion.kind in ("tnf", "closed") and fusion.prediction == "shrinkage":
                std = self.residual_std(frames, z_t_BCFHW.device, offset)
                residual, prior, shrinkage = self._shrunk(output, z_t_BCFHW, z_first_BC1HW, signal, sigma, std)
                if fusion.kind == "closed":
                    return closed_form_fusion(residual, shrinkage, fusion)
            else:
                residual, shrinkage = self._as_noise(output, z_t_BCFHW, signal, sigma), None
                if fusion.kind == "none":
                    return residual
                prior = image_noise_prior(z_t_BCFHW, z_first_BC1HW, signal, sigma)
                if fusion.kind == "linear":
                    # Of a video of the trained length, however many frames these are; later ones repeat the last value.
                    decay = linear_decay(self.config.num_frames, fusion.lambda_first, fusion.lambda_last)
                    index = torch.arange(offset, offset + frames).clamp_max(self.config.num_frames - 1)
                    return linear_fusion(prior, residual, decay[:, :, index].to(prior.device))
        assert self.fusion is not None
        return self.fusion(residual, prior, t_B, shrinkage)

    def _as_noise(
        self, output_BCFHW: torch.Tensor, z_t_BCFHW: torch.Tensor, signal: torch.Tensor, sigma: torch.Tensor
    ) -> torch.Tensor:
        """Converts the 3D-UNet's output to noise, float32: unchanged, or from velocity."""
        if self.config.unet_output == "noise":
            return output_BCFHW.float()
        return signal * output_BCFHW.float() + sigma * z_t_BCFHW.float()

    def _shrunk(
        self,
        output_BCFHW: torch.Tensor,
        z_t_BCFHW: torch.Tensor,
        z_first_BC1HW: torch.Tensor,
        signal: torch.Tensor,
        sigma: torch.Tensor,
        std: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, Shrinkage]:
        """Returns the inputs of TNF under `prediction="shrinkage"`: residual, normalised prior, weights of both."""
        normalised = normalised_prior(z_t_BCFHW, z_first_BC1HW, signal, sigma, std)
        if self.config.fusion.residual == "unit":
            known = optimal_shrinkage(signal, sigma, std).sqrt()
            return output_BCFHW, normalised, Shrinkage(known, unknown_share(signal, sigma, std).sqrt(), normalised)
        residual = self._as_noise(output_BCFHW, z_t_BCFHW, signal, sigma)
        # An error of the velocity scales to `signal` times that error of the noise.
        error = self.config.fusion.residual_error * (signal.square() if self.config.unet_output == "velocity" else 1)
        known = optimal_shrinkage(signal, sigma, std, error).sqrt()
        unknown = unknown_share(signal, sigma, std, error).sqrt()
        prior = image_noise_prior(z_t_BCFHW, z_first_BC1HW, signal, sigma)
        return residual, normalised, Shrinkage(known, unknown, known * prior, error)


def base_unet_output(base: str | Path) -> Literal["noise", "velocity"]:
    """Returns the prediction type of a base's 3D-UNet, from its `scheduler/scheduler_config.json`.

    Raises:
        ValueError: a prediction type other than `epsilon` or `v_prediction`.
    """
    file = Path(base) / "scheduler" / "scheduler_config.json"
    kind = json.loads(file.read_text()).get("prediction_type", "epsilon")
    if kind == "epsilon":
        return "noise"
    if kind == "v_prediction":
        return "velocity"
    raise ValueError(f"{file}: prediction_type {kind!r}, expected 'epsilon' or 'v_prediction'")


def measure_residual_std(*z_0_BCFHW: torch.Tensor) -> tuple[float, ...]:
    """Returns s_i by frame: the root mean square of z_0^i - z_0^1 over clips [B, C, F, H, W]; 0 for frame 1.

    Clips of several frame sizes are several tensors; every clip has the same weight, whatever its frame size.
    """
    clips = sum(map(len, z_0_BCFHW))
    squares = [(z - z[:, :, :1]).float().square().mean(dim=(0, 1, 3, 4)) * (len(z) / clips) for z in z_0_BCFHW]
    values: list[float] = torch.stack(squares).sum(dim=0).sqrt().tolist()
    if not all(map(math.isfinite, values)):
        raise ValueError("latents hold NaN or infinity, so the residual has no standard deviation")
    return (0.0, *(round(max(v, MIN_RESIDUAL_STD), 5) for v in values[1:]))
