"""Training on clips of several frame sizes: one of them in each step, continued bitwise, for any number of ranks."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from infra import storage
from tasks.records import UserError
from tasks.shards import Sample, ShardDataset, open_dataset, publish_dataset, write_shard
from tasks.train.checkpoints import CheckpointStore
from tasks.train.loader import TrainingData
from tasks.train.loop import run_training
from tasks.train.preflight import preflight
from tasks.train.spec import TrainSpec, ValidationSpec
from tasks.video.frame_sizes import FrameSize
from trip_model.checkpoint import load_model
from trip_model.config import FusionConfig, ScheduleConfig, TripConfig
from trip_model.model import measure_residual_std

FRAMES = 4
WIDE, TALL = FrameSize(48, 24), FrameSize(24, 48)  # of equal area: only the index tells them apart


def sample_of(row: int, size: FrameSize, rng: np.random.Generator) -> Sample:
    return Sample(
        key=f"clip{row}_000",
        caption="a red circle",
        latents=rng.normal(size=(FRAMES, 4, size.height // 8, size.width // 8)).astype(np.float16),
        first=np.zeros((size.height, size.width, 3), np.uint8),
        tokens=rng.integers(2, 500, size=32).astype(np.int32),
        meta={},
        frame_size=size,
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set of 12 clips in two shards; every third is tall."""
    uri = str(tmp_path_factory.mktemp("data") / "set")
    rng, recipe = np.random.default_rng(0), {"size": 32, "frame_sizes": [str(TALL), str(WIDE)]}
    open_dataset(uri, recipe)
    shards = []
    for begin in (0, 6):
        outcomes = [[sample_of(row, TALL if row % 3 == 0 else WIDE, rng)] for row in range(begin, begin + 6)]
        shards.append(write_shard(uri, begin, (begin, begin + 6), outcomes, "hash").summary())
    publish_dataset(uri, recipe, "hash", {}, shards)
    return uri


@pytest.fixture
def spec(dataset: str, tiny_base: Path, tmp_path: Path) -> TrainSpec:
    return TrainSpec(
        dataset=dataset,
        output=str(tmp_path / "run"),
        base=str(tiny_base),
        model=TripConfig(
            size=32,
            num_frames=FRAMES,
            residual_std=(0.0, 0.5, 0.5, 0.5),
            fusion=FusionConfig(width=16, heads=2, prediction="shrinkage"),
            schedule=ScheduleConfig(sampling_steps=2),
        ),
        steps=6,
        global_batch=2,
        learning_rate_unet=1e-3,
        learning_rate_fusion=1e-3,
        held_out_fraction=0.3,
        validation=ValidationSpec(every=3, clips=4, bands=2, animated=2),
        checkpoint_every=2,
        tick_every=1,
    )


class Killed(Exception):
    """Stands for the end of the process between two steps."""


def ticks_of(spec: TrainSpec, last_step: int) -> list[dict[str, Any]]:
    ticks: list[dict[str, Any]] = []

    def tick(values: dict[str, Any]) -> None:
        ticks.append(values)
        if values["step"] == last_step and last_step < spec.steps:
            raise Killed

    with contextlib.suppress(Killed):
        run_training(spec, on_tick=tick)
    return ticks


def test_a_batch_has_one_frame_size_and_is_that_of_two_workers(dataset: str) -> None:
    data = TrainingData(ShardDataset(dataset), 0.2, 3, FRAMES)
    shapes = set()
    for step in range(9):
        whole = data.batch(step, 3)
        halves = [TrainingData(ShardDataset(dataset), 0.2, 3, FRAMES).batch(step, 3, rank, 2) for rank in range(2)]
        assert whole.keys == halves[0].keys + halves[1].keys
        assert torch.equal(whole.raw_latents_BFCHW, torch.cat([half.raw_latents_BFCHW for half in halves]))
        shapes.add(whole.raw_latents_BFCHW.shape[3:])
    assert shapes == {(3, 6), (6, 3)}


def test_a_killed_training_continues_bitwise(spec: TrainSpec, tmp_path: Path) -> None:
    assert preflight(spec) == []
    whole = ticks_of(spec, 6)
    broken = replace(spec, output=str(tmp_path / "broken"))
    first, rest = ticks_of(broken, 3), ticks_of(broken, 6)
    losses = [[tick["loss"] for tick in ticks] for ticks in (first[:2] + rest, whole)]
    assert losses[0] == losses[1]
    names = {name for name in whole[-1] if name.startswith("validation")}
    assert len(names) > 5 and {n: rest[-1][n] for n in names} == {n: whole[-1][n] for n in names}
    parts = [CheckpointStore(storage.join(s.output, "checkpoints")).newest() for s in (spec, broken)]
    weights = [part.parts["weights"] for part in parts if part is not None]
    assert len(weights) == 2 and all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    sizes = set()
    for path in Path(spec.output, "samples").glob("step-00000006-*.mp4"):
        with av.open(str(path)) as container:
            sizes.add((container.streams.video[0].width, container.streams.video[0].height))
    assert sizes == {WIDE, TALL}


def test_the_deviation_is_measured_over_clips_of_all_frame_sizes(spec: TrainSpec, dataset: str) -> None:
    run_training(replace(spec, steps=1, validation=ValidationSpec()))
    data = TrainingData(ShardDataset(dataset), spec.held_out_fraction, spec.seed, FRAMES)
    squares = []
    for index in data.samples.tolist():
        z_0 = 0.5 * data.dataset.read(index, ("latents",))["latents"].astype(np.float64)
        squares.append(((z_0 - z_0[:1]) ** 2).mean(axis=(1, 2, 3)))
    measured = load_model(f"{spec.output}/model").config.residual_std
    assert measured == pytest.approx(np.sqrt(np.mean(squares, axis=0)), abs=2e-5)


def test_every_clip_counts_alike_whatever_its_frame_size() -> None:
    one, two = torch.zeros(3, 1, 2, 2, 2), torch.zeros(1, 1, 2, 4, 4)
    one[:, :, 1], two[:, :, 1] = 1.0, 3.0
    assert measure_residual_std(one, two) == (0.0, pytest.approx(3**0.5, abs=1e-5))  # of 1, 1, 1 and 9


def test_held_out_clips_keep_their_order_in_batches_of_one_frame_size(dataset: str) -> None:
    data = TrainingData(ShardDataset(dataset), 0.4, 0, FRAMES)
    batches = data.held_out(99)
    keys = {position: key for batch in batches for position, key in zip(batch.positions, batch.keys, strict=True)}
    assert [keys[position] for position in sorted(keys)] == list(data.dataset.keys_of(data.held_out_samples))
    assert [len({batch.raw_latents_BFCHW.shape[3:]}) for batch in batches] == [1, 1]


def test_a_data_set_of_another_size_is_refused_before_the_training(spec: TrainSpec) -> None:
    with pytest.raises(UserError, match="was prepared at size 32, the recipe has 64; prepare with the recipe"):
        preflight(replace(spec, model=replace(spec.model, size=64)))
