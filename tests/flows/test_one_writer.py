"""Two runs on one output: each stage refuses while another process holds its lease."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flows import layout, recipes
from flows.cli.app import main, sentence, user_error
from flows.source import SourceOptions
from infra.leases import LeaseHeld, lease
from tasks.encode.job import prepare
from tasks.evaluate.job import evaluate
from tasks.evaluate.spec import EvaluateSpec
from tasks.ingest.demo import write_demo_corpus
from tasks.train.job import train
from tasks.train.spec import TrainSpec
from tests.support.latents import write_latents
from tests.support.tiny_cli import tiny


@pytest.mark.parametrize("stage", ["prepare", "train", "evaluate"])
def test_a_stage_writes_nothing_while_another_process_has_its_output(
    stage: str, tiny_base: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run" / stage / "0ab1"
    table = write_demo_corpus(str(tmp_path / "corpus"), 2, 32)
    run = layout.Run(tiny(str(tiny_base)), SourceOptions().spec(table), str(tmp_path / "run"))
    call = {
        "prepare": lambda: prepare(replace(run.prepare, output=str(output), workers=0)),
        "train": lambda: train(TrainSpec(dataset="d", output=str(output), base=str(tiny_base))),
        "evaluate": lambda: evaluate(EvaluateSpec(model="m", dataset="d", output=str(output))),
    }[stage]
    with lease(str(output)), pytest.raises(LeaseHeld) as refused:
        call()
    assert user_error(refused.value) is refused.value
    assert sentence(refused.value).startswith(f"{output} is being written by ")
    assert not list(output.glob("*.tar")) and not (output / "report.json").exists()


@pytest.mark.parametrize("command", ["forget", "deduplicate", "compact", "upgrade"])
def test_a_command_of_a_data_set_writes_nothing_while_another_process_has_it(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(write_latents(str(tmp_path / "set"), clips=2, frames=4))
    before = {file: file.read_bytes() for file in data.iterdir()}
    (tmp_path / "ids").write_text("clip0\n")
    ids = ["--ids", str(tmp_path / "ids")] if command == "forget" else []
    with lease(str(data)):
        assert main([command, "--data", str(data), *ids]) == 2
    assert f"{data} is being written by " in capsys.readouterr().err
    assert {file: file.read_bytes() for file in data.iterdir()} == before


@pytest.mark.slow
def test_a_second_command_names_the_owner(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(recipes.RECIPES, "tiny", lambda: tiny(str(tiny_base)))
    table = write_demo_corpus(str(tmp_path / "corpus"), 2, 32)
    options = SourceOptions()
    run = layout.resolve("tiny", table, str(tmp_path / "run"), None, options)
    with lease(run.prepare.output):
        command = ["prepare-latents", "--recipe", "tiny", "--source", table, "--root", str(tmp_path / "run")]
        assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {run.prepare.output} is being written by ") and ", process " in line
