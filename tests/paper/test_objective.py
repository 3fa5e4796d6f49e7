"""The objective (Equations 2 and 10), text dropout, the addresses of random numbers, and the optimiser's groups."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tasks.train.optimizer import make_optimizer
from tasks.train.spec import TrainSpec
from trip_model.config import FusionConfig, ObjectiveConfig, TripConfig
from trip_model.model import Trip
from trip_model.objective import MAX_WEIGHT, Draw, addressed_generator, draw, training_loss

SMALL = TripConfig(size=32, fusion=FusionConfig(width=16, heads=2))
SHAPE = (4, 16, 4, 4)


@pytest.fixture
def trip(tiny_base: Path) -> Trip:
    return Trip.from_base(tiny_base, SMALL).eval()


def sample_batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Draw]:
    generator = torch.Generator().manual_seed(seed)
    z_0 = torch.randn(2, *SHAPE, generator=generator)
    return z_0, torch.randn(2, 32, 16, generator=generator), draw(1, 0, [0, 1], 2, SHAPE, 1000, 0.0)


def test_objective_is_the_mean_squared_error_of_the_noise(trip: Trip) -> None:
    z_0, text, drawn = sample_batch()
    loss, error = training_loss(trip, z_0, text, text[:1], drawn, ObjectiveConfig())
    z_t = trip.schedule.add_noise(z_0, drawn.noise, drawn.t_B)
    expected = (trip(z_t, z_0[:, :, :1], drawn.t_B, text) - drawn.noise).square().mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(error.mean(), expected)


def test_unit_weighting_measures_the_residual_in_its_own_units(trip: Trip) -> None:
    """An error of the residual path weighs the same at every time step; under Equation 10 it vanishes at high noise."""
    z_0, text, _ = sample_batch()
    losses = {}
    for weighting in ("noise", "unit"):
        for t in (100, 900):
            drawn = Draw(torch.tensor([t, t]), torch.zeros(2, *SHAPE), torch.tensor([False, False]))
            shrink = trip.shrinkage(drawn.t_B, 16)

            class Biased(Trip):
                def forward(self, z_t_BCFHW, z_first_BC1HW, t_B, text_BLD, shrink=shrink):
                    return (1 - shrink).sqrt().expand_as(z_t_BCFHW)  # a residual with an error of 1 everywhere

            biased = Biased(trip.unet, SMALL)
            losses[weighting, t] = training_loss(biased, z_0, text, text[:1], drawn, ObjectiveConfig(weighting))[
                0
            ].item()
    assert losses["unit", 100] == pytest.approx(15 / 16, rel=1e-3) == losses["unit", 900]  # frame 1 has no residual
    assert losses["noise", 900] < 1e-3 < losses["noise", 100]


@pytest.mark.parametrize(("std", "expected"), [(0.5, 1.0), (0.147, 1.0), (0.05, 1.0), (0.02, MAX_WEIGHT / 6.19e7)])
def test_unit_weights_are_exact_at_the_noisy_end_and_bounded(trip: Trip, std: float, expected: float) -> None:
    z_0, text, _ = sample_batch()
    drawn = Draw(torch.tensor([999, 999]), torch.zeros(2, *SHAPE), torch.tensor([False, False]))
    abar = trip.schedule.alphas_cumprod_T.double()[999]
    unknown = abar * std**2 / (1 - abar + abar * std**2)

    class Biased(Trip):
        def forward(self, z_t_BCFHW, z_first_BC1HW, t_B, text_BLD):
            return unknown.sqrt().float().expand_as(z_t_BCFHW)

    biased = Biased(trip.unet, replace(SMALL, residual_std=(0.0, *(std,) * 15)))
    loss = training_loss(biased, z_0, text, text[:1], drawn, ObjectiveConfig("unit"))[0].item()
    assert loss == pytest.approx(15 / 16 * expected, rel=2e-3)


def test_dropped_captions_are_replaced_by_the_empty_one(trip: Trip) -> None:
    z_0, text, drawn = sample_batch()
    dropped = Draw(drawn.t_B, drawn.noise, torch.tensor([True, True]))
    empty = torch.randn(1, 32, 16, generator=torch.Generator().manual_seed(9))
    ours = training_loss(trip, z_0, text, empty, dropped, ObjectiveConfig())[0]
    expected = training_loss(trip, z_0, empty.expand_as(text), empty, drawn, ObjectiveConfig())[0]
    torch.testing.assert_close(ours, expected)


def test_text_dropout_has_the_configured_rate() -> None:
    drops = torch.cat([draw(0, step, range(64), 64, (1,), 1000, 0.1).drop_B for step in range(50)])
    assert 0.07 < drops.float().mean().item() < 0.13


def test_draws_depend_only_on_seed_step_and_sample() -> None:
    batch = draw(7, 3, range(8), 8, SHAPE, 1000, 0.5)
    halves = [draw(7, 3, part, 8, SHAPE, 1000, 0.5) for part in (range(4), range(4, 8))]
    assert torch.equal(batch.noise, torch.cat([half.noise for half in halves]))
    assert torch.equal(batch.t_B, torch.cat([half.t_B for half in halves]))
    assert torch.equal(batch.drop_B, torch.cat([half.drop_B for half in halves]))
    assert not torch.equal(batch.noise, draw(7, 4, range(8), 8, SHAPE, 1000, 0.5).noise)
    assert not torch.equal(batch.noise[0], batch.noise[1])
    a, b = (torch.rand(4, generator=addressed_generator("x", 0, 1)) for _ in range(2))
    assert torch.equal(a, b)


def test_time_steps_are_uniform_and_stratified() -> None:
    times = torch.stack([draw(0, step, range(10), 10, (1,), 1000, 0.0).t_B for step in range(300)])
    assert times.min() >= 0 and times.max() <= 999
    assert (times.sort(dim=1).values // 100 == torch.arange(10)).float().mean() > 0.45  # one in each tenth, shifted
    assert abs(times.float().mean().item() - 499.5) < 12


def test_adamw_has_the_papers_two_learning_rates(trip: Trip) -> None:
    unet, fusion = make_optimizer(trip, TrainSpec("d", "o", "b", SMALL)).param_groups
    assert (unet["base_lr"], fusion["base_lr"]) == (2e-6, 2e-4)
    assert len(unet["params"]) + len(fusion["params"]) == len(list(trip.parameters()))
