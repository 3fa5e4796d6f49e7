"""The messages between gateway and replicas: the spec of a replica, progress, clips, and status."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass, field

from infra.settings import MlflowAccess
from tasks.serve.limits import Refusal


@dataclass(frozen=True)
class EngineSpec:
    """The model that a replica serves, and its limits.

    Args:
        name: the registered model.
        alias: the alias to follow.
        tracking_uri: the registry's address.
        cache: folder on this machine for downloaded versions.
        max_batch: requests of equal shape in one pass of the model. With more than 1, a few values of a clip differ by
            one level of 255, depending on the other requests of its batch (`docs/decisions/serving.md`).
        max_queue: requests that may wait; further ones are refused.
        access: the driver's credentials for the registry.
        poll_seconds: seconds between two look-ups of the alias.
        step_frames: the largest product of a clip's steps and frames; twice that is computed with guidance.
    """

    name: str
    alias: str
    tracking_uri: str
    cache: str
    max_batch: int = 1
    max_queue: int = 16
    poll_seconds: float = 3.0
    step_frames: int = 64_000
    access: MlflowAccess = field(default_factory=MlflowAccess)


@dataclass(frozen=True)
class Progress:
    """`step` of `steps` denoising steps are done; step 0: the request is accepted."""

    step: int
    steps: int


@dataclass(frozen=True)
class Clip:
    """The answer to a request, with every value that reproduces it. `files`: one video, or a PNG for each frame."""

    files: tuple[bytes, ...]
    format: str
    seed: int
    num_frames: int
    width: int
    height: int
    fps: float
    steps: int
    guidance: float
    model: str
    version: str
    batch: int  # number of requests in its batch, itself included
    seconds: float  # in the model, without waiting
    prompt_truncated: bool = False  # the text encoder did not read the end of the prompt

    def as_file(self) -> bytes:
        """Returns the video, or a zip of the frames."""
        if self.format != "frames":
            return self.files[0]
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # a PNG is compressed already
            for number, frame in enumerate(self.files):
                archive.writestr(zipfile.ZipInfo(f"{number:03d}.png"), frame)  # without the time of day
        return buffer.getvalue()


MEDIA_TYPES = {"mp4": "video/mp4", "gif": "image/gif", "frames": "application/zip"}


def file_name(seed: int, format: str) -> str:
    """The name of a downloaded clip."""
    return f"trip-{seed}.{'zip' if format == 'frames' else format}"


Message = Progress | Clip | Refusal


@dataclass(frozen=True)
class Status:
    """The state of a replica. `version` is "" without a model; `trouble` says why the alias is not followed."""

    model: str
    version: str
    trouble: str
    waiting: int
    threads: int
    device: str
    defaults: dict[str, float]  # num_frames, steps, guidance and fps of the model
    max_steps: int  # time steps of the model, 0 without one
    size: int = 0  # side of a frame in pixels, 0 without a model
