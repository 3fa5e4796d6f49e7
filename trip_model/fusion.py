"""Fusion of the prior and the residual noise (Sections 3.3 and 3.4): TNF, linear (TRIP^W), closed form, none (TRIP^-).

Legend of shape suffixes: B batch, C latent channels, F frames, H and W latent height and width, N = B F sequences of
L = H W spatial tokens, D width. docs/decisions/fusion.md explains the choices where the paper is silent.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from trip_model.config import FusionConfig, values_before

FIRST_THRESHOLD = 0.2  # at initialisation, local shrinkage halves a motion of root mean square 0.45 s_i


class AdaptiveLayerNorm(nn.Module):
    """Layer norm whose scale and shift come from the time step (Figure 3), one pair for each sequence of the batch.

    diffusers' `AdaLayerNorm` splits scale and shift along the batch axis when time steps are batched, so this class
    replaces it. The projection starts at zero: at initialisation this is a plain layer norm.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.to_scale_shift = nn.Linear(width, 2 * width)
        nn.init.zeros_(self.to_scale_shift.weight)
        nn.init.zeros_(self.to_scale_shift.bias)

    def forward(self, x_NLD: torch.Tensor, time_ND: torch.Tensor) -> torch.Tensor:
        scale_ND, shift_ND = self.to_scale_shift(F.silu(time_ND)).chunk(2, dim=-1)
        return self.norm(x_NLD) * (1 + scale_ND[:, None]) + shift_ND[:, None]


class Attention(nn.Module):
    """Multi-head attention over spatial tokens; keys and values come from a context sequence."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(width, 2 * width)
        self.to_out = nn.Linear(width, width)

    def forward(self, query_NLD: torch.Tensor, context_NMD: torch.Tensor) -> torch.Tensor:
        def split(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        key, value = self.to_kv(context_NMD).chunk(2, dim=-1)
        out = F.scaled_dot_product_attention(split(self.to_q(query_NLD)), split(key), split(value))
        return self.to_out(out.transpose(1, 2).flatten(2))


class Shrinkage(NamedTuple):
    """Weights of Equation 9 by time step and frame (ours): float32, broadcastable to [B, C, F, H, W]."""

    known: torch.Tensor  # sqrt(lambda)
    unknown: torch.Tensor  # sqrt(1 - lambda)
    prior: torch.Tensor  # sqrt(lambda) prior, [B, C, F, H, W]
    error: float | torch.Tensor = 1.0  # mean square error of the other estimate of the noise, which lambda is for


class TemporalNoiseFusion(ModelMixin, ConfigMixin):
    """TNF (Equation 11, Figure 3): predicted noise = phi(residual noise, image noise prior, t), frame by frame.

    As in the paper: adaptive layer norm by time step, self-attention, adaptive layer norm, then cross-attention whose
    query is the in-process feature and whose keys and values are the concatenated prior and residual; the output is the
    predicted noise (`prediction="direct"`). Where the paper is silent: linear layers between latent channels and width,
    and with `residual_skip` the skips of a transformer and a skip from the residual noise to the output, whose layer
    starts at zero, so that training starts from the noise that the 3D-UNet predicts.

    Ours, `prediction="shrinkage"`: the output is a correction, in units in which the unknown part of the noise has unit
    variance at every time step, and keys and values read the normalised prior.

        residual "noise":  noise = lambda prior + (1 - lambda) residual + sqrt(1 - lambda) output
        residual "unit":   noise = lambda prior + sqrt(1 - lambda) (residual + output)

    with lambda(t, i) of `noise_prior.optimal_shrinkage`, for an error of `residual_error` or 1.
    """

    config_name = "config.json"

    def __init__(self, config: FusionConfig, channels: int) -> None:
        super().__init__()
        self._config, self._channels = config, channels
        width = config.width
        self.time_features = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(width, width)
        self.residual_in = nn.Linear(channels, width)
        if config.key_value == "channel":
            self.context_in = nn.Linear(2 * channels, width)
        else:
            self.prior_in = nn.Linear(channels, width)
            self.source = nn.Parameter(torch.randn(2, width) * 0.02)  # distinguishes the two halves of the tokens
        self.norm_self = AdaptiveLayerNorm(width)
        self.attention_self = Attention(width, config.heads)
        self.norm_cross = AdaptiveLayerNorm(width)
        self.attention_cross = Attention(width, config.heads)
        self.out = nn.Linear(width, channels)
        if config.residual_skip:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)
        if config.local_shrinkage:
            self.log_threshold = nn.Parameter(torch.tensor(math.log(FIRST_THRESHOLD)))

    @property
    def config(self) -> FusionConfig:  # pyright: ignore[reportIncompatibleMethodOverride] - a frozen dataclass of it
        """The configuration of the module; `config.json` contains it with the number of latent channels."""
        return self._config

    @config.setter
    def config(self, config: FusionConfig) -> None:
        self._config = config

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> TemporalNoiseFusion:
        """Returns a new module; `from_pretrained` calls it with the contents of `config.json`."""
        values = {name: value for name, value in dict(config).items() if not name.startswith("_")}
        channels = values.pop("channels")
        return cls(FusionConfig(**values_before(FusionConfig) | values), channels)

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Writes `config.json`; `save_pretrained` calls it."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        values = {"_class_name": type(self).__name__, "channels": self._channels, **asdict(self.config)}
        (folder / self.config_name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")

    def attend(self, residual_BCFHW: torch.Tensor, prior_BCFHW: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """Returns the output of the attention layers, [B, C, F, H, W]."""
        batch, channels, frames, height, width = residual_BCFHW.shape

        def tokens(x_BCFHW: torch.Tensor) -> torch.Tensor:
            return x_BCFHW.permute(0, 2, 3, 4, 1).reshape(batch * frames, height * width, channels)

        dtype = self.out.weight.dtype
        residual_NLC, prior_NLC = tokens(residual_BCFHW.to(dtype)), tokens(prior_BCFHW.to(dtype))
        time_BD = self.time_embedding(self.time_features(t_B).to(dtype))
        time_ND = time_BD.repeat_interleave(frames, dim=0, output_size=batch * frames)

        x_NLD = self.residual_in(residual_NLC)
        if self.config.key_value == "channel":
            context = self.context_in(torch.cat([prior_NLC, residual_NLC], dim=-1))
        else:
            context = torch.cat([self.prior_in(prior_NLC) + self.source[0], x_NLD + self.source[1]], dim=1)
        normed = self.norm_self(x_NLD, time_ND)
        enhanced = self.attention_self(normed, normed)
        x_NLD = x_NLD + enhanced if self.config.residual_skip else enhanced
        fused = self.attention_cross(self.norm_cross(x_NLD, time_ND), context)
        x_NLD = x_NLD + fused if self.config.residual_skip else fused
        out_NLC = self.out(x_NLD)
        return out_NLC.view(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3)

    def forward(
        self,
        residual_BCFHW: torch.Tensor,
        prior_BCFHW: torch.Tensor,
        t_B: torch.Tensor,
        shrinkage: Shrinkage | None = None,
    ) -> torch.Tensor:
        """Returns the predicted noise, float32 [B, C, F, H, W].

        Args:
            residual_BCFHW: the 3D-UNet's output.
            prior_BCFHW: the prior that keys and values read.
            t_B: time steps, int64, 0-based.
            shrinkage: the weights of both under `prediction="shrinkage"`, None under `direct`.
        """
        output = self.attend(residual_BCFHW, prior_BCFHW, t_B).float()
        skipped = residual_BCFHW.float() if self.config.residual_skip else None
        if self.config.prediction == "direct":
            return output if skipped is None else skipped + output
        assert shrinkage is not None
        known, unknown, prior, error = shrinkage
        if skipped is not None:
            output = _unit(skipped, shrinkage, self.config) + output
        noise = known * prior + unknown * output
        if not self.config.local_shrinkage:
            return noise
        # The residual item that this noise implies (Equation 6) is `motion` s_i / sqrt(error).
        motion = unknown * prior - known * output
        return noise + unknown / known * (1 - self.kept_motion(motion / error**0.5)) * motion

    def kept_motion(self, motion_BCFHW: torch.Tensor) -> torch.Tensor:
        """Returns the share of the implied motion to keep, m / (m + threshold), [B, 1, F, H, W].

        m is the mean square of the motion over channels and 3 x 3 places: a Wiener filter with the local signal power.
        Where m is far below the threshold, the frame keeps the latent of the first frame.
        """
        power = motion_BCFHW.square().mean(dim=1, keepdim=True)
        power = F.avg_pool3d(power, (1, 3, 3), stride=1, padding=(0, 1, 1), count_include_pad=False)
        return power / (power + self.log_threshold.float().exp())


def _unit(residual: torch.Tensor, shrinkage: Shrinkage, config: FusionConfig) -> torch.Tensor:
    """Returns the residual in units in which the unknown part of the noise has unit variance."""
    return residual if config.residual == "unit" else shrinkage.unknown * residual


def closed_form_fusion(residual: torch.Tensor, shrinkage: Shrinkage, config: FusionConfig) -> torch.Tensor:
    """Equation 9 with the weights of `shrinkage` (ours): what TNF's correction under `shrinkage` is added to."""
    return shrinkage.known * shrinkage.prior + shrinkage.unknown * _unit(residual.float(), shrinkage, config)


def linear_decay(frames: int, first: float, last: float) -> torch.Tensor:
    """Returns lambda^i of Equation 9 for i = 1..N: a linear decay over the frame index, [1, 1, F, 1, 1]."""
    return torch.linspace(first, last, frames).view(1, 1, frames, 1, 1)


def linear_fusion(prior: torch.Tensor, residual_noise: torch.Tensor, lambda_i: torch.Tensor) -> torch.Tensor:
    """Linear fusion (Equation 9, TRIP^W): eps = lambda^i prior + (1 - lambda^i) residual noise."""
    return lambda_i * prior + (1 - lambda_i) * residual_noise.float()
