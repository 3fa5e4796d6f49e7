"""What animates the items of a protocol: the model, its untrained base, and two references that need no 3D-UNet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from infra import storage
from tasks.evaluate.protocol.protocol import Item
from tasks.model_folder import local_model
from tasks.records import Artifact, UserError
from trip_model.folders import RECORD, resolve_base
from trip_model.images import load_image

if TYPE_CHECKING:  # only the process that generates loads diffusers
    from trip_model.pipeline import TripPipeline

Kind = Literal["model", "base", "closed_form", "round_trip"]
Pixels = NDArray[np.uint8]


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


@dataclass(frozen=True)
class AnimatorSpec:
    """What animates the clips of one system, and which of an item's samples they are.

    Args:
        kind: `model`, the export; `base`, what it was trained from, without training; `closed_form`, the shrunk prior
            without a network; `round_trip`, the true clip through the VAE, which animates nothing.
        sample: 0 for the first clip of each item; further ones differ in their seed.
        base: of `base`.
    """

    kind: Kind
    sample: int = 0
    base: UntrainedBase | None = None


class Animator(Protocol):
    """Makes clips of items from their true clips; only the round trip uses more than the first frame."""

    @property
    def size(self) -> int: ...

    def animate(self, real: Sequence[Pixels], items: Sequence[Item]) -> Pixels:
        """Returns uint8 [B, F, size, size, 3] for true clips of F frames of any size."""
        ...


def sample_seed(item: Item, sample: int) -> int:
    """The seed of one of an item's samples, 31 bits: the item's own for the first, further ones from it by a hash."""
    if sample == 0:
        return item.seed
    return int.from_bytes(hashlib.sha256(f"{item.key}\0{item.seed}\0{sample}".encode()).digest()[:4], "big") >> 1


@dataclass(frozen=True)
class PipelineAnimator:
    """Animates first frames with a pipeline; None for `steps` and `guidance`: the model's own."""

    pipeline: TripPipeline
    steps: int | None
    guidance: float | None
    sample: int

    @property
    def size(self) -> int:
        return self.pipeline.size

    def animate(self, real: Sequence[Pixels], items: Sequence[Item]) -> Pixels:
        """Frame 1 is the model's own, not replaced by the given image, so that its fidelity can be measured."""
        return self.pipeline.generate(  # scales what it is given
            [clip[0] for clip in real],
            [item.caption for item in items],
            [sample_seed(item, self.sample) for item in items],
            num_frames=len(real[0]),
            steps=self.steps,
            guidance=self.guidance,
            keep_first_frame=False,
        )


@dataclass(frozen=True)
class RoundTrip:
    """The true clip encoded and decoded: no model that samples latents of this VAE can be expected to be nearer."""

    vae: Any
    size: int

    def animate(self, real: Sequence[Pixels], items: Sequence[Item]) -> Pixels:
        from trip_model.encoders import decode_latents, encode_pixels

        scaled = [np.stack([load_image(frame, self.size) for frame in clip]) for clip in real]
        factor = self.vae.config.scaling_factor
        return np.stack([decode_latents(self.vae, encode_pixels(self.vae, clip) * factor) for clip in scaled])


def load_animator(
    spec: AnimatorSpec, model: str, frames: int, steps: int | None, guidance: float | None, device: str
) -> Animator:
    """Loads what animates; `model` is the folder of an export, None for `steps` and `guidance` its own values."""
    from trip_model.encoders import load_vae
    from trip_model.pipeline import TripPipeline

    if spec.base is not None:
        pipeline = load_base(spec.base, frames, device)
        return PipelineAnimator(pipeline, spec.base.steps, spec.base.guidance, spec.sample)
    folder = storage.local_folder(model)
    if spec.kind == "round_trip":
        return RoundTrip(cast(Any, load_vae(folder)).to(device), described(model)["config"]["size"])
    if spec.kind == "closed_form":
        return PipelineAnimator(load_closed_form(model, device), steps, 1.0, spec.sample)
    return PipelineAnimator(TripPipeline.from_pretrained(folder).to(device), steps, guidance, spec.sample)


def described(model: str) -> dict[str, Any]:
    """The `trip.json` of a model export. Raises UserError on no model."""
    return json.loads((local_model(model) / RECORD).read_text())


def base_sha256(model: str) -> str | None:
    """The hash of the base that a model export was trained from, None where it records none; UserError on no model."""
    return described(model)["provenance"].get("base_sha256")


def find_base(base: Artifact, model: str, steps: int | None, guidance: float | None) -> UntrainedBase:
    """A base, sampled as the model is; None for `steps` and `guidance` takes the model's own.

    Raises:
        UserError: the model was not trained from this base.
    """
    config, trained_from = described(model)["config"], base_sha256(model)
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
    trip = Trip.from_base(folder, config)
    return TripPipeline.from_model(trip, load_vae(folder), load_text_encoder(folder), device)


def load_closed_form(model: str, device: str) -> TripPipeline:
    """A pipeline of `closed_form.ClosedForm` with the numbers of a model export."""
    from tasks.evaluate.closed_form import ClosedForm
    from trip_model.checkpoint import config_from_json
    from trip_model.encoders import load_text_encoder, load_vae
    from trip_model.pipeline import TripPipeline

    folder = storage.local_folder(model)
    trip: Any = ClosedForm(config_from_json(described(model)["config"]))
    return TripPipeline.from_model(trip, load_vae(folder), load_text_encoder(folder), device)
