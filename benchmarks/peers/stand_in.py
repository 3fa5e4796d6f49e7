"""A stand-in for the VAE with its shapes but no computation; it can sleep, as a process that waits for a GPU does."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
import torch
from torch import nn

from infra.cluster import OBJECT_STORE_BYTES
from infra.settings import CHECKOUT, apply_environment_defaults

FACTOR = 8


class StandIn(nn.Module):
    """Returns means over 8 x 8 pixels as latents, after a sleep of `seconds_per_frame` for each frame."""

    def __init__(self, seconds_per_frame: float = 0.0) -> None:
        super().__init__()
        self._seconds = seconds_per_frame
        self._weight = nn.Parameter(torch.zeros(1), requires_grad=False)  # carries the device
        self.config = SimpleNamespace(block_out_channels=(1, 1, 1, 1))

    def encode(self, frames_FCHW: torch.Tensor) -> Any:
        """Returns the part of `AutoencoderKL.encode`'s result that `encode_posterior` uses."""
        time.sleep(self._seconds * len(frames_FCHW))
        small = nn.functional.avg_pool2d(frames_FCHW, FACTOR)
        mean = torch.cat([small, small.mean(1, keepdim=True)], dim=1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, logvar=torch.zeros_like(mean)))


def install(seconds_per_frame: float = 0.0) -> None:
    """Makes the encoders of this process load the stand-in; the pages of a data set still decode with the VAE."""
    from trip_model import encoders

    real = encoders.load_vae

    def load(base: str | Path, device: str | torch.device = "cpu") -> nn.Module:
        stand_in = StandIn(seconds_per_frame)
        vae: Any = real(base, device)
        stand_in.decode = vae.decode
        stand_in.config.scaling_factor = vae.config.scaling_factor
        return stand_in

    encoders.load_vae = load


@contextmanager
def local_ray(cpus: int, stand_in_seconds: float | None) -> Iterator[None]:
    """Starts a local session whose workers load the stand-in with this sleep per frame, or the VAE for None."""

    def hook() -> None:
        install(stand_in_seconds or 0.0)

    apply_environment_defaults()
    os.environ["PYTHONPATH"] = str(CHECKOUT)  # the raylet passes it to the workers
    ray.init(
        "local",  # ignores other clusters on this machine
        num_cpus=cpus,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        runtime_env=None if stand_in_seconds is None else {"worker_process_setup_hook": hook},
    )
    try:
        yield
    finally:
        ray.shutdown()
