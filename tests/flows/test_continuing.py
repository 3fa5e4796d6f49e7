"""--from champion: the training of the promoted version if it is known, else the version's files; and the lineage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flows import continuing, layout
from flows.source import DEFAULT
from infra.tracking import connect
from tasks.records import Artifact, UserError
from tasks.register.registry import RegisterSpec, register
from tasks.train.loop import run_training
from tests.support.latents import write_latents
from tests.support.reports import write_record

TINY = [
    "prepare.size=32",
    "train.model.size=32",
    "train.steps=2",
    "train.global_batch=2",
    "train.workers=1",
    "train.model.fusion={width = 16, heads = 2, local_shrinkage = false}",
    "train.model.schedule.sampling_steps=2",
    "train.validation.every=0",
    "train.cosine=false",
]


@pytest.fixture
def run(tmp_path: Path, tiny_base: Path) -> layout.Run:
    return layout.resolve("demo", None, str(tmp_path / "root"), str(tiny_base), DEFAULT, TINY)


def test_without_a_registry_the_champion_is_one_sentence(run: layout.Run, tmp_path: Path) -> None:
    data = Artifact("data", "0" * 64)
    with pytest.raises(UserError, match="trip has no champion to continue; promote a version"):
        continuing.find_parent(run, "champion", f"sqlite:///{tmp_path}/mlflow.db")
    assert continuing.training(run, data, continuing.find_parent(run, "base", "")).start is None


@pytest.mark.slow
def test_the_champion_is_continued_and_registered_with_its_parent(run: layout.Run, tmp_path: Path) -> None:
    dataset = layout.data_set(write_latents(str(tmp_path / "set"), clips=8, frames=16))
    uri = f"sqlite:///{tmp_path}/mlflow.db"

    def register_model(model: Artifact, name: str) -> dict[str, str]:
        folder = tmp_path / name
        folder.mkdir()
        write_record(folder, provenance={"model_sha256": model.sha256, "folders": {}})
        report = register(RegisterSpec(model.uri, str(folder), uri, check_steps=1), lambda _: None)
        return connect(uri).get_model_version("trip", report.version).tags

    first = run_training(run.train(dataset))
    assert "lineage.parent_sha256" not in register_model(first.exported, "first")
    spec = continuing.training(run, dataset, continuing.find_parent(run, "champion", uri))
    assert spec.start is not None and (spec.start.step, spec.steps) == (2, 4)
    second = run_training(spec)
    tags = register_model(second.exported, "second")
    assert tags["lineage.parent_sha256"] == first.model_digest and tags["lineage.parent_version"] == "1"
    assert (tags["lineage.total_steps"], tags["lineage.total_samples"]) == ("4", "8")
    # Without the training, the files of the version are continued.
    shutil.rmtree(tmp_path / "root" / "train")
    spec = continuing.training(run, dataset, continuing.find_parent(run, "champion", uri))
    assert spec.start is not None and (spec.start.step, spec.steps) == (0, 2)
    assert spec.start.model.startswith(str(tmp_path / "root" / "registry"))
    assert run_training(spec).step == 2
