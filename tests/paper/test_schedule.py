"""Conversion of the paper's schedule to the schedule of the base (docs/decisions/schedule.md)."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

from trip_model.checkpoint import config_from_json
from trip_model.config import BaseSchedule, ScheduleConfig, TripConfig
from trip_model.model import Trip
from trip_model.schedule import NoiseSchedule, matched_steps, read_base_schedule, to_base_schedule

MS_1_7B = BaseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)


def base_with(folder: Path, settings: dict[str, object]) -> Path:
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    return folder


def test_matched_steps_have_equal_noise_and_end_where_the_base_ends() -> None:
    ours, theirs = NoiseSchedule(), DDIMScheduler(**vars(MS_1_7B)).alphas_cumprod
    steps = matched_steps(ours.alphas_cumprod_T, MS_1_7B)
    assert steps[[50, 100, 200, 300, 500, 700]].round().tolist() == [32, 99, 261, 419, 708, 966]
    inside = steps < 999
    assert 715 < inside.sum() < 735 and torch.equal(steps[~inside], torch.full_like(steps[~inside], 999.0))
    nearest = theirs[steps[inside].round().long()]
    torch.testing.assert_close(nearest[20:], ours.alphas_cumprod_T[inside][20:], rtol=0, atol=2e-3)
    assert (steps.diff() >= 0).all()


def test_a_schedule_matched_to_itself_is_itself() -> None:
    plain = ScheduleConfig()
    own = BaseSchedule(plain.beta_start, plain.beta_end, plain.beta_schedule, plain.num_train_timesteps)
    steps = matched_steps(NoiseSchedule(plain).alphas_cumprod_T, own)
    torch.testing.assert_close(steps, torch.arange(1000.0), rtol=0, atol=1e-2)


def test_each_bridge_is_applied_and_recorded(tmp_path: Path) -> None:
    base = base_with(tmp_path, asdict(MS_1_7B) | {"prediction_type": "epsilon", "steps_offset": 1})
    plain = ScheduleConfig()
    assert to_base_schedule(plain, base) == plain
    checkpoint = to_base_schedule(replace(plain, bridge="checkpoint"), base)
    torch.testing.assert_close(
        NoiseSchedule(checkpoint).alphas_cumprod_T, DDIMScheduler(**vars(MS_1_7B)).alphas_cumprod, rtol=0, atol=0
    )
    matched = to_base_schedule(replace(plain, bridge="snr"), base)
    assert matched.base == MS_1_7B
    assert torch.equal(NoiseSchedule(matched).alphas_cumprod_T, NoiseSchedule(plain).alphas_cumprod_T)
    config = TripConfig(schedule=matched)
    assert config_from_json(json.loads(json.dumps(asdict(config)))) == config
    assert read_base_schedule(base_with(tmp_path, {})) == BaseSchedule(1e-4, 2e-2, "linear", 1000)
    with pytest.raises(ValueError, match="beta_schedule 'squaredcos_cap_v2', expected"):
        to_base_schedule(replace(plain, bridge="snr"), base_with(tmp_path, {"beta_schedule": "squaredcos_cap_v2"}))


def test_the_unet_gets_the_matched_step_and_the_prior_keeps_its_own(tiny_base: Path) -> None:
    config = TripConfig(size=32)
    plain = Trip.from_base(tiny_base, config).eval()
    matched = Trip.from_base(tiny_base, replace(config, schedule=ScheduleConfig(bridge="snr", base=MS_1_7B))).eval()
    matched.load_state_dict(plain.state_dict())
    steps: dict[str, torch.Tensor] = {}
    for name, trip in (("plain", plain), ("matched", matched)):

        def note(_: torch.nn.Module, args: tuple[torch.Tensor, ...], name: str = name) -> None:
            steps[name] = args[1]

        trip.unet.register_forward_pre_hook(note)
    z, t_B = torch.randn(2, 4, 16, 4, 4), torch.tensor([300, 999])
    with torch.no_grad():
        for trip in (plain, matched):
            assert torch.isfinite(trip(z, z[:, :, :1], t_B, torch.zeros(2, 32, 16))).all()
    assert steps["plain"].tolist() == [300, 999]
    assert steps["matched"].round().tolist() == [419, 999]
    assert torch.equal(plain.shrinkage(t_B, 16), matched.shrinkage(t_B, 16))
