"""Measures sampling with guidance on the CPU, ours against diffusers' eager 3D-UNet in the same loop.

    python -m benchmarks.sampling [--side 16] [--steps 4] [--repeats 5]

Same weights, noise, fusion and guidance; both take turns, step for step of one process. `diffusers` is its
`UNet3DConditionModel` with both branches of the guidance in one batch, as its text-to-video pipeline runs it.
Prints one JSON; `apart` is the largest difference of the final latents.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from diffusers import UNet3DConditionModel
from torch import nn

from benchmarks.machine import add_json, write_json
from benchmarks.mid_size import both_networks, mid_size
from trip_model.config import FusionConfig, TripConfig
from trip_model.model import Trip
from trip_model.sampler import sample_latents
from trip_model.unet import UNetConfig


class Eager(nn.Module):
    """diffusers' class behind the signature of ours: each text of a sample is a sample of its own."""

    def __init__(self, unet: UNet3DConditionModel, config: UNetConfig) -> None:
        super().__init__()
        self.unet, self.config = unet, config

    def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        texts = len(text) // len(x)
        return self.unet(torch.cat([x] * texts), t.repeat(texts), text, return_dict=False)[0]


@torch.no_grad()
def main(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    config = mid_size()
    networks = both_networks(config)
    ours, theirs = networks[0].eval(), networks[1].eval()
    settings = TripConfig(size=8 * arguments.side, fusion=FusionConfig(width=64, heads=4))
    models = {"ours": Trip(ours, settings).eval()}
    eager: Any = Eager(theirs, config)
    models["diffusers"] = Trip(eager, settings, models["ours"].fusion).eval()
    first = torch.randn(1, 4, 1, arguments.side, arguments.side)
    noise = torch.randn(1, 4, 16, arguments.side, arguments.side)
    text, empty = torch.randn(1, 77, 256), torch.randn(1, 77, 256)

    def sample(name: str, steps: int) -> tuple[float, torch.Tensor]:
        start = time.perf_counter()
        latents = sample_latents(models[name], first, text, empty, noise, steps, arguments.guidance)
        return time.perf_counter() - start, latents

    latents = {name: sample(name, arguments.steps)[1] for name in models}  # also the warm-up
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(arguments.repeats):
        for name in models:
            seconds[name].append(sample(name, arguments.steps)[0])
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "side": arguments.side,
        "steps": arguments.steps,
        "guidance": arguments.guidance,
        "seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
        "speedup": round(median["diffusers"] / median["ours"], 3),
        "apart": (latents["ours"] - latents["diffusers"]).abs().max().item(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=16, help="of the latents")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--repeats", type=int, default=5)
    add_json(parser)
    chosen = parser.parse_args()
    write_json("sampling", main(chosen), chosen.json)
