"""Conditioning, fusion and the complete model (Equations 9 and 11, Figures 2 and 3, Tables 5 and 6)."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from trip_model import model
from trip_model.conditioning import drop_condition_slot, unet_input
from trip_model.config import FusionConfig, TripConfig
from trip_model.fusion import AdaptiveLayerNorm, Shrinkage, TemporalNoiseFusion, linear_decay, linear_fusion
from trip_model.model import Trip, base_unet_output, measure_residual_std
from trip_model.noise_prior import image_noise_prior, normalised_prior, optimal_shrinkage, unknown_share
from trip_model.pipeline import sample_latents
from trip_model.schedule import NoiseSchedule
from trip_model.unet import load_unet, widen_input

SMALL = TripConfig(size=32, fusion=FusionConfig(width=16, heads=2))
UNITS = FusionConfig(width=16, heads=2, prediction="shrinkage", residual="unit")  # as in the demo


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(z_t [2, 4, 16, 4, 4], z_first, t, text)."""
    generator = torch.Generator().manual_seed(seed)
    z_t = torch.randn(2, 4, 16, 4, 4, generator=generator)
    z_first = torch.randn(2, 4, 1, 4, 4, generator=generator)
    return z_t, z_first, torch.tensor([10, 700]), torch.randn(2, 32, 16, generator=generator)


def test_the_conditioning_slot_is_head_tail_or_channels() -> None:
    z_t, z_first, _, _ = batch()
    head, tail, channel = (unet_input(z_t, z_first, c) for c in ("head", "tail", "channel"))
    assert torch.equal(head[:, :, :1], z_first) and torch.equal(head[:, :, 1:], z_t)
    assert torch.equal(tail[:, :, -1:], z_first) and torch.equal(tail[:, :, :-1], z_t)
    assert torch.equal(channel[:, 4:], z_first.expand_as(z_t)) and torch.equal(channel[:, :4], z_t)
    assert torch.equal(drop_condition_slot(head, "head"), z_t)
    assert torch.equal(drop_condition_slot(tail, "tail"), z_t)


def test_widened_input_leaves_a_pretrained_unet_unchanged(tiny_base: Path) -> None:
    unet = load_unet(tiny_base).eval()
    z_t, z_first, t, text = batch()
    before = unet(z_t, t, text)
    wide = widen_input(unet)
    assert wide.config.in_channels == 8
    assert torch.equal(wide(unet_input(z_t, z_first, "channel"), t, text), before)


def test_linear_fusion_is_equation_nine() -> None:
    prior, residual = torch.full((1, 1, 3, 1, 1), 2.0), torch.full((1, 1, 3, 1, 1), 10.0)
    decay = linear_decay(3, 1.0, 0.5)
    assert decay.flatten().tolist() == [1.0, 0.75, 0.5]
    assert linear_fusion(prior, residual, decay).flatten().tolist() == [2.0, 4.0, 6.0]


def test_adaptive_layer_norm_uses_the_time_step_of_each_sample() -> None:
    torch.manual_seed(0)
    norm = AdaptiveLayerNorm(8)
    torch.nn.init.normal_(norm.to_scale_shift.weight)
    x, time = torch.randn(3, 5, 8), torch.randn(3, 8)
    normed = norm(x, time)
    for index in range(3):
        torch.testing.assert_close(normed[index : index + 1], norm(x[index : index + 1], time[index : index + 1]))
    assert not torch.allclose(normed[0], norm(x[:1], time[1:2])[0])


@pytest.mark.parametrize("key_value", ["channel", "token"])
def test_shrinkage_at_initialisation_equals_its_closed_form(tiny_base: Path, key_value: str) -> None:
    config = replace(SMALL, fusion=replace(UNITS, key_value=key_value))
    trip = Trip.from_base(tiny_base, config).eval()
    z_t, z_first, t, text = batch()
    signal, sigma = trip.schedule.signal_and_noise(t, 5)
    std = trip.residual_std(16, t.device)
    shrink = optimal_shrinkage(signal, sigma, std)
    residual = trip.unet(unet_input(z_t, z_first, "head"), t, text)[:, :, 1:]
    expected = shrink * image_noise_prior(z_t, z_first, signal, sigma) + (1 - shrink).sqrt() * residual
    torch.testing.assert_close(trip(z_t, z_first, t, text), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("key_value", ["channel", "token"])
def test_tnf_reads_prior_residual_and_time(key_value: Any) -> None:
    torch.manual_seed(0)
    tnf = TemporalNoiseFusion(FusionConfig(width=16, heads=2, key_value=key_value), 4)
    torch.nn.init.normal_(tnf.out.weight)
    torch.nn.init.normal_(tnf.norm_cross.to_scale_shift.weight)
    residual, prior, t = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 3, 2, 2), torch.tensor([5, 900])
    out = tnf.attend(residual, prior, t)
    assert out.shape == residual.shape
    assert not torch.allclose(out, tnf.attend(residual, prior + 1, t))
    assert not torch.allclose(out, tnf.attend(residual + 1, prior, t))
    assert not torch.allclose(out, tnf.attend(residual, prior, t.flip(0)))
    # Equation 11 fuses frame by frame: the noise of another frame has no effect.
    other = prior.clone()
    other[:, :, 1] += 1
    torch.testing.assert_close(tnf.attend(residual, other, t)[:, :, 0], out[:, :, 0])


@pytest.mark.parametrize("t", [3, 400, 999])
@pytest.mark.parametrize("kind", ["noise", "unit"])
def test_local_shrinkage_runs_from_the_closed_form_to_the_prior(kind: Any, t: int) -> None:
    generator = torch.Generator().manual_seed(t)
    z_0 = torch.randn(2, 4, 3, 4, 4, generator=generator)
    noise, residual = (torch.randn(z_0.shape, generator=generator) for _ in range(2))
    schedule, t_B = NoiseSchedule(), torch.tensor([t, t])
    signal, sigma = schedule.signal_and_noise(t_B, 5)
    std = torch.tensor([0.0, 0.3, 1.0]).view(1, 1, 3, 1, 1)
    z_t = schedule.add_noise(z_0, noise, t_B)
    prior = image_noise_prior(z_t, z_0[:, :, :1], signal, sigma)
    unit_prior = normalised_prior(z_t, z_0[:, :, :1], signal, sigma, std)
    error = 1.0 if kind == "unit" else 0.3 * signal.square()
    known = optimal_shrinkage(signal, sigma, std, error).sqrt()
    weights = Shrinkage(known, unknown_share(signal, sigma, std, error).sqrt(), known * prior, error)
    config = replace(UNITS, residual=kind)

    def tnf(log_threshold: float) -> TemporalNoiseFusion:
        module = TemporalNoiseFusion(replace(config, local_shrinkage=True), 4)
        torch.nn.init.constant_(module.log_threshold, log_threshold)
        return module

    closed_form = TemporalNoiseFusion(config, 4)(residual, unit_prior, t_B, weights)
    torch.testing.assert_close(tnf(-40.0)(residual, unit_prior, t_B, weights), closed_form)
    still = tnf(40.0)(residual, unit_prior, t_B, weights)
    torch.testing.assert_close(still, prior, rtol=1e-4, atol=1e-4)
    # In between the difference to the prior keeps the share of the motion that it implies (Equation 6), over s_i.
    between = tnf(0.0)(residual, unit_prior, t_B, weights)
    motion = (prior - closed_form)[:, :, 1:] * sigma / (signal * std[:, :, 1:])
    kept = tnf(0.0).kept_motion(motion)
    assert kept.min() > 0 and kept.max() < 1
    torch.testing.assert_close(
        (prior - between)[:, :, 1:], kept * (prior - closed_form)[:, :, 1:], rtol=2e-2, atol=1e-5
    )


def test_local_shrinkage_keeps_strong_motion_and_stills_faint_motion() -> None:
    tnf = TemporalNoiseFusion(replace(UNITS, local_shrinkage=True), 4)
    motion = torch.full((1, 4, 2, 8, 8), 0.01)
    motion[..., 5:, 5:] = 1.0
    kept = tnf.kept_motion(motion)[0, 0, 1]
    assert kept[7, 7] > 0.8 and kept[0, 0] < 0.1


@pytest.mark.parametrize("residual", ["noise", "unit"])
def test_under_shrinkage_the_first_frame_is_predicted_exactly(tiny_base: Path, residual: str) -> None:
    trip = Trip.from_base(tiny_base, replace(SMALL, fusion=replace(UNITS, residual=residual))).eval()
    z_0 = torch.randn(2, 4, 16, 4, 4, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(4))
    t = torch.tensor([40, 999])
    predicted = trip(trip.schedule.add_noise(z_0, noise, t), z_0[:, :, :1], t, torch.zeros(2, 32, 16))
    torch.testing.assert_close(predicted[:, :, 0], noise[:, :, 0], rtol=0, atol=2e-5)


VARIANTS = {
    "TRIP_TE": replace(SMALL, condition="tail"),
    "TRIP_C": replace(SMALL, condition="channel"),
    "TRIP^W": replace(SMALL, fusion=replace(SMALL.fusion, kind="linear")),
    "TRIP^-": replace(SMALL, fusion=replace(SMALL.fusion, kind="none")),
}


def flat(value: dict, prefix: str = "") -> dict:
    out = {}
    for key, item in value.items():
        out |= flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
    return out


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_differs_from_trip_in_exactly_one_value(name: str, tiny_base: Path) -> None:
    ours, trip = flat(asdict(VARIANTS[name])), flat(asdict(SMALL))
    assert sum(ours[key] != trip[key] for key in trip) == 1
    z_t, z_first, t, text = batch()
    predicted = Trip.from_base(tiny_base, VARIANTS[name]).eval()(z_t, z_first, t, text)
    assert predicted.shape == z_t.shape and predicted.isfinite().all()


@pytest.mark.parametrize("name", VARIANTS)
def test_several_texts_of_a_sample_give_the_noise_of_each(name: str, tiny_base: Path) -> None:
    trip = Trip.from_base(tiny_base, VARIANTS[name]).eval()
    z_t, z_first, t, text = batch()
    with torch.no_grad():
        apart = torch.cat([trip(z_t, z_first, t, words) for words in (text, text.flip(0))])
        together = trip(z_t, z_first, t, torch.cat([text, text.flip(0)]))
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("frames", "offset"), [(2, 0), (2, 1), (4, 0), (6, 0)])
def test_a_frame_has_the_same_lambda_in_a_video_of_any_length(
    frames: int, offset: int, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(VARIANTS["TRIP^W"], num_frames=4, residual_std=(0.0, 0.5, 0.5, 0.5))
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(model, "linear_fusion", lambda *given: seen.append(given[2]) or linear_fusion(*given))
    z_first, text = torch.randn(1, 4, 1, 4, 4), torch.zeros(1, 32, 16)
    Trip.from_base(tiny_base, config).eval()(torch.randn(1, 4, frames, 4, 4), z_first, torch.tensor([40]), text, offset)
    whole = linear_decay(4, config.fusion.lambda_first, config.fusion.lambda_last).flatten().tolist()
    assert seen[0].flatten().tolist() == [whole[min(i, 3)] for i in range(offset, offset + frames)]


class PriorOnly(Trip):
    """A TRIP that predicts the prior (lambda = 1)."""

    def forward(self, z_t_BCFHW, z_first_BC1HW, t_B, text_BLD):
        signal, sigma = self.schedule.signal_and_noise(t_B, 5)
        return image_noise_prior(z_t_BCFHW, z_first_BC1HW, signal, sigma)


def test_prior_only_ddim_returns_the_still_image(tiny_base: Path) -> None:
    trip = PriorOnly.from_base(tiny_base, SMALL)
    z_t, z_first, _, text = batch(5)
    z = sample_latents(trip, z_first, text, text[:1], z_t, steps=50, guidance=1.0)
    torch.testing.assert_close(z, z_first.expand_as(z), rtol=0, atol=2e-4)


def test_the_output_of_a_velocity_base_is_converted_to_noise(tiny_velocity_base: Path) -> None:
    base = tiny_velocity_base
    assert base_unet_output(base) == "velocity"
    config = replace(SMALL, fusion=replace(SMALL.fusion, kind="none"))
    z_t, z_first, t, text = batch()
    as_noise = Trip.from_base(base, config).eval()
    as_velocity = Trip.from_base(base, replace(config, unet_output="velocity")).eval()
    signal, sigma = as_noise.schedule.signal_and_noise(t, 5)
    expected = signal * as_noise(z_t, z_first, t, text) + sigma * z_t
    torch.testing.assert_close(as_velocity(z_t, z_first, t, text), expected)


def test_the_measured_residual_std_is_zero_for_frame_one_and_exact_elsewhere() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(8, 4, 1, 16, 16, generator=generator)
    moved = torch.cat([first, first + 0.3 * torch.randn(8, 4, 1, 16, 16, generator=generator), first], dim=2)
    std = measure_residual_std(moved)
    assert std[0] == 0 and abs(std[1] - 0.3) < 0.02 and std[2] == 0.02  # the lower bound for a still frame


@pytest.mark.parametrize("residual", ["noise", "unit"])
def test_under_shrinkage_the_fusion_reads_the_normalised_prior(tiny_base: Path, residual: str) -> None:
    trip = Trip.from_base(tiny_base, replace(SMALL, fusion=replace(UNITS, residual=residual))).eval()
    inputs: list[torch.Tensor] = []
    assert trip.fusion is not None
    trip.fusion.register_forward_pre_hook(lambda _, args: inputs.append(args[1]))
    z_t, z_first, t, text = batch()
    trip(z_t, z_first, t, text)
    signal, sigma = trip.schedule.signal_and_noise(t, 5)
    expected = normalised_prior(z_t, z_first, signal, sigma, trip.residual_std(16, t.device))
    torch.testing.assert_close(inputs[0], expected)
