"""The configuration of a TRIP model: every number that tells one model from another, with the paper's as defaults.

This module imports neither torch nor diffusers, so that recipes and command lines can be read in milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Betas = Literal["linear", "scaled_linear"]
# head: TRIP, the clean first frame before the noised ones. tail: TRIP_TE, after them. channel: TRIP_C, beside each.
Condition = Literal["head", "tail", "channel"]
FusionKind = Literal["tnf", "linear", "none"]
Fit = Literal["crop", "squash"]  # into the square: the middle of the frame, or all of it without its aspect


@dataclass(frozen=True)
class FusionConfig:
    """How reference and residual noise become the predicted noise.

    `kind` alone tells the variants of Table 6 apart: `tnf` TRIP, `linear` TRIP^W, `none` TRIP^-. The paper gives no
    width, heads, or way of concatenation; `key_value` is "channel" (one token per place, prior and residual side by
    side) or "token" (twice the tokens).
    """

    kind: FusionKind = "tnf"
    width: int = 320
    heads: int = 8
    key_value: Literal["channel", "token"] = "channel"
    local_shrinkage: bool = False  # ours, not the paper's: keep still what the residual path finds still
    lambda_first: float = 1.0  # Equation 9: lambda^1, the prior's weight in frame 1 (TRIP^W)
    lambda_last: float = 0.5  # and lambda^N; in between it decays linearly with the frame index


@dataclass(frozen=True)
class BaseSchedule:
    """The schedule that the base's 3D-UNet was trained with, from its `scheduler/scheduler_config.json`."""

    beta_start: float
    beta_end: float
    beta_schedule: Betas
    num_train_timesteps: int


@dataclass(frozen=True)
class ScheduleConfig:
    """The schedule that a model was trained with; it travels with the model.

    The defaults are the paper's (Section 4.1). Spacing is not in the paper: `trailing` starts DDIM at the last trained
    step and never visits index 0, where the prior's gain is 100 (docs/decisions/schedule.md).
    """

    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 2e-2
    beta_schedule: Betas = "linear"
    timestep_spacing: Literal["trailing", "leading", "linspace"] = "trailing"
    sampling_steps: int = 50
    # The paper's betas differ from those that its base was trained with. `paper` leaves it at that, `checkpoint` takes
    # the base's betas instead, `snr` keeps the paper's and tells the 3D-UNet the base's step of equal noise.
    bridge: Literal["paper", "checkpoint", "snr"] = "paper"
    base: BaseSchedule | None = None  # under `snr`: what the steps are matched to


@dataclass(frozen=True)
class TripConfig:
    """Everything that tells one TRIP model from another, saved with its weights. The defaults are the paper's.

    Each variant of Tables 5 and 6 differs in one value: `condition` (head TRIP, tail TRIP_TE, channel TRIP_C) or
    `fusion.kind` (tnf TRIP, linear TRIP^W, none TRIP^-).
    """

    condition: Condition = "head"
    fusion: FusionConfig = field(default_factory=FusionConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    num_frames: int = 16
    fps: float = 4.0
    size: int = 256  # side of the square frames, in pixels
    guidance: float = 1.0  # classifier-free guidance on text when sampling; the paper gives none
    residual_std: tuple[float, ...] = (0.0, *(0.5,) * 15)  # s_i by frame, measured on the data set before training
    unet_output: Literal["noise", "velocity"] = "noise"  # how the base's UNet was trained, from its scheduler
    unet_dropout: float = 0.0  # in the 3D-UNet's temporal convolutions, the only place where it has any
    # The time step that the 3D-UNet is told for the clean frame; the paper's text implies one for all frames.
    clean_frame_timestep: Literal["shared", "zero"] = "shared"

    def __post_init__(self) -> None:
        if self.clean_frame_timestep == "zero" and self.condition == "channel":
            raise ValueError(
                "clean_frame_timestep 'zero' needs a clean frame: condition 'head' or 'tail', not 'channel'"
            )
        if len(self.residual_std) != self.num_frames:
            raise ValueError(
                f"residual_std has {len(self.residual_std)} values, expected one for each of {self.num_frames} frames"
            )


@dataclass(frozen=True)
class ObjectiveConfig:
    """Equation 10 and what it leaves open.

    weighting: `noise` is Equation 10 as written. `unit` divides the squared error by 1 - lambda*(t, i), the part of
        the noise that the prior leaves unknown, so that every time step asks for the motion equally loudly; under
        `noise` a small model hardly learns it at the noisy end, where sampling starts (docs/decisions/objective.md).
    text_dropout: share of samples trained with an empty caption, for classifier-free guidance; the paper gives none.
    """

    weighting: Literal["noise", "unit"] = "noise"
    text_dropout: float = 0.1
