"""Does a training that continues another one equal the longer one bitwise, and take what it says?"""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from infra import storage
from infra.leases import lease
from tasks.records import UserError
from tasks.shards import ShardDataset
from tasks.train.checkpoints import Checkpoint, CheckpointStore
from tasks.train.loop import run_training
from tasks.train.preflight import preflight
from tasks.train.spec import TrainSpec, spec_digest
from tasks.train.start import (
    Parent,
    check_network,
    last_training,
    parent_at,
    read_training,
    start_from,
    training_of,
)
from tests.support.latents import write_latents
from trip_model.checkpoint import load_model, read_record
from trip_model.config import FusionConfig, ScheduleConfig, TripConfig
from trip_model.folders import folder_hash

FRAMES = 4


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_latents(str(tmp_path_factory.mktemp("data") / "set"), clips=8, frames=FRAMES)


def make_spec(dataset: str, base: Path, output: Path) -> TrainSpec:
    fusion = FusionConfig(width=16, heads=2, prediction="shrinkage")
    return TrainSpec(
        dataset=dataset,
        output=str(output),
        base=str(base),
        model=TripConfig(
            size=32,
            num_frames=FRAMES,
            residual_std=(0.0, 0.5, 0.5, 0.5),
            fusion=fusion,
            schedule=ScheduleConfig(sampling_steps=2),
            unet_dropout=0.1,
        ),
        steps=6,
        global_batch=2,
        learning_rate_unet=1e-3,
        learning_rate_fusion=1e-3,
        warmup_steps=2,
        average_decay=0.9,
        checkpoint_every=3,
        tick_every=1,
        measure_clips=4,
    )


@pytest.fixture(scope="module")
def trained(dataset: str, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainSpec:
    """A finished training of 6 steps."""
    spec = make_spec(dataset, tiny_base, tmp_path_factory.mktemp("trained") / "run")
    run_training(spec)
    return spec


def continued(parent: Parent, spec: TrainSpec, output: Path, **changes: object) -> tuple[TrainSpec, str]:
    """The spec of a training of `spec.steps` more steps, as the layout makes it, and the sentence."""
    spec = replace(spec, start=None, output=str(output), **changes)
    check_network(parent, spec, folder_hash(spec.base))
    start, sentence = start_from(parent, spec, ShardDataset(spec.dataset).manifest_sha256)
    return replace(spec, start=start, steps=spec.steps + start.step), sentence


def newest(spec: TrainSpec) -> Checkpoint:
    checkpoint = CheckpointStore(storage.join(spec.output, "checkpoints")).newest()
    assert checkpoint is not None
    return checkpoint


def losses(spec: TrainSpec, until: int = 0) -> list[float]:
    """The losses of a training's steps; the training is interrupted after step `until`, if it is given."""
    seen: list[float] = []

    def tick(values: dict) -> None:
        seen.append(values["loss"])
        if values["step"] == until:
            raise InterruptedError

    with contextlib.suppress(InterruptedError):
        run_training(spec, on_tick=tick)
    return seen


def assert_equal(one: Checkpoint, other: Checkpoint) -> None:
    assert one.step == other.step and one.parts.keys() == other.parts.keys()
    for part, tensors in one.parts.items():
        assert [name for name in tensors if not torch.equal(tensors[name], other.parts[part][name])] == [], part


@pytest.mark.parametrize("kind", ["all", pytest.param("lora", marks=pytest.mark.slow)])
def test_six_steps_and_four_more_equal_ten_bitwise(kind: str, trained: TrainSpec, tmp_path: Path) -> None:
    first = replace(trained, trained=kind, output=str(tmp_path / "train" / "first"))
    with lease(first.output):  # its file stays next to the output, as after a command
        run_training(first)
    whole = replace(first, steps=10, output=str(tmp_path / "whole"))
    expected = losses(whole)
    parent = last_training(str(tmp_path / "train"))
    more, sentence = continued(parent, first, tmp_path / "train" / "more", steps=4)
    assert sentence == f"goes on with all of {first.output} after step 6"
    assert more.steps == 10 and losses(more, until=8) == expected[6:8]  # killed without a checkpoint
    assert losses(more) == expected[6:]  # and resumed
    assert_equal(newest(more), newest(whole))
    record = read_training(more.output)
    assert record is not None and (record.total_steps, record.total_samples) == (10, 20)
    provenance = read_record(Path(more.output) / "model")["provenance"]
    assert provenance["parent_sha256"] == parent.model.sha256 and provenance["total_steps"] == 10
    # Of a chain, the last one is continued, and the steps count on.
    again, _ = continued(last_training(str(tmp_path / "train")), first, tmp_path / "train" / "again", steps=2)
    assert again.start is not None and (again.start.step, again.steps, again.start.steps_before) == (10, 12, 10)


def test_another_schedule_goes_on_from_the_same_state(trained: TrainSpec, tmp_path: Path) -> None:
    parent = parent_at(trained.output, str(tmp_path))
    more, sentence = continued(parent, trained, tmp_path / "more", steps=2, cosine=True, learning_rate_unet=1e-4)
    assert sentence.endswith("after step 6, with other values of cosine, learning_rate_unet")
    rates: list[float] = []
    run_training(more, on_tick=lambda values: rates.append(values["lr_unet"]))
    assert 0 < rates[1] < rates[0] < 1e-4  # the end of a cosine over 8 steps
    moments = [value for name, value in newest(more).parts["optimizer"].items() if name.endswith(".step")]
    assert {float(value) for value in moments} == {8.0}


@pytest.mark.parametrize(
    ("name", "value"), [("trained", "temporal"), ("trained", "lora"), ("seed", 7), ("global_batch", 3)]
)
def test_another_training_starts_from_the_weights_fusion_included(
    name: str, value: object, trained: TrainSpec, tmp_path: Path
) -> None:
    parent = parent_at(str(Path(trained.output) / "model"), str(tmp_path))
    spec, sentence = continued(
        parent, trained, tmp_path / "tuned", **{name: value}, steps=1, learning_rate_unet=0.0, learning_rate_fusion=0.0
    )
    assert (
        f"from the weights of {parent.model.uri}, fusion included" in sentence and f"other values of {name}" in sentence
    )
    report = run_training(spec)
    before, after = load_model(parent.model.uri), load_model(report.model)
    assert before.config.residual_std == after.config.residual_std and spec.steps == 1
    weights = after.state_dict()
    assert [key for key, tensor in before.state_dict().items() if not torch.equal(tensor, weights[key])] == []
    record = read_training(spec.output)
    assert record is not None and record.total_steps == 7
    assert record.total_samples == 12 + spec.global_batch


def test_adams_moments_and_the_averages_are_taken_on_request(trained: TrainSpec, tmp_path: Path) -> None:
    parent = parent_at(trained.output, str(tmp_path))
    still = {"steps": 1, "learning_rate_unet": 0.0, "learning_rate_fusion": 0.0}
    spec, sentence = continued(parent, trained, tmp_path / "run", take="optimizer", seed=7, **still)
    assert sentence == f"starts from weights, averages and Adam's moments of {trained.output}" and spec.steps == 1
    run_training(spec)
    before, after = newest(trained), newest(spec)
    assert float(after.parts["optimizer"]["0.step"]) == 7 and after.step == 1
    assert all(torch.equal(after.parts["weights"][name], value) for name, value in before.parts["weights"].items())
    with pytest.raises(UserError, match=r"Adam's moments of .* are of other weights \(trained differ\)"):
        continued(parent, trained, tmp_path / "lora", take="optimizer", trained="lora")
    with pytest.raises(UserError, match="cannot be taken"):
        continued(Parent(parent.model), trained, tmp_path / "lora", take="optimizer")


def test_the_identity_is_the_parents_content(trained: TrainSpec, tmp_path: Path) -> None:
    parent = parent_at(trained.output, str(tmp_path))
    more, _ = continued(parent, trained, tmp_path / "more", steps=4)
    assert more.start is not None
    moved = replace(more, start=replace(more.start, state="s3://elsewhere/step-00000006", steps_before=0))
    assert spec_digest(moved) == spec_digest(more) != spec_digest(replace(more, start=None))
    other = replace(more, start=replace(more.start, state_digest="0" * 16))
    assert spec_digest(other) != spec_digest(more)


def test_a_parent_that_does_not_fit_is_one_sentence(
    trained: TrainSpec, tiny_velocity_base: Path, tmp_path: Path
) -> None:
    parent = parent_at(trained.output, str(tmp_path))
    with pytest.raises(UserError, match=r"was trained from another base .*; give that base with --base"):
        continued(parent, trained, tmp_path / "a", base=str(tiny_velocity_base))
    wide = replace(trained.model, fusion=replace(trained.model.fusion, width=32))
    with pytest.raises(UserError, match=r"has fusion\.width 16, the recipe 32; .*--set train\.model\.fusion\.width=16"):
        continued(parent, trained, tmp_path / "b", model=wide)
    with pytest.raises(UserError, match="no trained model at"):
        parent_at(str(tmp_path / "none"), str(tmp_path))
    with pytest.raises(UserError, match="no finished training below"):
        last_training(str(tmp_path))


def test_changed_files_of_a_parent_are_refused(trained: TrainSpec, tmp_path: Path) -> None:
    parent = parent_at(trained.output, str(tmp_path))
    more, _ = continued(parent, trained, tmp_path / "more", steps=1)
    tuned, _ = continued(parent, trained, tmp_path / "tuned", steps=1, take="weights")
    assert more.start is not None and tuned.start is not None
    with pytest.raises(UserError, match=r"the checkpoint .* cannot be read"):
        run_training(replace(more, start=replace(more.start, state_digest="0" * 16)))
    with pytest.raises(UserError, match=r"has sha256 .*, expected 000000000000"):
        run_training(replace(tuned, start=replace(tuned.start, model_sha256="0" * 64)))


def test_a_model_is_known_by_its_content(trained: TrainSpec, tmp_path: Path) -> None:
    outputs = storage.parent(trained.output)
    sha256 = folder_hash(Path(trained.output) / "model")
    assert training_of(sha256, outputs) == parent_at(trained.output, str(tmp_path))
    assert training_of("0" * 64, outputs) is None


def test_a_trained_trip_as_a_base_is_recognised(trained: TrainSpec, tmp_path: Path) -> None:
    model = storage.join(trained.output, "model")
    spec = replace(trained, base=model, output=str(tmp_path / "run"))
    assert any("is a trained TRIP" in warning and f"--from {model}" in warning for warning in preflight(spec))
    assert not preflight(trained)
    assert json.loads((Path(model) / "trip.json").read_text())["provenance"].get("parent_sha256") is None
