"""The row `base`: the base that a model was trained from, animated without any training."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tasks.evaluate.spec import model_folder
from tasks.records import Artifact, UserError
from trip_model.folders import resolve_base

if TYPE_CHECKING:  # only the process that generates loads diffusers
    from trip_model.pipeline import TripPipeline


@dataclass(frozen=True)
class UntrainedBase:
    """A base and how it is sampled: with the size, steps and guidance of the model that was trained from it."""

    address: str
    sha256: str
    size: int
    steps: int
    guidance: float
    timestep_spacing: str

    def identity(self) -> dict[str, Any]:
        """Everything that decides the clips; where the base lies does not."""
        return {name: value for name, value in asdict(self).items() if name != "address"}


def base_sha256(model: str) -> str | None:
    """The hash of the base that a model export was trained from, None where it records none; UserError on no model."""
    return _described(model)["provenance"].get("base_sha256")


def _described(model: str) -> dict[str, Any]:
    return json.loads((model_folder(model) / "trip.json").read_text())


def find_base(base: Artifact, model: str, steps: int | None, guidance: float | None) -> UntrainedBase:
    """A base, sampled as the model is; None for `steps` and `guidance` takes the model's own.

    Raises:
        UserError: the model was not trained from this base.
    """
    config, trained_from = _described(model)["config"], base_sha256(model)
    if base.sha256 != trained_from:
        raise UserError(
            f"the model at {model} was not trained from base {base.uri!r}: the hash of its base is {trained_from},"
            f" expected {base.sha256}; give the base that it was trained from, or leave the row of the base out"
        )
    return UntrainedBase(
        address=base.uri,
        sha256=base.sha256,
        size=config["size"],
        steps=config["schedule"]["sampling_steps"] if steps is None else steps,
        guidance=config["guidance"] if guidance is None else guidance,
        timestep_spacing=config["schedule"]["timestep_spacing"],
    )


def load_base(base: UntrainedBase, frames: int, device: str) -> TripPipeline:
    """The base as an image-to-video model without training: TRIP^- on the base's own noise schedule.

    The clean first frame stands at the head of the time axis; there is neither a prior nor a fusion, so no weight is
    new and the output is the base's own prediction.
    """
    from trip_model.config import FusionConfig, ScheduleConfig, TripConfig
    from trip_model.encoders import load_text_encoder, load_vae
    from trip_model.model import Trip, base_unet_output
    from trip_model.pipeline import TripPipeline
    from trip_model.schedule import to_base_schedule

    folder = resolve_base(base.address)
    spacing: Any = base.timestep_spacing
    config = TripConfig(
        condition="head",
        fusion=FusionConfig(kind="none"),
        schedule=to_base_schedule(ScheduleConfig(timestep_spacing=spacing, bridge="checkpoint"), folder),
        num_frames=frames,
        size=base.size,
        residual_std=(0.0,) * frames,  # of the prior, which TRIP^- does not have
        unet_output=base_unet_output(folder),
    )
    return TripPipeline(Trip.from_base(folder, config), load_vae(folder), load_text_encoder(folder), device)
