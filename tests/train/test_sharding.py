"""FSDP2 on two processes: the curve and the weights of unsharded training, and either goes on from the other."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from infra import storage
from tasks.records import to_json
from tasks.shards import ShardDataset
from tasks.train.checkpoints import CheckpointStore
from tasks.train.loop import run_training
from tasks.train.spec import TrainSpec, ValidationSpec, spec_digest
from tasks.train.start import parent_at, start_from
from tests.train.test_train import dataset, spec, train_until  # noqa: F401 - fixtures
from trip_model.checkpoint import load_model

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).resolve().parents[1] / "support" / "shard_worker.py"


def run_all(folder: Path, runs: list[tuple[TrainSpec, int | None]]) -> list[list[dict[str, Any]]]:
    (folder / "runs.json").write_text(json.dumps([[to_json(run), stop] for run, stop in runs]))
    ranks = [subprocess.Popen([sys.executable, str(SCRIPT), str(rank), str(folder)]) for rank in range(2)]
    assert [rank.wait(240) for rank in ranks] == [0, 0]
    return json.loads((folder / "ticks.json").read_text())


def losses(ticks: list[dict[str, Any]]) -> list[float]:
    return [tick["loss"] for tick in ticks]


def state(spec: TrainSpec) -> dict[str, torch.Tensor]:  # noqa: F811
    found = CheckpointStore(storage.join(spec.output, "checkpoints")).newest()
    assert found is not None and found.step == spec.steps
    return {f"{part}.{name}": tensor for part, named in found.parts.items() for name, tensor in named.items()}


def assert_close(one: TrainSpec, other: TrainSpec, atol: float = 1e-5) -> None:
    expected, found = state(one), state(other)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=atol, msg=name)


def test_sharded_training_is_the_unsharded_one_and_either_goes_on_from_the_other(
    spec: TrainSpec,  # noqa: F811
    tmp_path: Path,
) -> None:
    def named(name: str, **changes: Any) -> TrainSpec:
        return replace(whole, output=str(tmp_path / name), **changes)

    whole = replace(spec, global_batch=4, workers=2, output=str(tmp_path / "whole"))
    whole = replace(whole, model=replace(spec.model, unet_dropout=0.0))
    sharded = named("sharded", sharding="fsdp2")
    assert spec_digest(sharded) == spec_digest(whole)
    frugal = named(
        "frugal", sharding="fsdp2", micro_batch=1, recompute_activations=True, validation=ValidationSpec(2, 3, 2, 1)
    )
    onto = named("onto")
    runs = [(whole, None), (sharded, None), (onto, 3), (replace(onto, sharding="fsdp2"), None), (frugal, 3)]
    ticks = run_all(tmp_path, runs)
    curve = losses(ticks[0])
    assert losses(ticks[1]) == pytest.approx(curve, rel=1e-5)
    norms = [[tick["grad_norm"] for tick in ticks[run]] for run in (0, 1)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    assert losses(ticks[2] + ticks[3]) == pytest.approx(curve, rel=1e-5)
    assert losses(ticks[4]) == pytest.approx(curve[:3], rel=1e-4)
    assert [tick["step"] for tick in ticks[4] if "validation_loss" in tick] == [2]
    train_until(replace(frugal, workers=1), 6)
    assert_close(whole, sharded)
    assert_close(whole, onto)
    assert_close(whole, frugal, atol=1e-4)  # sums in other parts, and AdamW makes much of gradients near zero
    expected, found = (load_model(storage.join(s.output, "model")).state_dict() for s in (whole, sharded))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("change", [{"precision": "bfloat16"}, {"trained": "lora", "lora_rank": 2}], ids=str)
def test_sharding_goes_with_other_recipes(spec: TrainSpec, tmp_path: Path, change: dict[str, Any]) -> None:  # noqa: F811
    whole = replace(spec, global_batch=4, workers=2, output=str(tmp_path / "whole"), **change)
    whole = replace(whole, model=replace(spec.model, unet_dropout=0.0))
    sharded = replace(whole, output=str(tmp_path / "sharded"), sharding="fsdp2")
    ticks = run_all(tmp_path, [(whole, None), (sharded, 3), (sharded, None)])
    tolerance = 1e-5 if whole.precision == "float32" else 0.01
    assert losses(ticks[1] + ticks[2]) == pytest.approx(losses(ticks[0]), rel=tolerance)
    assert max(tick["frame_1"] for tick in ticks[1]) < 1e-8
    assert {tensor.dtype for tensor in state(sharded).values()} == {torch.float32}
    assert state(sharded).keys() == state(whole).keys()


def test_a_sharded_training_continues_a_finished_one_and_is_continued(
    spec: TrainSpec,  # noqa: F811
    tmp_path: Path,
) -> None:
    whole = replace(spec, global_batch=4, workers=2, steps=6, output=str(tmp_path / "whole"))
    whole = replace(whole, model=replace(spec.model, unet_dropout=0.0))
    short = replace(whole, steps=2, workers=1, output=str(tmp_path / "short"))
    run_training(short)

    def more_of(parent: TrainSpec, steps: int, name: str, **changes: Any) -> TrainSpec:
        own = replace(whole, steps=steps, output=str(tmp_path / name), **changes)
        data = ShardDataset(own.dataset).manifest_sha256
        start, sentence = start_from(parent_at(parent.output, str(tmp_path)), own, data)
        assert sentence.startswith(f"goes on with all of {parent.output} after step {parent.steps}")
        return replace(own, start=start, steps=steps + start.step)

    sharded = more_of(short, 2, "sharded", sharding="fsdp2")
    ticks = run_all(tmp_path, [(whole, None), (sharded, 1), (sharded, None)])
    curve = losses(ticks[0])
    assert losses(ticks[1] + ticks[2]) == pytest.approx(curve[2:4], rel=1e-5)
    last = more_of(sharded, 2, "last", workers=1)
    assert train_until(last, 6) == pytest.approx(curve[4:], rel=1e-5)
    assert_close(whole, last)
