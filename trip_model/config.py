"""The configuration of a TRIP model: every number that tells one model from another, with the paper's as defaults.

This module imports neither torch nor diffusers, so that recipes and command lines can be read in milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

Betas = Literal["linear", "scaled_linear"]
# head: TRIP, the clean first frame before the noised ones. tail: TRIP_TE, after them. channel: TRIP_C, beside each.
Condition = Literal["head", "tail", "channel"]
FusionKind = Literal["tnf", "linear", "none"]
Fit = Literal["crop", "squash"]  # into the square: the middle of the frame, or all of it without its aspect
RESIDUAL_ERROR = 0.004  # docs/decisions/fusion.md has the table
BEFORE = "before"  # metadata of a field that older JSON does not have: what its absence means there


def _added(default: Any, before: Any) -> Any:
    return field(default=default, metadata={BEFORE: before})


def values_before(config: type) -> dict[str, Any]:
    """The values of a config's fields in JSON that was written before these fields existed."""
    return {f.name: f.metadata[BEFORE] for f in fields(config) if BEFORE in f.metadata}


@dataclass(frozen=True)
class FusionConfig:
    """How reference and residual noise become the predicted noise. The defaults are the paper's where it names a value.

    `kind` tells the variants of Table 6 apart: `tnf` TRIP, `linear` TRIP^W, `none` TRIP^-.

    Of TNF the paper gives the order of layers, the inputs of each and the output (Section 3.4, Figure 3). It is silent
    on `width`, `heads`, skips (`residual_skip`) and how [prior, residual] are concatenated (`key_value`: "channel", one
    token per place with the two next to each other, or "token", twice the tokens).

    Not the paper's but ours: `prediction="shrinkage"` with `residual`, `residual_error` and `local_shrinkage`.
    """

    kind: FusionKind = "tnf"
    width: int = 320
    heads: int = 8
    key_value: Literal["channel", "token"] = "channel"
    local_shrinkage: bool = False  # ours: keep still what the residual path finds still
    lambda_first: float = 1.0  # Equation 9: lambda^1, the prior's weight in frame 1 (TRIP^W)
    lambda_last: float = 0.5  # and lambda^N; in between it decays linearly with the frame index
    # direct, the paper's: TNF's output is the predicted noise, its keys and values read the prior of Equation 8.
    # shrinkage, ours: TNF corrects Equation 9 with the weight that is best for the time step, the frame and the data.
    prediction: Literal["direct", "shrinkage"] = _added("direct", before="shrinkage")
    # Skips around both attentions, and from the residual noise to the output, which starts as that noise. False: none.
    residual_skip: bool = _added(True, before=True)
    # Under `shrinkage`, what the 3D-UNet's output is: noise, as its base was trained; or `unit`, what the prior leaves
    # unknown of the noise, in units of its own deviation.
    residual: Literal["noise", "unit"] = _added("noise", before="unit")
    residual_error: float = _added(RESIDUAL_ERROR, before=RESIDUAL_ERROR)  # mean square error expected of that noise

    def __post_init__(self) -> None:
        if self.local_shrinkage and (self.prediction, self.residual) != ("shrinkage", "unit"):
            raise ValueError(
                f"local_shrinkage with prediction {self.prediction!r} and residual {self.residual!r}; it needs"
                " prediction 'shrinkage' and residual 'unit'"
            )
        if self.residual_error <= 0:
            raise ValueError(f"residual_error {self.residual_error}, expected a number above 0")


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
    """Everything that tells one TRIP model from another, saved with its weights.

    The defaults are the paper's TRIP: condition, fusion (Equation 11), schedule, frames, fps and size. Ours, where the
    paper is silent: guidance, `unet_dropout`, `clean_frame_timestep`, and in the fusion the width, heads, way of
    concatenation and skips. Ours and not the paper's: `fusion.prediction="shrinkage"` with the fields that it reads
    (`residual_std` too), and a `schedule.bridge` other than "paper". docs/paper-and-ours.md lists every field.

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
    # s_i by frame, measured on the data set before training; ours, for fusion by shrinkage and the weighting `unit`
    residual_std: tuple[float, ...] = (0.0, *(0.5,) * 15)
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
    """Equation 10 and what it leaves open. The defaults are the paper's where it gives a value.

    weighting: `noise` is Equation 10 as written. `unit`, ours, divides the squared error by 1 - lambda*(t, i), the part
        of the noise that the prior leaves unknown, so that every time step asks for the motion equally loudly; under
        `noise` a small model hardly learns it at the noisy end, where sampling starts (docs/decisions/objective.md).
    text_dropout: share of samples trained with an empty caption, for classifier-free guidance; the paper gives none.
    """

    weighting: Literal["noise", "unit"] = "noise"
    text_dropout: float = 0.1
