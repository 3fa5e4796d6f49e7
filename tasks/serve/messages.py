"""The messages between gateway and replicas: the spec of a replica, progress, clips, and status."""

from __future__ import annotations

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
