"""The training objective (Equations 2 and 10), text dropout, and the random numbers of training.

Legend of shape suffixes: B batch, C latent channels, F frames, H and W latent height and width, L text tokens, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trip_model.config import ObjectiveConfig
from trip_model.model import Trip

MAX_WEIGHT = 1e7  # upper bound of a frame's weight under `unit`; reached at the last time steps where s_i < 0.05


def addressed_generator(purpose: str, seed: int, *address: int) -> torch.Generator:
    """Returns a generator whose stream depends only on its address, such as ("noise", seed, step, sample)."""
    key = ":".join([purpose, str(seed), *map(str, address)])
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True)
class Draw:
    """The random part of one training batch, drawn on the CPU."""

    t_B: torch.Tensor  # int64 time steps
    noise: torch.Tensor  # float32, shaped like z_0
    drop_B: torch.Tensor  # bool, True replaces the caption by the empty one

    def part(self, samples: torch.Tensor | slice) -> Draw:
        """Returns the draws of the samples at these indices."""
        return Draw(self.t_B[samples], self.noise[samples], self.drop_B[samples])


def draw(
    seed: int,
    step: int,
    positions: Sequence[int],
    global_batch: int,
    shape: Sequence[int],
    steps_T: int,
    text_dropout: float,
) -> Draw:
    """Draws time steps, noise and text dropout for the samples at `positions` of a global batch.

    Any split of the batch over workers gives the same numbers.

    Time steps are uniform over 0..T-1 and stratified: of a global batch of n, one lies in each n-th of that range.
    """
    offset = torch.rand((), generator=addressed_generator("time-step", seed, step), dtype=torch.float64).item()
    times: list[int] = []
    noise = torch.empty(len(positions), *shape)
    drops: list[bool] = []
    for place, position in enumerate(positions):
        generator = addressed_generator("noise", seed, step, position)
        times.append(int((offset + position / global_batch) % 1.0 * steps_T))
        drops.append(torch.rand((), generator=generator).item() < text_dropout)
        # In place: a copy of all samples would start torch's threads next to those of a step that runs.
        torch.randn(tuple(shape), generator=generator, out=noise[place])
    return Draw(torch.tensor(times), noise, torch.tensor(drops))


def training_loss(
    model: torch.nn.Module,
    z_0_BCFHW: torch.Tensor,
    text_BLD: torch.Tensor,
    empty_text_1LD: torch.Tensor,
    drawn: Draw,
    config: ObjectiveConfig,
    compute: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the objective (Equation 10): the mean squared error between the drawn noise and the fused prediction.

    Args:
        model: a `Trip`, or a data-parallel wrapper of one.
        z_0_BCFHW: final latents, float32; frame 1 is the image.
        text_BLD: text features c.
        empty_text_1LD: those of the empty text, for the samples whose text is dropped.
        drawn: the time steps, the noise and which texts are dropped.
        config: settings of the objective.
        compute: autocast data type of the networks, such as bfloat16; z_t, the prior and the loss are always float32.
    Returns:
        (loss, noise error by time step and frame [B, F], detached and unweighted).
    """
    trip = model if isinstance(model, Trip) else model.module
    assert isinstance(trip, Trip)
    device = z_0_BCFHW.device
    t_B, noise = drawn.t_B.to(device), drawn.noise.to(device)
    z_t = trip.schedule.add_noise(z_0_BCFHW, noise, t_B)
    # The image latent is frame 1 of the same draw, so that its residual is exactly zero.
    z_first = z_0_BCFHW[:, :, :1].float()
    text = torch.where(drawn.drop_B.to(device)[:, None, None], empty_text_1LD, text_BLD)
    with torch.autocast(device.type, compute, enabled=compute is not None):
        predicted = model(z_t, z_first, t_B, text)
    error_BF = (predicted - noise).square().mean(dim=(1, 3, 4))
    if config.weighting == "noise":
        return error_BF.mean(), error_BF.detach()
    unknown_BF = trip.unknown_share(t_B, z_t.shape[2]).flatten(1)
    # The prior of frame 1 is exact: its unknown share and its error are zero, and its weight is one.
    weight_BF = torch.where(unknown_BF > 0, 1 / unknown_BF.clamp_min(1 / MAX_WEIGHT), torch.ones_like(unknown_BF))
    return (weight_BF * error_BF).mean(), error_BF.detach()
