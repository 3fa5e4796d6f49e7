"""What crosses the doors of the service: how a replica is set up, and what it says of a request and of itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from infra.settings import MlflowAccess
from tasks.serve.limits import Refusal


@dataclass(frozen=True)
class EngineSpec:
    """What one replica serves and how.

    Args:
        name: the registered model.
        alias: the alias to follow.
        tracking_uri: the registry's address.
        cache: folder on this machine for the versions that were downloaded.
        max_batch: requests of equal shape in one pass of the model. More than 1 changes a few values of a clip by one
            level of 255, by what the request happened to share its batch with (`docs/decisions/serving.md`).
        max_queue: requests that may wait; one more is refused.
        access: the driver's credentials for the registry.
        poll_seconds: how often the registry is asked where the alias points.
    """

    name: str
    alias: str
    tracking_uri: str
    cache: str
    max_batch: int = 1
    max_queue: int = 16
    poll_seconds: float = 3.0
    access: MlflowAccess = field(default_factory=MlflowAccess)


@dataclass(frozen=True)
class Progress:
    """A request is accepted (step 0) or has `step` of `steps` denoising steps behind it."""

    step: int
    steps: int


@dataclass(frozen=True)
class Clip:
    """The answer to a request, and what it takes to make it again; `files` is one video, or a PNG for each frame."""

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
    batch: int  # how many requests were computed together with it, itself included
    seconds: float  # in the model, without the wait


Event = Progress | Clip | Refusal


@dataclass(frozen=True)
class Status:
    """`version` is "" while there is no model; `trouble` is what keeps the alias from being followed, "" if nothing."""

    model: str
    version: str
    trouble: str
    waiting: int
    threads: int
    device: str
    defaults: dict[str, float]  # num_frames, steps, guidance and fps of the model
