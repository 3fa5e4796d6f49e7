"""Measures the full-size model with random weights on a GPU: training steps, a clip of 50 steps, the VAE's encoding.

    python -m benchmarks.gpu [--json benchmarks/results/gpu.json]       17 x 32 x 32 latents, bfloat16, batches 1 to 32
    python -m benchmarks.gpu --tiny                                     the same script on a CPU, with a tiny network

A batch that does not fit is recorded as such, and larger ones are left out. `mfu` is the share of the matmul peak that
is measured first in the same process; recomputed operations do not count. Prints one JSON.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from benchmarks.machine import add_json, write_json
from flows.planning.base import PUBLISHED
from flows.planning.measuring import run_seconds
from tasks.train.optimizer import MovingAverage, make_optimizer, trained_weights
from tasks.train.profiling import peak_memory_bytes
from tasks.train.spec import TrainSpec
from tasks.train.utilisation import clip_flops, matmul_flops_per_second
from trip_model.config import FusionConfig, ObjectiveConfig, TripConfig
from trip_model.encoders import encode_posterior
from trip_model.model import Trip
from trip_model.objective import draw, training_loss
from trip_model.sampler import sample_latents
from trip_model.unet import UNet3D, UNetConfig

TINY_UNET = UNetConfig(
    block_out_channels=(16, 16),
    down_block_types=("DownBlock3D", "CrossAttnDownBlock3D"),
    up_block_types=("CrossAttnUpBlock3D", "UpBlock3D"),
    layers_per_block=1,
    cross_attention_dim=16,
    attention_head_dim=8,
    norm_num_groups=8,
)
TINY_VAE: dict[str, Any] = PUBLISHED.vae | {
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    unet: UNetConfig
    model: TripConfig
    vae: dict[str, Any]
    text_length: int
    batches: tuple[int, ...]
    sampling_steps: int
    frames: tuple[int, ...]  # that the VAE encodes at once
    repeats: int


FULL = Sizes(UNetConfig(), TripConfig(), PUBLISHED.vae, 77, (1, 2, 4, 8, 16, 32), 50, (16, 32, 64), 5)
TINY = Sizes(
    TINY_UNET,
    TripConfig(size=32, num_frames=4, residual_std=(0.0, 0.5, 0.5, 0.5), fusion=FusionConfig(width=16, heads=2)),
    TINY_VAE,
    8,
    (1, 2),
    2,
    (4,),
    1,
)


class Training:
    """Training steps as the loop runs them, on random latents: loss, backward, clipping, AdamW and the average."""

    def __init__(self, sizes: Sizes, spec: TrainSpec, device: str) -> None:
        torch.manual_seed(0)
        self._spec, self._device, self._sizes = spec, device, sizes
        self.trip = Trip(UNet3D(sizes.unet), sizes.model).to(device).train()
        self._weights = trained_weights(self.trip)
        self._optimizer = make_optimizer(self.trip, spec)
        self._average = MovingAverage(self._weights, 0.999)
        side = sizes.model.size // 8
        self.latent_shape = (4, sizes.model.num_frames, side, side)
        self.text = torch.zeros(1, sizes.text_length, sizes.unet.cross_attention_dim, device=device)

    def step(self, clips: int, recompute: bool) -> None:
        """One step on `clips` clips at once."""
        self.trip.unet.recompute_activations = recompute
        drawn = draw(0, 0, range(clips), clips, self.latent_shape, 1000, 0.0)
        self._optimizer.zero_grad(set_to_none=True)
        loss, _ = training_loss(
            self.trip,
            torch.randn(clips, *self.latent_shape, device=self._device),
            self.text.expand(clips, -1, -1),
            self.text,
            drawn,
            ObjectiveConfig(),
            torch.bfloat16 if self._spec.precision == "bfloat16" else None,
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._weights.values(), 1.0)
        self._optimizer.step()
        self._average.update(0)


def train_steps(sizes: Sizes, spec: TrainSpec, device: str) -> list[dict[str, Any]]:
    """Seconds, clips per second, peak memory and MFU of each batch, activations kept and recomputed."""
    training = Training(sizes, spec, device)
    flops = clip_flops(training.trip, spec, training.latent_shape, training.text.shape[1:])
    peak = matmul_flops_per_second(device, spec.precision)
    rows = []
    for recompute in (False, True):
        for clips in sizes.batches:
            row: dict[str, Any] = {"batch": clips, "recompute": recompute}
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            try:
                seconds = median_seconds(lambda n=clips, r=recompute: training.step(n, r), sizes.repeats, device)
            except torch.OutOfMemoryError:
                rows.append(row | {"out_of_memory": True})
                torch.cuda.empty_cache()
                break
            rows.append(
                row
                | {
                    "seconds": seconds,
                    "clips_per_second": clips / seconds,
                    "mfu": clips * flops / seconds / peak,
                    "peak_memory_gb": peak_memory_bytes(device) / 1e9,
                }
            )
    return rows


@torch.no_grad()
def clip_seconds(sizes: Sizes, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds of one clip, with guidance and without."""
    torch.manual_seed(0)
    trip = Trip(UNet3D(sizes.unet), sizes.model).to(device).eval()
    network: Any = trip.unet
    network.to(dtype)
    side, width = sizes.model.size // 8, sizes.unet.cross_attention_dim
    first, noise = (torch.randn(1, 4, frames, side, side, device=device) for frames in (1, sizes.model.num_frames))
    text, empty = torch.randn(2, 1, sizes.text_length, width, device=device)

    def sample(guidance: float) -> None:
        sample_latents(trip, first, text, empty, noise, sizes.sampling_steps, guidance)

    seconds = {
        name: median_seconds(lambda g=guidance: sample(g), min(sizes.repeats, 3), device)
        for name, guidance in (("guidance", 7.5), ("no_guidance", 1.0))
    }
    return {"steps": sizes.sampling_steps, "seconds": seconds}


def vae_encode(sizes: Sizes, device: str) -> list[dict[str, Any]]:
    """Frames per second of the VAE in float32, as prepare runs it."""
    torch.manual_seed(0)
    vae: Any = AutoencoderKL.from_config(sizes.vae)
    vae.eval().to(device)
    rows = []
    for frames in sizes.frames:
        pixels = np.zeros((frames, sizes.model.size, sizes.model.size, 3), np.uint8)
        seconds = median_seconds(lambda p=pixels, n=frames: encode_posterior(vae, p, n), sizes.repeats, device)
        rows.append({"frames": frames, "seconds": seconds, "frames_per_second": frames / seconds})
    return rows


def median_seconds(work: Callable[[], Any], repeats: int, device: str) -> float:
    """The median of some runs after one that warms up."""
    return statistics.median(run_seconds(device, work, repeats))


def main(tiny: bool) -> dict[str, Any]:
    """All measurements."""
    sizes, device = (TINY, "cpu") if tiny else (FULL, "cuda")
    spec = TrainSpec("", "", "", model=sizes.model, precision="float32" if tiny else "bfloat16")
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "precision": spec.precision,
        "matmul_peak_flops_per_second": matmul_flops_per_second(device, spec.precision),
        "train": train_steps(sizes, spec, device),
        "clip": clip_seconds(sizes, device, torch.float32 if tiny else torch.bfloat16),
        "vae": vae_encode(sizes, device),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny network on the CPU")
    add_json(parser)
    chosen = parser.parse_args()
    if not chosen.tiny and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --tiny runs the script on the CPU")
    write_json("gpu", main(chosen.tiny), chosen.json)
