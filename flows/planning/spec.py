"""What a plan is asked about: the numbers of a recipe that decide about memory, time, storage and cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tasks.records import UserError
from trip_model.config import TripConfig

CLIP_SECONDS = 17.5  # the mean of WebVid


@dataclass(frozen=True)
class PlanSpec:
    """What a plan is asked about. `clips` None leaves out what depends on the data."""

    base: str
    model: TripConfig
    steps: int
    global_batch: int
    workers: int  # GPUs, or CPU workers
    device: str
    cores: int = 1  # of one CPU worker
    trained: str = "all"  # of the 3D-UNet, in a word; the callable beside the spec says which weights
    average: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    micro_batch: int | None = None  # clips of one forward pass; None: a device's share of the global batch
    recompute: bool = False
    fsdp2: bool = False
    checkpoints_kept: int = 2
    clips: int | None = None
    clips_are: Literal["linked", "drawn", "prepared"] = "linked"  # links to videos, drawn on the spot, latents already
    stored: Literal["windows", "track"] = "windows"
    windows_per_clip: int = 1
    keep_pixels: bool = False
    keep_logvar: bool = False
    keep_text: bool = False
    prepare_cores: int = 1  # all workers of the prepare stage together
    longest_track: int = 240  # frames
    price: float | None = None  # USD for an hour of one GPU
    mfu: float | None = None  # share of the device's peak, instead of the table's
    gbit: float = 1.0  # download, Gbit/s

    @property
    def share(self) -> int:
        """Clips of a global batch that fall to one device; where it cannot be split evenly, the most."""
        return math.ceil(self.global_batch / self.workers)

    @property
    def at_once(self) -> int:
        """Clips of one forward pass on one device."""
        return min(self.micro_batch or self.share, self.share)

    @property
    def sharded(self) -> bool:
        """Whether the state is spread over the devices."""
        return self.fsdp2 and self.workers > 1

    @property
    def samples(self) -> int:
        """Of the data set: windows, or a track for each clip."""
        return (self.clips or 0) * (1 if self.stored == "track" else self.windows_per_clip)

    @property
    def sample_frames(self) -> int:
        """Frames that a sample stores."""
        if self.stored == "windows":
            return self.model.num_frames
        return min(self.longest_track, round(CLIP_SECONDS * self.model.fps))


def check_plan(spec: PlanSpec) -> None:
    """Raises UserError for numbers that no run could start with."""
    for name, least in (("workers", 1), ("steps", 1), ("global_batch", 1), ("clips", 1)):
        value = getattr(spec, name)
        if value is not None and value < least:
            raise UserError(f"{name} {value}, expected at least {least}")
    if spec.mfu is not None and not 0 < spec.mfu <= 1:
        raise UserError(f"mfu {spec.mfu}, expected a share of the peak above 0 and at most 1")
    for name in ("gbit", "price"):
        value = getattr(spec, name)
        if value is not None and not value > 0:
            raise UserError(f"{name} {value}, expected a number above 0")
    if spec.workers > spec.global_batch:
        raise UserError(f"a global batch of {spec.global_batch} leaves some of {spec.workers} workers without a sample")
