"""DDIM with the exact noise prediction on clips of a known distribution, without a network (Section 4.1)."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from trip_model.config import FusionConfig, ScheduleConfig, TripConfig
from trip_model.model import Trip
from trip_model.sampler import (
    SAMPLERS,
    SamplingOptions,
    chunks,
    low_pass,
    make_solver,
    sample_latents,
    start_latents,
    windows,
)
from trip_model.schedule import NoiseSchedule

FRAMES, CORRELATION = 6, 0.9
STEPS = [1, 7, 20, 50, 61, 64, 128, 150, 1000]


class GaussianClips:
    """Frames of an AR(1) process given the first frame: N(mean, covariance) at each place, in float64."""

    def __init__(self, z_first_BC1HW: torch.Tensor) -> None:
        index = torch.arange(FRAMES, dtype=torch.float64)
        decay = CORRELATION**index
        joint = CORRELATION ** (index[:, None] - index[None]).abs()
        self.mean = decay.view(1, 1, -1, 1, 1) * z_first_BC1HW.double()
        self.variances, self.modes = torch.linalg.eigh(joint - decay[:, None] * decay[None])
        self.variances = self.variances.clamp_min(0).view(1, 1, -1, 1, 1)
        self.std = (1 - decay.square() + (decay - 1).square()).sqrt()  # of Delta z, for a first frame of variance one

    def to_modes(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bcfhw,fm->bcmhw", x.double(), self.modes)

    def noise(self, z_t: torch.Tensor, abar: torch.Tensor) -> torch.Tensor:
        """E[eps | z_t, first frame], at one abar."""
        centred = self.to_modes(z_t.double() - abar.sqrt() * self.mean)
        return torch.einsum(
            "bcmhw,fm->bcfhw", centred * (1 - abar).sqrt() / (abar * self.variances + 1 - abar), self.modes
        )

    def ddim(self, z: torch.Tensor, abars: list[torch.Tensor]) -> torch.Tensor:
        """DDIM in closed form: each step from one abar to the next scales each mode by one factor."""
        x = self.to_modes(z.double() - abars[0].sqrt() * self.mean)
        v = self.variances
        for a, b in itertools.pairwise(abars):
            x = x * ((a * b).sqrt() * v + ((1 - a) * (1 - b)).sqrt()) / (a * v + 1 - a)
        return self.mean + torch.einsum("bcmhw,fm->bcfhw", x, self.modes)

    def flow(self, z: torch.Tensor, abar: torch.Tensor) -> torch.Tensor:
        """Returns the clean latent of the probability flow from z at abar."""
        x = self.to_modes(z.double() - abar.sqrt() * self.mean)
        x = x * (self.variances / (abar * self.variances + 1 - abar)).sqrt()
        return self.mean + torch.einsum("bcmhw,fm->bcfhw", x, self.modes)


def exact_abars(steps: int) -> list[torch.Tensor]:
    """Returns abar of the trailing grid from its definition, and 1 at the end."""
    abar = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), dim=0)
    times = [round(1000 - k * 1000 / steps) - 1 for k in range(steps)]
    return [*(abar[t] for t in times), torch.ones((), dtype=torch.float64)]


class ExactNet(torch.nn.Module):
    """Replaces the 3D-UNet: returns the output for which the fused noise is exact."""

    def __init__(self, unet: torch.nn.Module, trip: Trip, clips: GaussianClips) -> None:
        super().__init__()
        self.config, self.schedule, self.clips, self.settings = unet.config, trip.schedule, clips, trip.config

    def forward(self, x_BCFHW: torch.Tensor, t_B: torch.Tensor, text_BLD: torch.Tensor) -> torch.Tensor:
        z_first, z_t = x_BCFHW[:, :, :1].double(), x_BCFHW[:, :, 1:].double()
        abar = self.schedule.alphas_cumprod_T.double()[t_B[0]]
        noise, prior = self.clips.noise(z_t, abar), (z_t - abar.sqrt() * z_first) / (1 - abar).sqrt()
        fusion = self.settings.fusion
        if fusion.prediction == "shrinkage":
            signal = abar * self.clips.std.view(1, 1, -1, 1, 1).square()
            error = 1.0 if fusion.residual == "unit" else fusion.residual_error
            weight = error * (1 - abar) / (error * (1 - abar) + signal)
            share = signal / (error * (1 - abar) + signal)
            # The prior of frame 1 is exact: the output of the residual path has no effect there.
            share[:, :, 0] = 1.0
            noise = (noise - weight * prior) / (share.sqrt() if fusion.residual == "unit" else share)
        output = noise.float()
        return torch.cat([output[:, :, :1], output], dim=2)


def exact_model(base: Path, clips: GaussianClips, fusion: FusionConfig) -> Trip:
    std = (0.0, *clips.std[1:].tolist())
    trip = Trip.from_base(base, TripConfig(size=32, num_frames=FRAMES, residual_std=std, fusion=fusion)).eval()
    trip.unet = ExactNet(trip.unet, trip, clips)  # type: ignore
    return trip


PATHS = {
    "none": FusionConfig(kind="none"),
    "paper": FusionConfig(width=16, heads=2),
    "shrinkage of noise": FusionConfig(width=16, heads=2, prediction="shrinkage"),
    "shrinkage in units": FusionConfig(width=16, heads=2, prediction="shrinkage", residual="unit"),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("steps", STEPS)
def test_sampler_and_fusion_are_ddim_on_its_own_grid(tiny_base: Path, steps: int, path: str) -> None:
    generator = torch.Generator().manual_seed(0)
    z_first, start = (
        torch.randn(2, 4, 1, 2, 2, generator=generator),
        torch.randn(2, 4, FRAMES, 2, 2, generator=generator),
    )
    clips = GaussianClips(z_first)
    trip = exact_model(tiny_base, clips, PATHS[path])
    text = torch.zeros(2, 32, 16)
    sampled = sample_latents(trip, z_first, text, text[:1], start, steps, guidance=1.0)
    abars = exact_abars(steps)
    torch.testing.assert_close(sampled.double(), clips.ddim(start, abars), rtol=0, atol=1e-3)
    # DDIM approaches the probability flow as the number of steps grows.
    error = (sampled.double() - clips.flow(start, abars[0])).square().mean().sqrt()
    assert error < 2 / steps + 2e-3


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_every_number_of_steps_has_its_grid(spacing: Any) -> None:
    schedule = NoiseSchedule(replace(ScheduleConfig(), timestep_spacing=spacing))
    if spacing != "trailing":  # its only step would take noise for a clean latent
        with pytest.raises(ValueError, match=f"'{spacing}' starts at time step 0, expected one near the last, 999"):
            schedule.sampling_times(1)
        with pytest.raises(ValueError, match="starts at time step 0"):
            make_solver("euler", schedule, 1)
    for steps in range(1 if spacing == "trailing" else 2, 1001):
        times = schedule.sampling_times(steps)
        visited = [t for t, _ in times]
        assert len(visited) == steps and sorted(set(visited), reverse=True) == visited and visited[-1] >= 0
        assert [t_next for _, t_next in times] == [*visited[1:], None]


@pytest.mark.parametrize("steps", [1, 5, 20, 25, 50, 100, 250, 1000])
def test_where_the_steps_divide_the_schedule_each_is_diffusers_own_to_the_bit(steps: int) -> None:
    schedule = NoiseSchedule()
    theirs: Any = schedule.ddim()
    theirs.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    ours = expected = torch.randn(2, 4, 3, generator=generator)
    for t, t_next in schedule.sampling_times(steps):
        noise = torch.randn(2, 4, 3, generator=generator)
        expected = theirs.step(noise, t, expected).prev_sample
        ours = schedule.ddim_step(ours, noise, t, t_next)
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("sampler", ["dpm++", "unipc", "euler"])
@pytest.mark.parametrize("path", ["none", pytest.param("shrinkage in units", marks=pytest.mark.slow)])
def test_each_solver_gets_the_noise_of_its_own_time_steps(tiny_base: Path, sampler: str, path: str) -> None:
    generator = torch.Generator().manual_seed(0)
    z_first = torch.randn(2, 4, 1, 2, 2, generator=generator)
    start = torch.randn(2, 4, FRAMES, 2, 2, generator=generator)
    clips = GaussianClips(z_first)
    trip = exact_model(tiny_base, clips, PATHS[path])
    text = torch.zeros(2, 32, 16)

    def error(name: str, steps: int) -> float:
        options = SamplingOptions(sampler=name)
        sampled = sample_latents(trip, z_first, text, text[:1], start, steps, 1.0, options=options)
        return (sampled.double() - clips.flow(start, exact_abars(steps)[0])).square().mean().sqrt().item()

    by_steps = {steps: (error(sampler, steps), error("ddim", steps)) for steps in (20, 100)}
    for ours, ddim in by_steps.values():
        if sampler == "euler":  # with the same noise it is DDIM, in other variables
            assert ours == pytest.approx(ddim, rel=0.02, abs=1e-4)
        else:
            assert ours < 0.5 * ddim
    assert by_steps[100][0] < by_steps[20][0]


def test_no_motion_returns_the_first_frame_with_each_solver(tiny_base: Path) -> None:
    z_first = torch.randn(1, 4, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    start = torch.randn(1, 4, FRAMES, 2, 2, generator=torch.Generator().manual_seed(2))
    trip = exact_model(tiny_base, GaussianClips(z_first), PATHS["none"])
    text = torch.zeros(1, 32, 16)
    for sampler in SAMPLERS:
        still = sample_latents(trip, z_first, text, text, start, 10, 1.0, options=SamplingOptions(sampler, motion=0.0))
        torch.testing.assert_close(still, z_first.expand_as(still), rtol=0, atol=1e-3)


@pytest.mark.parametrize("frames", [16, 17, 40, 64, 100])
def test_windows_and_chunks_cover_a_video(frames: int) -> None:
    for cover in (windows(frames, 16, 4), chunks(frames, 16, 4)):
        assert cover[0] == (0, 16) and cover[-1][1] == frames
        assert all(stop - start <= 16 for start, stop in cover)
        assert all(later[0] <= earlier[1] - 4 < later[1] for earlier, later in itertools.pairwise(cover))


@pytest.mark.slow
def test_joint_windows_of_an_exact_still_are_that_still(tiny_base: Path) -> None:
    z_first = torch.randn(1, 4, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    start = torch.randn(1, 4, 14, 2, 2, generator=torch.Generator().manual_seed(2))
    config = TripConfig(size=32, num_frames=FRAMES, residual_std=(0.0, *(0.5,) * (FRAMES - 1)))
    trip = Trip.from_base(tiny_base, replace(config, fusion=FusionConfig(kind="linear", lambda_last=1.0))).eval()
    text = torch.zeros(1, 32, 16)
    options = SamplingOptions(window=FRAMES, overlap=2)
    still = sample_latents(trip, z_first, text, text, start, 3, 1.0, options=options)
    torch.testing.assert_close(still, z_first.expand_as(still), rtol=0, atol=1e-3)


def test_a_low_pass_start_keeps_the_photo_in_low_frequencies_and_the_noise_in_high_ones() -> None:
    x = torch.randn(1, 4, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    constant = torch.full_like(x, 3.0)
    torch.testing.assert_close(low_pass(constant), constant)
    assert low_pass(x).std() < 0.2 * x.std()
    z_first = torch.full((1, 4, 1, 8, 8), 5.0)
    schedule = NoiseSchedule()
    mixed = start_latents(schedule, "low-pass", z_first, x, 500)
    photo = start_latents(schedule, "photo", z_first, x, 500)
    torch.testing.assert_close(
        mixed - low_pass(mixed), (x - low_pass(x)) + low_pass(photo - x) - low_pass(low_pass(photo - x))
    )
    assert torch.equal(start_latents(schedule, "noise", z_first, x, 500), x)
