"""Several workers: resumed on as many bitwise, resumed on fewer with the same global batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from infra import storage
from tasks.records import to_json
from tasks.train.checkpoints import CheckpointStore
from tasks.train.job import ELASTIC_START_SECONDS, START_SECONDS, START_VARIABLE, _start_limit
from tasks.train.spec import TrainSpec
from tests.support.train_worker import STOP, WORLD
from tests.train.test_train import dataset, spec, train_until  # noqa: F401 - fixtures

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "train_worker.py"


def tensors(output: Path) -> dict[str, torch.Tensor]:
    found = CheckpointStore(storage.join(str(output), "checkpoints")).newest()
    assert found is not None and found.step == 6
    return {f"{part}.{name}": tensor for part, named in found.parts.items() for name, tensor in named.items()}


@pytest.mark.slow
def test_two_workers_resume_bitwise_and_one_goes_on_with_their_batches(
    spec: TrainSpec,  # noqa: F811
    tmp_path: Path,
) -> None:
    model = replace(spec.model, unet_dropout=0.0)  # its masks go by rank, all else by place in the global batch
    whole = replace(spec, output=str(tmp_path / "whole"), global_batch=3, model=model, workers=WORLD)
    (tmp_path / "spec.json").write_text(json.dumps(to_json(whole)))
    ranks = [subprocess.Popen([sys.executable, str(SCRIPT), str(rank), str(tmp_path)]) for rank in range(WORLD)]
    assert [rank.wait(240) for rank in ranks] == [0, 0]
    expected, resumed = tensors(tmp_path / "whole"), tensors(tmp_path / "broken")
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)

    fewer = replace(whole, output=str(tmp_path / "early"), workers=1)
    assert CheckpointStore(storage.join(fewer.output, "checkpoints")).steps() == [STOP]
    rest = train_until(fewer, 6)
    alone = train_until(replace(fewer, output=str(tmp_path / "alone")), 6)
    assert rest == pytest.approx(alone[STOP:], rel=1e-4)  # the samples that two workers would have had, in their order
    for name, tensor in tensors(tmp_path / "early").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)


def test_each_training_has_its_own_limit_for_the_start_of_its_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    training = TrainSpec("", "", "")
    monkeypatch.delenv(START_VARIABLE, raising=False)
    for given, limit in ((training, START_SECONDS), (replace(training, least_workers=1), ELASTIC_START_SECONDS)):
        with _start_limit(given):
            assert os.environ[START_VARIABLE] == str(limit)
        assert START_VARIABLE not in os.environ
    monkeypatch.setenv(START_VARIABLE, "7")
    with _start_limit(training):
        assert os.environ[START_VARIABLE] == "7"
