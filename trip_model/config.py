"""The configuration of a TRIP model. Defaults are the paper's values where it gives one (Sections 3.2 to 4.1).

The comment of each field gives its meaning and unit, then the paper's value with its section or "paper silent"; "ours"
marks what is no part of the paper's method. This module imports neither torch nor diffusers, so that recipes and
command lines load in milliseconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

Betas = Literal["linear", "scaled_linear"]
# Place of the clean first frame. head: before the noised frames (TRIP). tail: after them (TRIP_TE). channel: next to
# each of them on the channel axis (TRIP_C).
Condition = Literal["head", "tail", "channel"]
FusionKind = Literal["tnf", "closed", "linear", "none"]
Fit = Literal["crop", "squash"]  # crop: the central square of the frame. squash: the frame without its aspect ratio
RESIDUAL_ERROR = 0.004  # mean square error of a trained base's noise; table in docs/decisions/fusion.md
BEFORE = "before"  # metadata of a field that older JSON does not have: the value that older models used


def _added(default: Any, before: Any) -> Any:
    return field(default=default, metadata={BEFORE: before})


def values_before(config: type) -> dict[str, Any]:
    """Returns the values of fields that older JSON does not have, by name."""
    return {f.name: f.metadata[BEFORE] for f in fields(config) if BEFORE in f.metadata}


@dataclass(frozen=True)
class FusionConfig:
    """How the prior and the residual noise are fused into the predicted noise (Sections 3.3 and 3.4).

    For TNF the paper gives the order of the layers, their inputs and the output (Figure 3). It is silent on the width,
    the heads, the skips and the axis on which [prior, residual] are concatenated. `prediction="shrinkage"` is ours,
    with the fields `residual`, `residual_error` and `local_shrinkage`, which only it reads.
    """

    # Fusion of prior and residual: `tnf` TRIP, `linear` TRIP^W, `none` TRIP^- (Table 6); `closed`, ours: Equation 9
    # with the weights of `shrinkage` and without TNF. Paper: tnf (3.4).
    kind: FusionKind = "tnf"
    # Channels of TNF's tokens. Paper silent.
    width: int = 320
    # Attention heads of TNF; they divide `width`. Paper silent.
    heads: int = 8
    # Concatenation of [prior, residual] as keys and values: on the channel axis or on the token axis. Paper silent.
    key_value: Literal["channel", "token"] = "channel"
    # Shrinks the motion of places where the residual path predicts little motion. Ours.
    local_shrinkage: bool = False
    # lambda^1 of Equation 9, the weight of the prior in frame 1, for `linear`; between both the weight decays linearly
    # with the frame index. Paper silent.
    lambda_first: float = 1.0
    # lambda^N of Equation 9, the weight of the prior in the last frame, for `linear`. Paper silent.
    lambda_last: float = 0.5
    # What TNF's output is. `direct`: the predicted noise; keys and values read the prior of Equation 8.
    # `shrinkage`, ours: a correction of Equation 9 whose weight depends on time step, frame and data.
    # Paper: direct (3.4, Equation 11).
    prediction: Literal["direct", "shrinkage"] = _added("direct", before="shrinkage")
    # Adds skips around both attention layers and from the residual noise to the output. Paper silent.
    residual_skip: bool = _added(True, before=True)
    # What the 3D-UNet predicts under `shrinkage`: `noise`, or `unit`, the part of the noise that the prior does not
    # explain, divided by its standard deviation. Ours.
    residual: Literal["noise", "unit"] = _added("noise", before="unit")
    # Expected mean square error of the predicted noise, in units of the noise's variance, under `shrinkage`. Ours.
    residual_error: float = _added(RESIDUAL_ERROR, before=RESIDUAL_ERROR)

    def __post_init__(self) -> None:
        if self.local_shrinkage and self.prediction != "shrinkage":
            raise ValueError(f"local_shrinkage with prediction {self.prediction!r}, expected prediction 'shrinkage'")
        if self.kind == "closed" and (self.prediction, self.local_shrinkage) != ("shrinkage", False):
            raise ValueError(
                f"kind 'closed' with prediction {self.prediction!r} and local_shrinkage {self.local_shrinkage},"
                " expected prediction 'shrinkage' without local_shrinkage"
            )
        if not 0 < self.residual_error < math.inf:
            raise ValueError(f"residual_error {self.residual_error}, expected a number above 0")
        for name in ("lambda_first", "lambda_last"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)}, expected a weight from 0 to 1")


@dataclass(frozen=True)
class BaseSchedule:
    """The noise schedule of the base's 3D-UNet, from its `scheduler/scheduler_config.json`. Paper silent."""

    beta_start: float  # beta of the first time step
    beta_end: float  # beta of the last time step
    beta_schedule: Betas  # interpolation between both: of beta (`linear`) or of its square root (`scaled_linear`)
    num_train_timesteps: int  # T, the number of time steps


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule of training and the grid of the sampler, saved with the model."""

    # T, the number of time steps. Paper: 1000 (4.1).
    num_train_timesteps: int = 1000
    # beta of the first time step. Paper: 1e-4 (4.1).
    beta_start: float = 1e-4
    # beta of the last time step. Paper: 2e-2 (4.1).
    beta_end: float = 2e-2
    # Interpolation between both betas. Paper: linear (4.1).
    beta_schedule: Betas = "linear"
    # Grid of DDIM, by diffusers' names. `trailing` starts at the last trained step. With up to two thirds of T
    # steps it does not visit step 0, where the prior amplifies errors by 100 (docs/decisions/schedule.md).
    # Paper silent.
    timestep_spacing: Literal["trailing", "leading", "linspace"] = "trailing"
    # DDIM steps of one video. Paper: 50 (4.1).
    sampling_steps: int = 50
    # Use of the base's betas, which differ from the paper's. `paper`: ignore the difference. `checkpoint`: train
    # with the base's betas. `snr`: keep the paper's betas and pass the 3D-UNet the base's time step of equal
    # signal-to-noise ratio. Paper: the paper's betas (4.1); it names no conversion.
    bridge: Literal["paper", "checkpoint", "snr"] = "paper"
    # The base's schedule, set by `to_base_schedule` under `snr`. Ours.
    base: BaseSchedule | None = None


@dataclass(frozen=True)
class TripConfig:
    """The configuration of a TRIP model, saved with its weights. The defaults are the paper's TRIP.

    Each variant of Tables 5 and 6 changes one value: `condition` or `fusion.kind`. docs/paper-and-ours.md lists every
    field with the values of the recipes.
    """

    # Place of the clean first frame: `head` TRIP, `tail` TRIP_TE, `channel` TRIP_C (Table 5). Paper: head (3.2).
    condition: Condition = "head"
    # Fusion of the prior and the residual noise. Paper: TNF (3.4).
    fusion: FusionConfig = field(default_factory=FusionConfig)
    # Noise schedule and sampler. Paper: 4.1.
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    # N, frames of one video, the given one included. Paper: 16 (4.1).
    num_frames: int = 16
    # Frames per second. Paper: 4 (4.1).
    fps: float = 4.0
    # Side of the square frames, in pixels. Paper: 256 (4.1).
    size: int = 256
    # Scale of classifier-free guidance on the text in sampling; 1 is off. Paper silent.
    guidance: float = 1.0
    # s_i by frame, the standard deviation of the residual z_0^i - z_0^1 in units of the final latents, measured on the
    # data set before training. Only `shrinkage` and the weighting `unit` read it. Ours.
    residual_std: tuple[float, ...] = (0.0, *(0.5,) * 15)
    # What the base's 3D-UNet predicts, read from the base's scheduler. Paper silent.
    unet_output: Literal["noise", "velocity"] = "noise"
    # Dropout probability in the temporal convolutions, the only layers of the 3D-UNet with dropout. Paper silent.
    unet_dropout: float = 0.0
    # Time step of the clean frame in the 3D-UNet: that of the noised frames (`shared`) or 0. Paper silent.
    clean_frame_timestep: Literal["shared", "zero"] = "shared"

    def __post_init__(self) -> None:
        if self.clean_frame_timestep == "zero" and self.condition == "channel":
            raise ValueError(
                "clean_frame_timestep 'zero' with condition 'channel', expected condition 'head' or 'tail'"
            )
        if len(self.residual_std) != self.num_frames:
            raise ValueError(
                f"residual_std has {len(self.residual_std)} values, expected one for each of {self.num_frames} frames"
            )


@dataclass(frozen=True)
class ObjectiveConfig:
    """The training objective (Section 3.3, Equation 10)."""

    # Weight of the squared error. `noise`: 1, as in Equation 10. `unit`, ours: 1 / (1 - lambda*(t, i)), the inverse
    # of the share of the noise that the prior does not explain, so that every time step weighs motion equally; under
    # `noise` a small model hardly learns motion at the noisy end, where sampling starts (docs/decisions/objective.md).
    # Paper: noise (3.3, Equation 10).
    weighting: Literal["noise", "unit"] = "noise"
    # Share of samples trained with an empty caption, for classifier-free guidance. Paper silent.
    text_dropout: float = 0.1
