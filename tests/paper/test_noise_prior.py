"""Equations 1 to 8 as exact identities."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from trip_model.config import ScheduleConfig
from trip_model.noise_prior import (
    image_noise_prior,
    normalised_prior,
    one_step_backward,
    optimal_shrinkage,
    residual_item,
    scaled_residual,
    unscaled_residual,
)
from trip_model.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule()


def clip(seed: int = 0, batch: int = 2, still: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(z_0, noise), both [B, 4, 6, 5, 5]."""
    generator = torch.Generator().manual_seed(seed)
    z_0 = torch.randn(batch, 4, 6, 5, 5, generator=generator)
    if still:
        z_0 = z_0[:, :, :1].expand_as(z_0).clone()
    return z_0, torch.randn(z_0.shape, generator=generator)


def diffused(z_0: torch.Tensor, noise: torch.Tensor, t: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    signal, sigma = SCHEDULE.signal_and_noise(torch.tensor(t), z_0.ndim)
    return SCHEDULE.add_noise(z_0, noise, torch.tensor(t)), signal, sigma


def test_alpha_bar_agrees_with_diffusers_and_with_its_definition() -> None:
    ddpm = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=2e-2, beta_schedule="linear")
    assert torch.equal(SCHEDULE.alphas_cumprod_T, ddpm.alphas_cumprod)
    betas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
    exact = torch.cumprod(1 - betas, dim=0)
    torch.testing.assert_close(SCHEDULE.alphas_cumprod_T.double(), exact, rtol=2e-5, atol=0)


def test_forward_diffusion_agrees_with_diffusers() -> None:
    z_0, noise = clip()
    t = torch.tensor([3, 700])
    ours = SCHEDULE.add_noise(z_0, noise, t)
    theirs = DDPMScheduler(beta_start=1e-4, beta_end=2e-2).add_noise(z_0, noise, t)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_ddim_is_set_up_for_latents() -> None:
    ddim = SCHEDULE.ddim()
    assert ddim.config.clip_sample is False
    assert ddim.config.timestep_spacing == "trailing"
    ddim.set_timesteps(50)
    assert ddim.timesteps[0] == 999 and ddim.timesteps[-1] == 19
    leading = NoiseSchedule(ScheduleConfig(timestep_spacing="leading")).ddim()
    leading.set_timesteps(50)
    assert leading.timesteps[0] == 980 and leading.timesteps[-1] == 0


@settings(max_examples=25, deadline=None)
@given(t=st.integers(0, 999), seed=st.integers(0, 2**31))
def test_one_step_backward_with_the_true_noise_gives_the_frame(t: int, seed: int) -> None:
    z_0, noise = clip(seed, batch=1)
    z_t, signal, sigma = diffused(z_0, noise, [t])
    tolerance = 2e-6 * (1 + (sigma / signal).item())
    torch.testing.assert_close(one_step_backward(z_t, noise, signal, sigma), z_0, rtol=0, atol=4 * tolerance)


def test_residual_item_is_the_difference_to_frame_one() -> None:
    z_0, _ = clip()
    delta = residual_item(z_0, z_0[:, :, :1])
    assert torch.equal(delta[:, :, 0], torch.zeros_like(delta[:, :, 0]))
    torch.testing.assert_close(z_0[:, :, :1] + delta, z_0)


def test_scaled_residual_and_its_inverse() -> None:
    z_0, noise = clip()
    _, signal, sigma = diffused(z_0, noise, [50, 800])
    delta = residual_item(z_0, z_0[:, :, :1])
    torch.testing.assert_close(unscaled_residual(scaled_residual(delta, signal, sigma), signal, sigma), delta)


@settings(max_examples=25, deadline=None)
@given(t=st.integers(0, 999), seed=st.integers(0, 2**31))
def test_prior_is_noise_plus_scaled_residual(t: int, seed: int) -> None:
    z_0, noise = clip(seed, batch=1)
    z_t, signal, sigma = diffused(z_0, noise, [t])
    z_first = z_0[:, :, :1]
    expected = noise + scaled_residual(residual_item(z_0, z_first), signal, sigma)
    prior = image_noise_prior(z_t, z_first, signal, sigma)
    torch.testing.assert_close(prior, expected, rtol=1e-5, atol=1e-5 / sigma.item())


@settings(max_examples=25, deadline=None)
@given(t=st.integers(0, 999), seed=st.integers(0, 2**31))
def test_one_step_backward_with_the_prior_gives_the_first_frame(t: int, seed: int) -> None:
    z_0, noise = clip(seed, batch=1)
    z_t, signal, sigma = diffused(z_0, noise, [t])
    z_first = z_0[:, :, :1]
    back = one_step_backward(z_t, image_noise_prior(z_t, z_first, signal, sigma), signal, sigma)
    tolerance = 2e-6 * (1 + (1 / signal).item())
    torch.testing.assert_close(back, z_first.expand_as(back), rtol=0, atol=4 * tolerance)


def test_prior_of_the_first_frame_is_the_noise() -> None:
    z_0, noise = clip(batch=4)
    z_t, signal, sigma = diffused(z_0, noise, [0, 10, 300, 999])
    prior = image_noise_prior(z_t, z_0[:, :, :1], signal, sigma)
    torch.testing.assert_close(prior[:, :, 0], noise[:, :, 0], rtol=0, atol=5e-5)


def test_prior_of_a_still_clip_is_the_noise() -> None:
    z_0, noise = clip(batch=3, still=True)
    z_t, signal, sigma = diffused(z_0, noise, [20, 300, 999])
    prior = image_noise_prior(z_t, z_0[:, :, :1], signal, sigma)
    torch.testing.assert_close(prior, noise, rtol=0, atol=1e-5)


def test_prior_is_float32_under_autocast() -> None:
    z_0, noise = clip()
    z_t, signal, sigma = diffused(z_0, noise, [5, 500])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prior = image_noise_prior(z_t, z_0[:, :, :1], signal, sigma)
    assert prior.dtype == torch.float32
    torch.testing.assert_close(prior[:, :, 0], noise[:, :, 0], rtol=0, atol=5e-5)


def test_normalised_prior_has_unit_deviation_at_every_time_step() -> None:
    generator = torch.Generator().manual_seed(1)
    std = torch.tensor([0.0, 0.4]).view(1, 1, 2, 1, 1)
    z_first = torch.randn(1, 4, 1, 64, 64, generator=generator)
    z_0 = z_first + std * torch.randn(1, 4, 2, 64, 64, generator=generator)
    for t in (0, 30, 300, 999):
        noise = torch.randn(z_0.shape, generator=generator)
        z_t, signal, sigma = diffused(z_0, noise, [t])
        normed = normalised_prior(z_t, z_first, signal, sigma, std)
        assert abs(normed[:, :, 0].std().item() - 1) < 0.02 and abs(normed[:, :, 1].std().item() - 1) < 0.02
        shrink = optimal_shrinkage(signal, sigma, std)
        prior = image_noise_prior(z_t, z_first, signal, sigma)
        torch.testing.assert_close(shrink * prior, shrink.sqrt() * normed, rtol=1e-4, atol=1e-5)


def test_optimal_shrinkage_beats_its_neighbours() -> None:
    generator = torch.Generator().manual_seed(2)
    std, count = 0.5, 200_000
    delta, noise = std * torch.randn(count, generator=generator), torch.randn(count, generator=generator)
    for t in (30, 200, 600):
        signal, sigma = SCHEDULE.signal_and_noise(torch.tensor([t]), 1)
        prior = noise + signal / sigma * delta
        best = optimal_shrinkage(signal, sigma, torch.tensor(std))
        errors = [(noise - weight * best * prior).square().mean() for weight in (0.9, 1.0, 1.1)]
        assert errors[1] < errors[0] and errors[1] < errors[2]
