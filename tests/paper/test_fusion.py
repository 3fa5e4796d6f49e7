"""Equation 11 against an independent implementation, and fusion by shrinkage (ours, docs/decisions/fusion.md)."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.recipes import find_recipe
from tasks.records import digest
from tasks.train.spec import spec_digest
from trip_model.checkpoint import config_from_json
from trip_model.config import BEFORE, FusionConfig, TripConfig, values_before
from trip_model.fusion import TemporalNoiseFusion
from trip_model.model import Trip
from trip_model.noise_prior import unknown_share
from trip_model.schedule import NoiseSchedule

SMALL = TripConfig(size=32, fusion=FusionConfig(width=16, heads=2))
ADDED = ("prediction", "residual_skip", "residual", "residual_error")


def randomised(tnf: TemporalNoiseFusion) -> TemporalNoiseFusion:
    """Adds noise to every weight, so that none keeps its initial value."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tnf.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return tnf


def phi(
    weights: dict[str, torch.Tensor],
    residual: torch.Tensor,
    prior: torch.Tensor,
    t: torch.Tensor,
    heads: int,
    token: bool,
    skip: bool,
) -> torch.Tensor:
    """Equation 11 as Section 3.4 defines it, in float64, frame by frame."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def silu(x: torch.Tensor) -> torch.Tensor:
        return x / (1 + (-x).exp())

    width = weights["residual_in.weight"].shape[0]
    frequencies = torch.exp(-torch.log(torch.tensor(1e4)) * torch.arange(width // 2) / (width // 2))  # as diffusers
    phases = t.float()[:, None] * frequencies
    sinusoids = torch.cat([phases.cos(), phases.sin()], dim=1).double()
    time = linear(silu(linear(sinusoids, "time_embedding.linear_1")), "time_embedding.linear_2")

    def adaptive_norm(x: torch.Tensor, time_D: torch.Tensor, name: str) -> torch.Tensor:
        scale, shift = linear(silu(time_D), f"{name}.to_scale_shift").chunk(2)
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + scale) + shift

    def attention(query: torch.Tensor, context: torch.Tensor, name: str) -> torch.Tensor:
        q = linear(query, f"{name}.to_q")
        k, v = linear(context, f"{name}.to_kv").chunk(2, dim=-1)
        outs, size = [], width // heads
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            outs.append(torch.softmax(q[:, part] @ k[:, part].T / size**0.5, dim=-1) @ v[:, part])
        return linear(torch.cat(outs, dim=-1), f"{name}.to_out")

    out = torch.empty_like(residual)
    for b in range(residual.shape[0]):
        for i in range(residual.shape[2]):
            delta, reference = (x[b, :, i].flatten(1).T for x in (residual, prior))  # [places, channels]
            x = linear(delta, "residual_in")
            if token:
                context = torch.cat([linear(reference, "prior_in") + weights["source"][0], x + weights["source"][1]])
            else:
                context = linear(torch.cat([reference, delta], dim=-1), "context_in")
            normed = adaptive_norm(x, time[b], "norm_self")
            enhanced = attention(normed, normed, "attention_self") + (x if skip else 0)
            query = adaptive_norm(enhanced, time[b], "norm_cross")
            fused = attention(query, context, "attention_cross") + (enhanced if skip else 0)
            noise = linear(fused, "out") + (delta if skip else 0)
            out[b, :, i] = noise.T.view_as(out[b, :, i])
    return out


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("key_value", ["channel", "token"])
def test_tnf_is_equation_eleven(key_value: Any, skip: bool) -> None:
    config = FusionConfig(width=16, heads=2, key_value=key_value, residual_skip=skip)
    torch.manual_seed(0)
    tnf = randomised(TemporalNoiseFusion(config, 4)).double()
    generator = torch.Generator().manual_seed(1)
    residual, prior = torch.randn(2, 2, 4, 3, 2, 3, generator=generator, dtype=torch.float64)
    t = torch.tensor([7, 920])
    expected = phi(dict(tnf.state_dict()), residual, 30 * prior, t, 2, key_value == "token", skip)
    torch.testing.assert_close(tnf(residual, 30 * prior, t).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["noise", "velocity"])
def test_the_papers_tnf_reads_only_the_residual_noise_and_the_prior_of_equation_eight(
    tiny_base: Path, kind: Any
) -> None:
    trip = Trip.from_base(tiny_base, replace(SMALL, unet_output=kind)).eval()
    assert trip.fusion is not None
    randomised(trip.fusion)
    inputs: list[tuple[Any, ...]] = []
    trip.fusion.register_forward_pre_hook(lambda _, args: inputs.append(args))
    generator = torch.Generator().manual_seed(0)
    z_t, z_first = torch.randn(2, 4, 16, 4, 4, generator=generator), torch.randn(2, 4, 1, 4, 4, generator=generator)
    t, text = torch.tensor([10, 700]), torch.randn(2, 32, 16, generator=generator)
    with torch.no_grad():
        predicted = trip(z_t, z_first, t, text)
        output = trip.unet(torch.cat([z_first, z_t], dim=2), t, text)[:, :, 1:]
    abar = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), dim=0)[t].view(2, 1, 1, 1, 1)
    prior = (z_t - abar.sqrt() * z_first) / (1 - abar).sqrt()
    residual = output if kind == "noise" else abar.sqrt() * output + (1 - abar).sqrt() * z_t
    torch.testing.assert_close(inputs[0][0], residual.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inputs[0][1], prior.float(), rtol=1e-4, atol=1e-4)
    assert torch.equal(inputs[0][2], t) and inputs[0][3] is None
    # No statistic of the data has an effect.
    trip.config = replace(trip.config, residual_std=(0.0, *(3.0,) * 15))
    with torch.no_grad():
        assert torch.equal(trip(z_t, z_first, t, text), predicted)


@pytest.mark.parametrize("kind", ["noise", "velocity"])
def test_the_papers_tnf_with_a_skip_starts_as_its_base(tiny_base: Path, kind: Any) -> None:
    config = replace(SMALL, unet_output=kind)
    without = replace(config, fusion=replace(SMALL.fusion, kind="none"))
    generator = torch.Generator().manual_seed(0)
    z_t, text = torch.randn(2, 4, 16, 4, 4, generator=generator), torch.randn(2, 32, 16, generator=generator)
    for t in (0, 30, 500, 999):
        t_B = torch.tensor([t, t])
        paper, minus = (Trip.from_base(tiny_base, c).eval()(z_t, z_t[:, :, :1], t_B, text) for c in (config, without))
        assert torch.equal(paper, minus)


class PerfectNet(torch.nn.Module):
    """Stands for a 3D-UNet with a perfect prediction of the noise or the velocity."""

    def __init__(self, unet: torch.nn.Module, output: torch.Tensor) -> None:
        super().__init__()
        self.config, self.output = unet.config, output

    def forward(self, x_BCFHW: torch.Tensor, t_B: torch.Tensor, text_BLD: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.output[:, :, :1], self.output], dim=2)


@pytest.mark.parametrize("kind", ["noise", "velocity"])
@pytest.mark.parametrize("prediction", ["direct", "shrinkage"])
def test_a_bases_prediction_survives_at_initialisation(tiny_base: Path, prediction: Any, kind: Any) -> None:
    """The prior adds at most 0.3 `residual_error` to the error of a perfect base, at every time step."""
    config = replace(SMALL, unet_output=kind, fusion=replace(SMALL.fusion, prediction=prediction))
    trip = Trip.from_base(tiny_base, config).eval()
    generator = torch.Generator().manual_seed(0)
    std = trip.residual_std(16, torch.device("cpu"))
    z_first = torch.randn(2, 4, 1, 16, 16, generator=generator)
    z_0 = z_first + std * torch.randn(2, 4, 16, 16, 16, generator=generator)
    noise = torch.randn(z_0.shape, generator=generator)
    errors = {}
    for t in (0, 3, 20, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900, 950, 999):
        t_B = torch.tensor([t, t])
        signal, sigma = trip.schedule.signal_and_noise(t_B, 5)
        trip.unet = PerfectNet(trip.unet, noise if kind == "noise" else signal * noise - sigma * z_0)  # type: ignore
        predicted = trip(trip.schedule.add_noise(z_0, noise, t_B), z_first, t_B, torch.zeros(2, 32, 16))
        errors[t] = (predicted - noise).square().mean().item()
    assert max(errors.values()) < 0.3 * trip.config.fusion.residual_error
    assert errors[0] < 1e-6


def test_shrinkage_never_starts_worse_than_its_base_or_than_the_prior(tiny_base: Path) -> None:
    """With a base of mean square error `residual_error`, the initial error is that of the better of base and prior."""
    config = replace(SMALL, fusion=replace(SMALL.fusion, prediction="shrinkage"))
    trip = Trip.from_base(tiny_base, config).eval()
    generator = torch.Generator().manual_seed(0)
    std, error = trip.residual_std(16, torch.device("cpu")), config.fusion.residual_error
    z_first = torch.randn(2, 4, 1, 16, 16, generator=generator)
    z_0 = z_first + std * torch.randn(2, 4, 16, 16, 16, generator=generator)
    noise, wrong = (torch.randn(z_0.shape, generator=generator) for _ in range(2))
    for t in (50, 300, 600, 800, 900, 950, 999):
        t_B = torch.tensor([t, t])
        signal, sigma = trip.schedule.signal_and_noise(t_B, 5)
        trip.unet = PerfectNet(trip.unet, noise + error**0.5 * wrong)  # type: ignore
        predicted = trip(trip.schedule.add_noise(z_0, noise, t_B), z_first, t_B, torch.zeros(2, 32, 16))
        actual = (predicted - noise)[:, :, 1:].square().mean().item()
        prior_error = unknown_share(signal, sigma, std)[0, 0, 1].item()
        assert actual < 1.05 * min(error, prior_error)
        torch.testing.assert_close(predicted[:, :, 0], noise[:, :, 0], rtol=0, atol=3e-5)  # exact


@pytest.mark.parametrize("residual", ["noise", "unit"])
def test_the_closed_form_is_what_shrinkage_starts_from(tiny_base: Path, residual: str) -> None:
    shrinkage = replace(SMALL.fusion, prediction="shrinkage", residual=residual)
    generator = torch.Generator().manual_seed(0)
    z_t, text = torch.randn(2, 4, 16, 4, 4, generator=generator), torch.randn(2, 32, 16, generator=generator)
    inputs = (z_t, torch.randn(2, 4, 1, 4, 4, generator=generator), torch.tensor([10, 700]), text)
    outputs = [
        Trip.from_base(tiny_base, replace(SMALL, fusion=replace(shrinkage, kind=kind))).eval()(*inputs)
        for kind in ("tnf", "closed")
    ]
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)  # TNF's last layer starts at zero


def test_the_closed_form_needs_the_weights_of_shrinkage() -> None:
    with pytest.raises(ValueError, match="kind 'closed' with prediction 'direct'"):
        FusionConfig(kind="closed")


@pytest.mark.parametrize("std", [0.02, 0.05, 0.147, 0.5])
def test_the_unknown_share_has_no_cancellation(std: float) -> None:
    signal, sigma = NoiseSchedule().signal_and_noise(torch.arange(1000), 1)
    abar = NoiseSchedule().alphas_cumprod_T.double()
    exact = abar * std**2 / (1 - abar + abar * std**2)
    actual = unknown_share(signal, sigma, torch.tensor(std)).double()
    torch.testing.assert_close(actual, exact, rtol=1e-4, atol=0)


def test_json_without_the_newer_fields_loads_with_their_older_values() -> None:
    config = TripConfig(fusion=FusionConfig(width=16, heads=2, prediction="shrinkage", residual="unit"))
    old = json.loads(json.dumps(asdict(config)))
    for name in ADDED:
        del old["fusion"][name]
    assert config_from_json(old) == config
    new = TripConfig(fusion=FusionConfig(residual_skip=False))
    assert config_from_json(json.loads(json.dumps(asdict(new)))) == new


def test_a_training_without_the_newer_fields_keeps_its_digest() -> None:
    spec = find_recipe("demo").train
    older = replace(spec.model.fusion, **{name: values_before(FusionConfig)[name] for name in ADDED})
    spec = replace(spec, model=replace(spec.model, fusion=older))
    before = {f.name: getattr(spec, f.name) for f in fields(spec) if not f.metadata.keys() & {"means", BEFORE}}
    before |= {"model": asdict(spec.model), "objective": asdict(spec.objective)}
    for name in ADDED:
        del before["model"]["fusion"][name]
    assert spec_digest(spec) == digest(before)
    paper, shrinkage, no_skip = (find_recipe(f"paper{name}").train for name in ("", "-shrinkage", "-no-skip"))
    assert len({spec_digest(paper), spec_digest(shrinkage), spec_digest(no_skip)}) == 3


def test_local_shrinkage_without_its_units_is_rejected() -> None:
    with pytest.raises(ValueError, match="local_shrinkage with prediction 'direct'"):
        FusionConfig(local_shrinkage=True)
    for error in (0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"residual_error {error}, expected"):
            FusionConfig(residual_error=error)
    for weight in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"lambda_last {weight}, expected a weight from 0 to 1"):
            FusionConfig(kind="linear", lambda_last=weight)
