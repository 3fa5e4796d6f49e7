"""What a plan answers beyond the recipe's specs: on which device, for how many clips, at which price."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tasks.encode.spec import PrepareSpec
from tasks.records import UserError

CLIP_SECONDS = 17.5  # the mean of WebVid


@dataclass(frozen=True)
class Question:
    """The device and the data of a plan. The number of devices is `TrainSpec.workers`."""

    device: str  # a name of `hardware.DEVICES`
    clips: int | None = None  # None leaves out what depends on the data
    clips_are: Literal["linked", "drawn", "prepared"] = "linked"  # links to videos, drawn clips, latents already
    price: float | None = None  # USD for an hour of one GPU
    mfu: float | None = None  # share of the device's peak, instead of the table's
    gbit: float = 1.0  # download, Gbit/s
    options: bool = False  # compare micro-batches, recomputed activations and shards

    def samples(self, prepare: PrepareSpec) -> int:
        """Samples of the data set: windows, or one track per clip. Drawn clips are as short as one window."""
        several = prepare.clip != "track" and self.clips_are == "linked"
        return (self.clips or 0) * (prepare.windows_per_clip if several else 1)


def sample_frames(prepare: PrepareSpec) -> int:
    """Frames of one stored sample; of a track, the mean."""
    if prepare.clip != "track":
        return prepare.num_frames
    return min(prepare.longest_track, round(CLIP_SECONDS * prepare.fps))


def check_question(question: Question) -> None:
    """Raises UserError for values outside their range."""
    if question.clips is not None and question.clips < 1:
        raise UserError(f"clips {question.clips}, expected at least 1")
    if question.mfu is not None and not 0 < question.mfu <= 1:
        raise UserError(f"mfu {question.mfu}, expected a share of the peak above 0 and at most 1")
    for name in ("gbit", "price"):
        value = getattr(question, name)
        if value is not None and not value > 0:
            raise UserError(f"{name} {value}, expected a number above 0")
