"""Addresses follow from what goes in: resolving one draws nothing, opens no port and reads no model."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows import layout
from flows.cli.app import COMMANDS, FLOWS
from flows.cli.signature import signature_of, summary_of
from flows.nightly import nightly
from flows.reproduce import reproduce
from flows.source import DEFAULT
from infra import storage
from tasks.encode.fingerprint import fingerprint_of
from tasks.ingest.demo import demo_table, write_demo_corpus
from tasks.ingest.sources import source_digest
from tasks.ingest.spec import SourceSpec
from tasks.records import Artifact, UserError, to_json
from tasks.train.spec import Start, TrainReport, finished_report, spec_digest
from tasks.train.start import write_training

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_demos_data_set_has_its_address_before_a_frame_is_drawn(tmp_path: Path, tiny_base: Path) -> None:
    run = layout.resolve("demo", None, str(tmp_path), str(tiny_base), DEFAULT)
    spec = run.prepare
    assert spec.output.startswith(f"{tmp_path}/data/") and not list(tmp_path.iterdir())
    assert spec.fingerprint == fingerprint_of(spec)
    assert run.prepare is spec  # resolved once


def test_the_table_of_the_demo_corpus_is_known_from_its_numbers(tmp_path: Path) -> None:
    address, sha256 = demo_table(str(tmp_path / "corpus"), 3, 32)
    assert not (tmp_path / "corpus").exists()
    assert write_demo_corpus(tmp_path / "corpus", 3, 32) == address
    assert source_digest(SourceSpec(address)) == sha256


def test_a_recipe_without_clips_of_its_own_needs_a_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no clips of its own; name a table or a folder"):
        _ = layout.resolve("paper", None, str(tmp_path), None, DEFAULT).prepare


def test_a_moved_root_and_base_have_the_finished_training(tmp_path: Path, tiny_base: Path) -> None:
    data = Artifact(str(tmp_path / "one" / "data" / "0" / "versions" / "1"), "5" * 64)
    spec = layout.resolve("demo", None, str(tmp_path / "one"), str(tiny_base), DEFAULT).train(data)
    assert finished_report(spec) is None
    report = TrainReport(spec.output, "model", spec.steps, 1.0, 0.5, 8, 1.0, "0" * 64, spec_digest(spec))
    storage.write_json(storage.join(spec.output, "report.json"), to_json(report))

    shutil.move(tmp_path / "one", tmp_path / "two")
    shutil.copytree(tiny_base, tmp_path / "base")
    there = layout.resolve("demo", None, str(tmp_path / "two"), str(tmp_path / "base"), DEFAULT)
    moved = there.train(replace(data, uri=data.uri.replace("/one/", "/two/")))
    assert moved.dataset != spec.dataset and moved.base != spec.base
    assert finished_report(moved) == report
    # Other rows are another training, and so is another base.
    assert finished_report(there.train(replace(data, sha256="6" * 64))) is None
    (tmp_path / "base" / "unet" / "config.json").write_text("{}")
    layout.base_hash.cache_clear()
    assert finished_report(there.train(data)) is None


def test_the_training_that_continued_a_model_is_found_without_its_parent(tmp_path: Path, tiny_base: Path) -> None:
    data = Artifact(str(tmp_path / "data" / "0" / "versions" / "1"), "5" * 64)
    run = layout.resolve("demo", None, str(tmp_path), str(tiny_base), DEFAULT)
    with pytest.raises(UserError, match="no finished training of recipe 'demo'"):
        run.trained(data)
    for parent, values in (("a", {}), ("b", {}), ("c", {"global_batch": 2})):  # c: another recipe of training
        spec = replace(run.train(data, Start(parent * 64)), **values)
        write_training(spec, parent * 64, data.sha256, spec.base_sha256)
        report = TrainReport(spec.output, "model", spec.steps, 1.0, 0.5, 8, 1.0, parent * 64, spec_digest(spec))
        storage.write_json(storage.join(spec.output, "report.json"), to_json(report))
        if parent == "b":
            assert run.trained(data) == Artifact(storage.join(spec.output, "model"), "b" * 64)
    assert run.trained(data).sha256 == "b" * 64
    with pytest.raises(UserError, match="no finished training"):
        run.trained(replace(data, sha256="6" * 64))


def test_another_recipe_of_training_keeps_the_data_set(tmp_path: Path, tiny_base: Path) -> None:
    run = layout.resolve("demo", None, str(tmp_path), str(tiny_base), DEFAULT)
    changed = replace(run.recipe.train, steps=7, learning_rate_unet=1.0)
    assert replace(run, recipe=replace(run.recipe, train=changed)).prepare.output == run.prepare.output


@pytest.mark.parametrize("flow", [nightly, reproduce])
def test_a_detached_training_without_a_cluster_is_refused_before_clips_are_prepared(
    flow: Any, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match="set RAY_ADDRESS"):
        flow.fn(root=str(tmp_path / "run"), base=str(tiny_base), values=["train.detached=true"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flow", [nightly, reproduce])
def test_a_start_that_is_no_model_is_refused_before_clips_are_prepared(
    flow: Any, tmp_path: Path, tiny_base: Path
) -> None:
    with pytest.raises(UserError, match=r"no trained model at .*/typo"):
        flow.fn(root=str(tmp_path / "run"), base=str(tiny_base), start=str(tmp_path / "typo"))
    assert not (tmp_path / "run").exists()


def test_a_table_that_grows_or_moves_keeps_its_data_set(tmp_path: Path, tiny_base: Path) -> None:
    def address(table: Path, text: str, limit: int | None = None) -> str:
        table.parent.mkdir(exist_ok=True)
        table.write_text("videoid,contentUrl,name\n" + text)
        options = replace(DEFAULT, limit=limit)
        return layout.resolve("demo", str(table), str(tmp_path), str(tiny_base), options).prepare.output

    first = address(tmp_path / "a" / "clips.csv", "1,a.mp4,x\n")
    assert address(tmp_path / "a" / "clips.csv", "1,a.mp4,x\n2,b.mp4,y\n") == first
    assert address(tmp_path / "b" / "clips.csv", "2,b.mp4,y\n") == first
    assert address(tmp_path / "a" / "other.csv", "1,a.mp4,x\n") != first
    assert address(tmp_path / "a" / "clips.csv", "1,a.mp4,x\n", limit=1) != first


@pytest.mark.parametrize("name", [*FLOWS, *COMMANDS])
def test_the_flags_of_a_command_are_read_without_its_module(name: str) -> None:
    module = COMMANDS.get(name, f"flows.{name.replace('-', '_')}")
    function = name.replace("-", "_")
    code = (
        "import sys\n"
        "from flows.cli.app import parse\n"
        f"from flows.cli.signature import signature_of\n"
        f"signature_of({module!r}, {function!r})\n"
        "print([m for m in ('torch', 'ray', 'prefect', 'mlflow', 'diffusers', 'av') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("name", [*FLOWS, *COMMANDS])
def test_a_signature_from_the_source_is_the_functions_own(name: str) -> None:
    import importlib
    import inspect

    module = COMMANDS.get(name, f"flows.{name.replace('-', '_')}")
    function = name.replace("-", "_")
    given = getattr(importlib.import_module(module), function)
    given = getattr(given, "fn", given)
    read = signature_of(module, function)
    parameters = inspect.signature(given).parameters.values()
    assert [(p.name, p.kind, p.default) for p in inspect.signature(read).parameters.values()] == [
        (p.name, p.kind, p.default) for p in parameters
    ]
    assert inspect.getdoc(read) == inspect.getdoc(given)
    assert summary_of(module, function) == (inspect.getdoc(given) or "").splitlines()[0]
