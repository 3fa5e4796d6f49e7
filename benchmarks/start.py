"""Where training starts on a base that predicts noise: the error of step 0 under each fusion, by fifths of t.

    python -m benchmarks.start [--rho 0.95] [--passing]
    python -m benchmarks.start --base examples/demo_base/weights

No network is trained. The base is the exact noise prediction of a text-to-video model on clips whose law is known: 16
frames of an AR(1) process of variance one, the first frame not given; with an error of its own on top, white, of mean
square 0, 0.004 or 0.02. `--passing` trains TNF by itself, with and without skips, to pass on its residual, the noise.
`--base` measures instead the error of a real base with the first frame at its head, on drawn clips: `residual_error`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from flows.recipes import demo
from tasks.ingest.drawing import draw_frame, draw_scene
from trip_model.config import FusionConfig, TripConfig
from trip_model.encoders import encode_pixels, load_text_encoder, load_vae
from trip_model.fusion import TemporalNoiseFusion
from trip_model.model import Trip, base_unet_output
from trip_model.schedule import NoiseSchedule
from trip_model.unet import UNet3D, UNetConfig

FRAMES, PLACES, CLIPS = 16, 8, 16
SMALL = UNetConfig(
    block_out_channels=(16, 32),
    down_block_types=("DownBlock3D", "CrossAttnDownBlock3D"),
    up_block_types=("CrossAttnUpBlock3D", "UpBlock3D"),
    cross_attention_dim=16,
    attention_head_dim=8,
    norm_num_groups=8,
)
SHRINKAGE = FusionConfig(width=16, heads=2, prediction="shrinkage")
STARTS = {
    "the base (TRIP^-)": FusionConfig(kind="none"),
    "direct, with skips (paper)": FusionConfig(width=16, heads=2),
    "shrinkage, unit": replace(SHRINKAGE, residual="unit"),
    "shrinkage, noise, 0.0004": replace(SHRINKAGE, residual_error=0.0004),
    "shrinkage, noise, 0.004 (paper-shrinkage)": SHRINKAGE,
    "shrinkage, noise, 0.04": replace(SHRINKAGE, residual_error=0.04),
}


class ExactBase(torch.nn.Module):
    """E[eps | z_t] for frames of known covariance, with a white error of its own."""

    def __init__(self, unet: UNet3D, schedule: NoiseSchedule, covariance_FF: torch.Tensor, error: float) -> None:
        super().__init__()
        self.config, self._schedule, self._error = unet.config, schedule, error
        variances, self._modes_FF = torch.linalg.eigh(covariance_FF)
        self._variances_F = variances.clamp_min(0)
        self._generator = torch.Generator().manual_seed(1)

    def forward(self, x_BCFHW: torch.Tensor, t_B: torch.Tensor, text_BLD: torch.Tensor) -> torch.Tensor:
        z_t = x_BCFHW[:, :, 1:]
        abar_B1 = self._schedule.alphas_cumprod_T[t_B][:, None]
        gain_BF = (1 - abar_B1).sqrt() / (abar_B1 * self._variances_F + 1 - abar_B1)
        noise = torch.einsum("bcfhw,fm,bm,gm->bcghw", z_t, self._modes_FF, gain_BF, self._modes_FF)
        noise = noise + self._error**0.5 * torch.randn(noise.shape, generator=self._generator)
        return torch.cat([noise[:, :, :1], noise], dim=2)


@torch.no_grad()
def start_errors(fusion: FusionConfig, rho: float, error: float) -> torch.Tensor:
    """[2, 5]: mean square error of the noise, and root mean square error of x0, frames 2 to 16, by fifths of t."""
    index = torch.arange(FRAMES)
    covariance = rho ** (index[:, None] - index[None]).abs().float()
    std = (0.0, *(2 * (1 - covariance[0, 1:])).sqrt().tolist())
    trip = Trip(UNet3D(SMALL), TripConfig(size=64, residual_std=std, fusion=fusion)).eval()
    base: Any = ExactBase(trip.unet, trip.schedule, covariance, error)
    trip.unet = base
    generator = torch.Generator().manual_seed(0)
    chol = torch.linalg.cholesky(covariance.double()).float()
    sums = torch.zeros(2, 5)
    for t in range(10, 1000, 20):
        white = torch.randn(CLIPS, 4, FRAMES, PLACES, PLACES, generator=generator)
        z_0, noise = torch.einsum("fg,bcghw->bcfhw", chol, white), torch.randn(white.shape, generator=generator)
        t_B = torch.full((CLIPS,), t)
        predicted = trip(trip.schedule.add_noise(z_0, noise, t_B), z_0[:, :, :1], t_B, torch.zeros(CLIPS, 1, 16))
        signal, sigma = trip.schedule.signal_and_noise(t_B, 5)
        off = (predicted - noise)[:, :, 1:]
        sums[0, t // 200] += off.square().mean() / 10
        sums[1, t // 200] += (off * sigma / signal).square().mean() / 10
    return torch.stack([sums[0], sums[1].sqrt()])


def passing_errors(skip: bool, learning_rate: float) -> list[float]:
    """Mean square error after 0, 100, 300 and 1000 steps of a TNF that only has to pass on its residual, the noise."""
    torch.manual_seed(0)
    tnf = TemporalNoiseFusion(FusionConfig(width=64, heads=4, residual_skip=skip), 4)
    optimiser, schedule = torch.optim.AdamW(tnf.parameters(), lr=learning_rate), NoiseSchedule()
    found, recent = [], []
    for step in range(1001):
        noise, motion = torch.randn(2, 8, 4, 1, PLACES, PLACES)
        t_B = torch.randint(100, 1000, (8,))
        signal, sigma = schedule.signal_and_noise(t_B, 5)
        loss = (tnf(noise, noise + signal / sigma * 0.5 * motion, t_B) - noise).square().mean()
        recent = [*recent[-19:], loss.item()]
        if step in (0, 100, 300, 1000):
            found.append(sum(recent) / len(recent))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return found


@torch.no_grad()
def base_errors(base: str, clips: int = 128) -> dict[int, float]:
    """Mean square error by time step of a base's prediction, noise or velocity, on drawn clips of its training."""
    vae, text, model = load_vae(base), load_text_encoder(base), demo().train.model
    config = replace(model, fusion=FusionConfig(kind="none"), unet_output=base_unet_output(base))
    trip = Trip.from_base(base, config).eval()
    times = [frame / model.fps for frame in range(model.num_frames)]
    scenes = [draw_scene(seed) for seed in range(clips)]
    pixels = (np.stack([draw_frame(scene, time, model.size) for time in times]) for scene in scenes)
    z_0 = torch.stack([encode_pixels(vae, clip) for clip in pixels]).transpose(1, 2) * vae.config.scaling_factor
    words = text.encode(text.tokenize([scene.caption for scene in scenes]))
    noise = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(0))
    errors = {}
    for t in range(49, 1000, 100):
        t_B = torch.full((clips,), t)
        signal, _ = trip.schedule.signal_and_noise(t_B[:1], 5)
        difference = trip(trip.schedule.add_noise(z_0, noise, t_B), z_0[:, :, :1], t_B, words) - noise
        # An error of the velocity is that of the noise over `signal`.
        scale = signal if config.unet_output == "velocity" else 1
        errors[t] = (difference / scale).square().mean().item()
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rho", type=float, default=0.95, help="correlation of neighbouring frames")
    parser.add_argument("--base", help="measure the error of this base, and nothing else")
    parser.add_argument("--passing", action="store_true", help="also train TNF to pass on its residual")
    given = parser.parse_args()
    if given.base is not None:
        print("| t | mean square error of the prediction |\n|---|---|")
        for t, value in base_errors(given.base).items():
            print(f"| {t} | {value:.3f} |")
        return
    print(
        "| error of the base | start | noise, mean square, by fifths of t | x0, root mean square |\n|---|---|---|---|"
    )
    for error in (0.0, 0.004, 0.02):
        for name, fusion in STARTS.items():
            noise, x0 = start_errors(fusion, given.rho, error).tolist()
            cells = [" ".join(f"{value:.2g}" for value in values) for values in (noise, x0)]
            print(f"| {error:g} | {name} | {cells[0]} | {cells[1]} |", flush=True)
    if not given.passing:
        return
    print("\n| skips | learning rate | mean square error after 0, 100, 300, 1000 steps |\n|---|---|---|")
    for skip in (True, False):
        for learning_rate in (2e-4, 1e-3):
            values = " ".join(f"{value:.3g}" for value in passing_errors(skip, learning_rate))
            print(f"| {'with' if skip else 'without'} | {learning_rate:g} | {values} |", flush=True)


if __name__ == "__main__":
    main()
