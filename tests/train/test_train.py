"""Does training resume bitwise, read the same batches for any number of workers, and end in a model that loads?"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet3DConditionModel
from mlflow.tracking import MlflowClient
from peft import PeftModel

from infra import storage
from tasks.records import UserError
from tasks.shards import Sample, ShardDataset, clip_key_of, open_dataset, publish_dataset, split_keys, write_shard
from tasks.train.checkpoints import CheckpointStore
from tasks.train.job import train
from tasks.train.loader import TrainingData, share
from tasks.train.loop import TrainingStopped, run_training
from tasks.train.optimizer import learning_rate_factor
from tasks.train.quarantine import Quarantine
from tasks.train.spec import TrackingSpec, TrainSpec, ValidationSpec, spec_digest
from tasks.train.validation import LOSS
from tasks.video.decode import read_clip
from trip_model.checkpoint import load_model
from trip_model.config import FusionConfig, ScheduleConfig, TripConfig
from trip_model.unet import load_unet

FRAMES = 4


def published(uri: str, rows_by_shard: list[list[list[str]]]) -> str:
    """A data set with random latents: of each shard its rows, of each row the keys of its samples."""
    rng = np.random.default_rng(0)
    recipe = {"made": "for tests"}
    open_dataset(uri, recipe)
    shards, start = [], 0
    for index, rows in enumerate(rows_by_shard):
        outcomes = [
            [
                Sample(
                    key=key,
                    caption="a red circle",
                    latents=rng.normal(size=(FRAMES, 4, 4, 4)).astype(np.float16),
                    first=np.zeros((32, 32, 3), np.uint8),
                    tokens=rng.integers(2, 500, size=32).astype(np.int32),
                    meta={},
                )
                for key in keys
            ]
            for keys in rows
        ]
        shards.append(write_shard(uri, index, (start, start + len(rows)), outcomes, "hash").summary())
        start += len(rows)
    publish_dataset(uri, recipe, "hash", {}, shards)
    return uri


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A published data set of 10 clips, two shards, random latents."""
    rows = [[[f"clip{index}{row}_000"] for row in range(5)] for index in range(2)]
    return published(str(tmp_path_factory.mktemp("data") / "set"), rows)


@pytest.fixture
def spec(dataset: str, tiny_base: Path, tmp_path: Path) -> TrainSpec:
    model = TripConfig(
        size=32,
        num_frames=FRAMES,
        residual_std=(0.0, 0.5, 0.5, 0.5),
        fusion=FusionConfig(width=16, heads=2, prediction="shrinkage"),  # which knows frame 1 exactly
        schedule=ScheduleConfig(sampling_steps=2),
        unet_dropout=0.1,
    )
    return TrainSpec(
        dataset=dataset,
        output=str(tmp_path / "run"),
        base=str(tiny_base),
        model=model,
        steps=6,
        global_batch=2,
        learning_rate_unet=1e-3,
        learning_rate_fusion=1e-3,
        average_decay=0.9,
        checkpoint_every=3,
        tick_every=1,
        measure_clips=4,
    )


class Killed(Exception):
    """Stands for the end of the process between two steps."""


def train_until(spec: TrainSpec, last_step: int) -> list[float]:
    losses: list[float] = []

    def tick(values: dict) -> None:
        losses.append(values["loss"])
        if values["step"] == last_step and last_step < spec.steps:
            raise Killed

    with contextlib.suppress(Killed):
        run_training(spec, on_tick=tick)
    return losses


def weights(spec: TrainSpec) -> dict[str, torch.Tensor]:
    checkpoint = CheckpointStore(storage.join(spec.output, "checkpoints")).newest()
    assert checkpoint is not None and checkpoint.step == spec.steps
    return checkpoint.parts["weights"] | checkpoint.parts["average"]


def assert_same_weights(one: TrainSpec, other: TrainSpec) -> None:
    expected, found = weights(one), weights(other)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_a_run_killed_after_four_steps_continues_bitwise(spec: TrainSpec, tmp_path: Path) -> None:
    whole = train_until(spec, 6)
    broken = replace(spec, output=str(tmp_path / "broken"))
    first, rest = train_until(broken, 4), train_until(broken, 6)
    assert first[:3] + rest == whole  # step 4 was lost with the kill and is done again
    assert_same_weights(spec, broken)


def test_resume_walks_back_past_a_damaged_checkpoint(spec: TrainSpec, tmp_path: Path) -> None:
    whole = train_until(replace(spec, checkpoint_every=2, output=str(tmp_path / "whole")), 6)
    broken = replace(spec, checkpoint_every=2)
    train_until(broken, 5)
    store = storage.join(broken.output, "checkpoints")
    assert CheckpointStore(store).steps() == [4, 2]
    file = Path(store) / "step-00000004" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert train_until(broken, 6) == whole[2:]


def test_the_trained_model_loads_and_differs_from_the_start(spec: TrainSpec) -> None:
    report = run_training(spec)
    model = load_model(report.model)
    assert model.fusion is not None and model.fusion.out.weight.abs().sum() > 0
    assert run_training(spec) == report  # the second call finds the work done


def test_frame_one_has_no_error_and_deviation_is_measured(spec: TrainSpec) -> None:
    ticks: list[dict] = []
    report = run_training(spec, on_tick=ticks.append)
    assert max(tick["frame_1"] for tick in ticks) < 1e-8
    deviation = load_model(report.model).config.residual_std
    assert deviation[0] == 0 and all(0.5 < s < 1.0 for s in deviation[1:])  # sqrt(2) times the scaling of 0.5


@pytest.mark.parametrize("skip", [True, False])
def test_the_papers_fusion_trains_and_is_exported_as_such(spec: TrainSpec, skip: bool) -> None:
    fusion = replace(spec.model.fusion, prediction="direct", residual_skip=skip)
    report = run_training(replace(spec, model=replace(spec.model, fusion=fusion)))
    assert report.loss_last < report.loss_first
    model = load_model(report.model)
    assert model.config.fusion == fusion


def test_two_workers_read_the_batches_of_one(dataset: str) -> None:
    data = TrainingData(ShardDataset(dataset), 0.2, 3, FRAMES)
    for step in range(7):
        whole = data.batch(step, 4)
        halves = [data.batch(step, 4, rank, 2) for rank in range(2)]
        assert whole.keys == halves[0].keys + halves[1].keys
        assert torch.equal(whole.raw_latents_BFCHW, torch.cat([half.raw_latents_BFCHW for half in halves]))


def test_an_epoch_reads_every_training_sample_once_and_no_held_out_one(dataset: str) -> None:
    data = TrainingData(ShardDataset(dataset), 0.2, 3, FRAMES)
    count = len(data.samples)
    for epoch in range(3):
        assert sorted(data.sample_at(epoch * count + k) for k in range(count)) == sorted(data.samples)
    assert count + len(data.held_out_samples) == 10


def test_the_residual_is_measured_on_one_window_of_each_clip(tmp_path: Path) -> None:
    """The first samples may all be windows of one clip."""
    windows = [f"clip0_{k:03d}" for k in range(8)]
    reader = ShardDataset(published(str(tmp_path / "set"), [[windows], [[f"clip{i}_000"] for i in range(1, 5)]]))
    data = TrainingData(reader, 0.2, 3, FRAMES)
    clips = {clip_key_of(reader.keys[i]) for i in data.samples}
    (measured,) = data.measured_latents(99)
    assert len(measured) == len(clips)
    of_sample = {data._read([i], [i], [i]).raw_latents_BFCHW.float().numpy().tobytes(): i for i in data.samples}
    found = {clip_key_of(reader.keys[of_sample[one.numpy().tobytes()]]) for one in measured}
    assert found == clips
    assert len(data.measured_latents(2)[0]) == 2


def test_the_order_is_the_seeds_permutation_of_the_training_samples(dataset: str) -> None:
    """An order that moved would make every run before it another one."""
    reader = ShardDataset(dataset)
    data = TrainingData(reader, 0.2, 3, FRAMES)
    train, held_out = split_keys(map(clip_key_of, reader.keys), 0.2)
    own = [i for i, key in enumerate(reader.keys) if clip_key_of(key) in train]
    for epoch in range(3):
        expected = np.random.default_rng([3, epoch]).permutation(own).tolist()
        assert [data.sample_at(epoch * len(own) + k) for k in range(len(own))] == expected
    assert [clip_key_of(reader.keys[i]) for i in data.held_out_samples] == held_out


@pytest.fixture
def damaged(dataset: str, spec: TrainSpec, tmp_path: Path) -> tuple[TrainSpec, str]:
    """The spec on a copy of the data set in which one training sample has a value that is not finite, and its key."""
    copy = shutil.copytree(dataset, tmp_path / "damaged")
    reader = ShardDataset(str(copy))
    index = TrainingData(reader, spec.held_out_fraction, spec.seed, FRAMES).sample_at(5)  # of step 2
    (shard,), (offset,), _ = reader._places(np.array([index]), "latents")
    with (copy / reader.published.shards[shard].shard).open("r+b") as file:
        file.seek(offset + 200)
        file.write(np.array([np.inf], np.float16).tobytes())
    return replace(spec, dataset=str(copy)), reader.keys[index]


def test_a_damaged_sample_is_excluded_from_the_loss_and_recorded(
    damaged: tuple[TrainSpec, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, key = damaged
    monkeypatch.setattr("tasks.train.quarantine.MOST_DAMAGED", 0.2)
    ticks: list[dict] = []
    run_training(spec, on_tick=ticks.append)
    assert [tick.get("damaged") for tick in ticks[2:]] == [1] * 4
    (record,) = Path(spec.output, "quarantine").iterdir()
    assert record.name == f"{key}.json" and "not finite" in storage.read_json(str(record))["reason"]
    broken = replace(spec, output=str(tmp_path / "broken"))
    losses = [tick["loss"] for tick in ticks]
    assert train_until(broken, 4)[:3] + train_until(broken, 6) == losses
    # A micro-batch of one damaged sample has weight zero.
    alone = replace(spec, output=str(tmp_path / "alone"), micro_batch=1, model=replace(spec.model, unet_dropout=0.0))
    together = replace(alone, output=str(tmp_path / "together"), micro_batch=2)
    assert train_until(alone, 6) == pytest.approx(train_until(together, 6), rel=1e-4)


def test_damaged_samples_are_counted_without_listing_the_store_at_a_tick(
    spec: TrainSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[str] = []
    list_dir = storage.list_dir
    monkeypatch.setattr(storage, "list_dir", lambda uri: listed.append(uri) or list_dir(uri))
    run_training(replace(spec, tick_every=1))
    assert listed.count(storage.join(spec.output, "quarantine")) == 1
    monkeypatch.setattr("tasks.train.quarantine.MOST_DAMAGED", 1.0)
    first, second = (Quarantine(str(tmp_path / "shared"), 10) for _ in range(2))  # of two ranks
    first.add("clip00_000", "set", "latents: not finite")
    assert (first.count, second.count) == (1, 0)
    second.refresh()
    assert second.count == 1


def test_a_tick_has_the_gradient_norm_and_the_learning_rate_of_each_part(spec: TrainSpec, tmp_path: Path) -> None:
    spec = replace(spec, steps=3, tick_every=1, warmup_steps=2)

    def ticks(name: str, changed: TrainSpec) -> list[dict]:
        collected: list[dict] = []
        run_training(replace(changed, output=str(tmp_path / name)), on_tick=collected.append)
        return collected

    full = ticks("full", spec)
    for step, tick in enumerate(full):
        factor = learning_rate_factor(step, spec)
        assert tick["lr_unet"] == spec.learning_rate_unet * factor
        assert tick["lr_fusion"] == spec.learning_rate_fusion * factor
    limit = full[0]["grad_norm"] / 100
    clipped = ticks("clipped", replace(spec, clip_norm=limit))
    assert clipped[0]["grad_norm"] == full[0]["grad_norm"]  # before clipping
    without = replace(spec.model.fusion, kind="none")
    (tick, *_) = ticks("without", replace(spec, model=replace(spec.model, fusion=without)))
    assert "lr_unet" in tick and "lr_fusion" not in tick


def test_a_training_ends_when_more_than_a_thousandth_is_damaged(damaged: tuple[TrainSpec, str]) -> None:
    spec, key = damaged
    with pytest.raises(UserError, match=rf"1 of the \d samples trained on are damaged \(last {key}, latents: values"):
        run_training(spec)
    data = TrainingData(ShardDataset(spec.dataset), spec.held_out_fraction, spec.seed, FRAMES)
    with pytest.raises(UserError, match=rf"sample {key} of .* is damaged"):
        data.batch(2, spec.global_batch)


def test_a_damaged_sample_is_marked_and_its_neighbours_do_not_change(
    dataset: str, damaged: tuple[TrainSpec, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.train.quarantine.MOST_DAMAGED", 1.0)
    records = str(tmp_path / "records")
    calm, hurt = (
        TrainingData(ShardDataset(uri), 0.1, 0, FRAMES, vocab_size=500, quarantine=records)
        for uri in (dataset, damaged[0].dataset)
    )
    for step in range(6):
        whole, marked = calm.batch(step, 4), hurt.batch(step, 4)
        assert whole.keys == marked.keys and whole.intact_B.all()
        assert [key != damaged[1] for key in marked.keys] == marked.intact_B.tolist()
        assert torch.equal(
            whole.raw_latents_BFCHW * marked.intact_B[:, None, None, None, None], marked.raw_latents_BFCHW
        )
    assert list(storage.list_dir(records)) == [f"{damaged[1]}.json"]
    narrow = TrainingData(ShardDataset(dataset), 0.1, 0, FRAMES, vocab_size=2, quarantine=records)
    assert not narrow.batch(0, 4).intact_B.any()  # a token beyond the vocabulary would end a CUDA process


def test_another_training_is_refused_at_the_same_address(spec: TrainSpec) -> None:
    run_training(spec)
    with pytest.raises(UserError, match="another output"):
        run_training(replace(spec, seed=1))


def test_any_number_of_workers_shares_a_batch_without_loss_or_repetition() -> None:
    for batch in range(1, 20):
        for world in range(1, batch + 1):
            shares = [share(batch, rank, world) for rank in range(world)]
            assert [place for part in shares for place in part] == list(range(batch))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_learning_rate_warms_up_and_decays_to_zero(spec: TrainSpec) -> None:
    shaped = replace(spec, steps=100, warmup_steps=10, cosine=True)
    factors = [learning_rate_factor(step, shaped) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == pytest.approx(1.0) and factors[100] < 1e-6


def test_sigterm_saves_at_the_step_under_way_and_the_same_call_continues_bitwise(
    spec: TrainSpec, tmp_path: Path
) -> None:
    whole = train_until(spec, 6)
    stopped = replace(spec, output=str(tmp_path / "stopped"))
    losses: list[float] = []

    def tick(values: dict) -> None:
        losses.append(values["loss"])
        if values["step"] == 4 and len(losses) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingStopped, match=r"step 4 of 6.*same command continues"):
        train(stopped, tick, in_process=True)
    assert signal.getsignal(signal.SIGTERM) == before
    assert CheckpointStore(storage.join(stopped.output, "checkpoints")).steps() == [4, 3]
    train(stopped, tick, in_process=True)
    assert losses == whole
    assert_same_weights(spec, stopped)


def test_a_training_killed_and_continued_is_one_tracked_run_with_its_checkpoints(
    spec: TrainSpec, tmp_path: Path
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"

    def tick(values: dict) -> None:
        if values["step"] == 5 and not list(Path(spec.output).glob("report.json")) and not killed:
            killed.append(5)
            raise Killed

    killed: list[int] = []
    tracking = TrackingSpec(uri, "exp", "tiny")
    with pytest.raises(Killed):
        train(spec, tick, tracking, in_process=True)
    train(spec, tick, tracking, in_process=True)

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("exp")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3, 4, 5, 6]
    assert {"system/cpu_utilization_percentage", "grad_norm", "lr_unet", "lr_fusion"} <= set(run.data.metrics)
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.digest == ShardDataset(spec.dataset).manifest_sha256[:36]
    document = client.download_artifacts(run.info.run_id, "spec.json", str(tmp_path))
    assert storage.read_json(document)["learning_rate_unet"] == spec.learning_rate_unet
    models = client.search_logged_models([experiment.experiment_id], "model_type = 'checkpoint'")
    assert sorted((model.tags["step"], model.status.name) for model in models) == [("3", "READY"), ("6", "READY")]
    for model in models:
        assert Path(model.tags["uri"]).is_dir() and model.source_run_id == run.info.run_id
    assert not (Path(spec.output) / "tracking.jsonl").exists()


def test_tracking_that_is_down_stops_nothing_and_catches_up_when_the_command_is_repeated(
    spec: TrainSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.train.job.FLUSH_SECONDS", 0.2)
    wall = tmp_path / "store"
    wall.write_text("a file where the folder should be")
    tracking = TrackingSpec(f"sqlite:///{wall}/mlflow.db", "exp", "tiny")
    report = train(spec, None, tracking, in_process=True)
    wall.unlink()
    assert train(spec, None, tracking, in_process=True) == report
    client = MlflowClient(tracking.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("exp").experiment_id])
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3, 4, 5, 6]
    assert run.info.status == "FINISHED" and not (Path(spec.output) / "tracking.jsonl").exists()


def test_another_machine_delivers_what_the_first_one_could_not_when_the_output_is_remote(
    spec: TrainSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.train.job.FLUSH_SECONDS", 0.2)
    remote = replace(spec, output=f"memory://{uuid.uuid4().hex}/out")
    wall = tmp_path / "wall"
    wall.write_text("a file where a folder should be")
    tracking = TrackingSpec(f"sqlite:///{wall}/mlflow.db", "exp", "tiny")
    monkeypatch.setenv("HOME", str(tmp_path / "first"))
    report = train(remote, None, tracking, in_process=True)
    assert storage.exists(f"{remote.output}/tracking.jsonl")
    wall.unlink()
    monkeypatch.setenv("HOME", str(tmp_path / "second"))
    assert train(remote, None, tracking, in_process=True) == report
    client = MlflowClient(tracking.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("exp").experiment_id])
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "loss")]
    assert run.info.status == "FINISHED" and steps == [1, 2, 3, 4, 5, 6]
    assert not storage.exists(f"{remote.output}/tracking.jsonl")


def test_validation_does_not_change_training_and_frame_one_is_known(spec: TrainSpec, tmp_path: Path) -> None:
    plain = train_until(spec, 6)
    watched = replace(
        spec,
        output=str(tmp_path / "watched"),
        validation=ValidationSpec(every=2, clips=3, bands=2, animated=1),
        checkpoint_every=2,
    )
    ticks: list[dict] = []
    run_training(watched, on_tick=ticks.append)
    assert [tick["loss"] for tick in ticks] == plain
    assert_same_weights(spec, watched)
    looks = [tick for tick in ticks if LOSS in tick]
    assert [tick["step"] for tick in looks] == [2, 4, 6]
    for look in looks:
        assert look["validation_loss/frame_01"] < 1e-8 < look["validation_loss/frame_02"]
        bands = [look["validation_loss/t_000_499"], look["validation_loss/t_500_999"]]
        assert look[LOSS] == pytest.approx(sum(bands) / 2, rel=1e-5)
        assert look["validation_z0_error/t_500_999"] > bands[1] and look["validation_motion_ratio"] > 0
    clips = sorted(Path(watched.output, "samples").iterdir())
    assert [clip.name[:13] for clip in clips] == ["step-00000002", "step-00000004", "step-00000006"]
    assert read_clip(clips[0].read_bytes(), FRAMES, 4.0, 32).pixels.shape == (FRAMES, 32, 32, 3)
    best = min(looks, key=lambda look: look[LOSS])["step"]
    assert set(CheckpointStore(storage.join(watched.output, "checkpoints")).steps()) == {4, 6, best}


def test_a_batch_in_parts_trains_as_the_whole_does(spec: TrainSpec, tmp_path: Path) -> None:
    calm = replace(spec, model=replace(spec.model, unet_dropout=0.0), global_batch=4)
    whole = train_until(calm, 6)
    for change in ({"micro_batch": 1}, {"micro_batch": 3}, {"recompute_activations": True}):
        other = replace(calm, output=str(tmp_path / str(change)), **change)
        assert spec_digest(other) == spec_digest(calm)
        assert train_until(other, 6) == pytest.approx(whole, rel=1e-4)


def test_bfloat16_keeps_weights_prior_and_loss_in_float32(spec: TrainSpec, tmp_path: Path) -> None:
    calm = replace(spec, model=replace(spec.model, unet_dropout=0.0))
    exact = train_until(calm, 6)
    coarse = replace(calm, output=str(tmp_path / "coarse"), precision="bfloat16")
    ticks: list[dict] = []
    run_training(coarse, on_tick=ticks.append)
    losses = [tick["loss"] for tick in ticks]
    assert losses != exact and losses == pytest.approx(exact, rel=0.02)
    assert max(tick["frame_1"] for tick in ticks) < 1e-8  # the prior is as exact as before
    assert {tensor.dtype for tensor in weights(coarse).values()} == {torch.float32}


def test_temporal_training_moves_what_mixes_frames_and_nothing_else(spec: TrainSpec, tiny_base: Path) -> None:
    report = run_training(replace(spec, trained="temporal"))
    before, after = load_unet(tiny_base).state_dict(), load_model(report.model).unet.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(any(part in name for part in ("temp_", "transformer_in")) for name in moved)
    stored = {name.removeprefix("unet.") for name in weights(spec) if name.startswith("unet.")}
    assert moved <= stored and all(any(part in name for part in ("temp_", "transformer_in")) for name in stored)


def test_adapters_are_trained_and_resumed_bitwise_and_exported_merged_and_alone(
    spec: TrainSpec, tiny_base: Path, tmp_path: Path
) -> None:
    spec = replace(spec, trained="lora", lora_rank=2, lora_alpha=4.0)
    broken = replace(spec, output=str(tmp_path / "broken"))
    whole = train_until(spec, 6)
    assert train_until(broken, 4)[:3] + train_until(broken, 6) == whole
    assert_same_weights(spec, broken)
    assert all(".lora_" in name or name.startswith("fusion.") for name in weights(spec))

    before, merged = load_unet(tiny_base), load_model(storage.join(spec.output, "model")).unet
    moved = {n for n, tensor in before.state_dict().items() if not torch.equal(tensor, merged.state_dict()[n])}
    assert {name.split(".")[-2] for name in moved} == {"to_q", "to_k", "to_v", "0"}
    theirs = UNet3DConditionModel.from_pretrained(tiny_base / "unet")
    adapted = PeftModel.from_pretrained(theirs, storage.join(spec.output, "adapter")).eval()
    x, t, text = torch.randn(1, 4, FRAMES, 4, 4), torch.tensor([500]), torch.randn(1, 32, 16)
    found, expected = merged(x, t, text), adapted(x, t, text).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - before.eval()(x, t, text)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"steps": 0}, "steps 0, expected at least 1"),
        ({"workers": 3}, "a global batch of 2 leaves some of 3 workers without a sample; give 2"),
        ({"least_workers": 2}, "least_workers 2, expected 1 to 1"),
        ({"micro_batch": 0}, "micro_batch 0, expected at least 1 sample"),
        ({"validation": ValidationSpec(every=1, clips=0)}, "validation.clips 0, expected"),
        ({"trained": "lora", "lora_rank": 0}, "lora_rank 0 and lora_alpha 32, expected numbers above 0"),
        ({"trained": "lora", "model": TripConfig(condition="channel")}, "would never be seen; train 'all'"),
    ],
)
def test_numbers_that_no_training_can_have_are_told_first(spec: TrainSpec, change: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        run_training(replace(spec, **change))
