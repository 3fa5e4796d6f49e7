"""What a training says: numbers per tick, JSON lines that survive a kill, a trace of the profiler on request."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flows.console import tick_line
from flows.planning.base import read_base
from flows.planning.counting import count_model
from flows.training_lines import tick_counts, tick_metrics, validation_table
from infra import storage
from infra.metrics import FOLDER_VARIABLE, record
from tasks.train.job import train
from tasks.train.spec import TrainSpec, ValidationSpec, spec_digest
from tasks.train.ticks import TickFile
from tasks.train.utilisation import clip_flops, matmul_flops_per_second
from tests.support.latents import write_latents
from trip_model.config import FusionConfig, ScheduleConfig, TripConfig
from trip_model.model import Trip


def make_spec(base: Path, folder: Path, **changes: object) -> TrainSpec:
    model = TripConfig(
        size=32,
        num_frames=4,
        residual_std=(0.0, 0.5, 0.5, 0.5),
        fusion=FusionConfig(width=16, heads=2),
        schedule=ScheduleConfig(sampling_steps=2),
    )
    values = {"steps": 5, "global_batch": 2, "tick_every": 1, "held_out_fraction": 0.3} | changes
    return TrainSpec(
        dataset=write_latents(str(folder / "set"), clips=12, frames=4),
        output=str(folder / "run"),
        base=str(base),
        model=model,
        **values,  # type: ignore[arg-type]
    )


def lines(spec: TrainSpec) -> list[dict]:
    return [json.loads(line) for line in (Path(spec.output) / "ticks.jsonl").read_text().splitlines()]


def test_a_tick_has_the_numbers_of_speed_and_memory_and_a_trace_is_written(tiny_base: Path, tmp_path: Path) -> None:
    spec = make_spec(tiny_base, tmp_path, profile=2, validation=ValidationSpec(every=5, clips=2, animated=1))
    ticks: list[dict] = []
    train(spec, ticks.append, in_process=True)
    assert lines(spec) == ticks and [tick["step"] for tick in ticks] == [1, 2, 3, 4, 5]
    for tick in ticks:
        assert 0 < tick["data_wait"] < 1 and 0 < tick["mfu"] < 1 and 0.05 < tick["peak_memory_gb"] < 100
        assert math.isfinite(tick["grad_norm"]) and tick["lr_unet"] == 2e-6 and tick["lr_fusion"] == 2e-4
        assert tick["samples_per_second"] == tick["samples_per_second_device"] > 0
    trace = json.loads((Path(spec.output) / "profile" / "rank-0.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"ProfilerStep#2", "ProfilerStep#3"} <= names and "ProfilerStep#4" not in names
    table = validation_table(ticks[-1])
    assert table[0].startswith("validate    step 5  loss ") and "motion ratio" in table[0]
    assert table[1].split()[:4] == ["time", "steps", "0-199", "200-399"] and table[4].split() == ["frame", *"1234"]
    assert len({len(line) for line in table[1:4]}) == 1 and not validation_table(ticks[0])
    assert len(tick_line(tick_counts(ticks[-1]))) < 120


def test_a_training_that_resumes_replaces_the_lines_that_it_repeats(tiny_base: Path, tmp_path: Path) -> None:
    spec = make_spec(tiny_base, tmp_path)
    first = TickFile(spec)
    for step in range(1, 4):
        first.tick({"step": step, "loss": 1.0})
    with (Path(spec.output) / "ticks.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut by a kill
    again = TickFile(spec)
    again.tick({"step": 3, "loss": math.inf})
    again.tick({"step": 4, "loss": 0.5})
    assert [(line["step"], line["loss"]) for line in lines(spec)] == [(1, 1.0), (2, 1.0), (3, None), (4, 0.5)]


def test_the_lines_of_a_remote_output_are_uploaded(
    s3_folder: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    spec = replace(make_spec(tiny_base, tmp_path), output=f"{s3_folder}/run")
    file = TickFile(spec)
    file.upload()  # nothing yet
    for step in (1, 2):
        file.tick({"step": step})
        file.upload()
    again = TickFile(spec)
    again.tick({"step": 2, "loss": 1.0})
    again.upload()
    assert storage.read_bytes(f"{s3_folder}/run/ticks.jsonl") == b'{"step": 1}\n{"step": 2, "loss": 1.0}\n'


def test_the_short_line_shows_both_rates_and_the_wait() -> None:
    values = {"step": 20, "steps": 640, "loss": 0.1234, "grad_norm": 0.8, "lr_unet": 7e-4, "lr_fusion": 1e-3}
    values |= {
        "samples_per_second": 3.0,
        "samples_per_second_device": 1.5,
        "data_wait": 0.012,
        "mfu": 0.314,
        "peak_memory_gb": 1.25,
    }
    line = tick_line(tick_counts(values | {"seconds_left": 83.2, "frame_1": 0.0, "frame_last": 0.2}))
    assert line == (
        "train        20/640  loss 0.1234  grad 0.8  lr 0.0007/0.001  clips/s 3  of a device 1.5  mfu 31%  wait 1.2%"
        "  GB 1.25  left 1:23"
    )


@pytest.mark.parametrize(
    "change",
    [{}, {"trained": "temporal"}, {"trained": "lora", "lora_rank": 2}, {"condition": "channel"}],
    ids=["all", "temporal", "lora", "channel"],
)
def test_the_operations_of_a_clip_are_the_planners(tiny_base: Path, change: dict) -> None:
    change = dict(change)
    config = TripConfig(
        size=32,
        num_frames=4,
        residual_std=(0.0, 0.5, 0.5, 0.5),
        fusion=FusionConfig(width=16, heads=2),
        condition=change.pop("condition", "head"),
    )
    spec = TrainSpec("", "", str(tiny_base), model=config, recompute_activations=True, **change)
    base = read_base(spec.base)
    trip = Trip.from_base(tiny_base, config)
    state = torch.get_rng_state()
    found = clip_flops(trip, spec, base.latent_shape(config), base.text_shape())
    assert torch.equal(torch.get_rng_state(), state)  # a training that counts draws the same numbers
    assert found == pytest.approx(count_model(base, spec, gpu=False).kept.flops, rel=5e-3)


def test_the_peak_of_a_product_is_measured_in_each_precision() -> None:
    for precision in ("float32", "bfloat16"):
        assert 1e8 < matmul_flops_per_second("cpu", precision) < 1e14


def test_the_metrics_of_training_that_the_dashboard_shows_are_written(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "metrics"))
    spec = make_spec(tiny_base, tmp_path, steps=2, validation=ValidationSpec(every=2, clips=2, animated=0))
    train(spec, lambda tick: record("train", tick_metrics(tick)), in_process=True)
    written = set(re.findall(r"^(\w+) ", (tmp_path / "metrics" / "train.prom").read_text(), re.MULTILINE))
    dashboard = Path(__file__).resolve().parents[2] / "infra" / "monitoring" / "dashboard.json"
    shown = set(re.findall(r"trip_train_\w+", dashboard.read_text()))
    of_the_flow = {"trip_train_complete_timestamp_seconds", "trip_train_eta_seconds", "trip_train_spool_bytes"}
    assert {"trip_train_mfu", "trip_train_data_wait", "trip_train_peak_memory_gb"} <= shown
    assert shown - of_the_flow <= written


def test_a_trace_is_no_part_of_the_identity(tiny_base: Path, tmp_path: Path) -> None:
    spec = make_spec(tiny_base, tmp_path)
    assert spec_digest(replace(spec, profile=3)) == spec_digest(spec)
