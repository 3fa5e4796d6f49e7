"""The training of the demo's base: its time steps, and Muon on the weights inside the 3D-UNet."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples.demo_base.denoiser import MuonOnMatrices, draw_time_steps
from trip_model.unet import load_unet


@pytest.mark.parametrize(("power", "share"), [(1.0, 0.5), (0.5, 0.75)])
def test_a_power_below_one_draws_more_time_steps_near_the_noise(power: float, share: float) -> None:
    t = draw_time_steps(1000, power, torch.Generator().manual_seed(0))
    assert int(t.min()) >= 0 and int(t.max()) < 1000
    assert float((t >= 500).float().mean()) == pytest.approx(share, abs=0.002)


def test_muon_moves_the_matrices_of_the_unet_by_its_rate_and_nothing_else(tiny_base: Path) -> None:
    torch.manual_seed(0)
    unet = load_unet(tiny_base)
    before = {name: weight.detach().clone() for name, weight in unet.named_parameters()}
    muon = MuonOnMatrices(unet)
    for weight in unet.parameters():
        weight.grad = torch.randn_like(weight)
    muon.step(0.01)
    assert all(weight.grad is None for weight in muon.weights)  # else they add up from step to step
    others = {id(weight) for weight in muon.others}
    for name, weight in unet.named_parameters():
        moved = weight.detach() - before[name]
        if id(weight) in others:
            assert not moved.any(), name
            assert weight.ndim == 1 or name.startswith(("conv_in", "conv_out")) or "time_emb" in name
        else:
            # Rate 0.01 in AdamW's units: a root mean square near 0.2 times the rate, by its five Newton-Schulz steps.
            assert 0.0012 < float(moved.square().mean().sqrt()) < 0.0026, name
