"""What gc keeps and what it removes: aliases, nights, running stages and young results; a kill in between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from flows import garbage
from flows.cli.app import main
from flows.nights import Night, write_night
from infra import leases, storage
from infra.tracking import connect
from tasks.records import Artifact
from tests.support.reports import write_record

REPOSITORY = Path(__file__).resolve().parents[2]


def training(root: str, name: str, model: str = "", finished: bool = True) -> str:
    """A training's folder with a report; `name` is a hexadecimal digit."""
    folder = storage.join(root, "train", name * 16)
    storage.write_bytes(storage.join(folder, "model", "unet.safetensors"), b"weights")
    if finished:
        report = {"output": folder, "model": storage.join(folder, "model"), "step": 1, "samples_seen": 1}
        report |= {"loss_first": 1.0, "loss_last": 1.0, "seconds": 1.0, "model_digest": model, "spec_digest": "s"}
        storage.write_json(storage.join(folder, "report.json"), report)
    return folder


def evaluation(root: str, name: str, champion: str | None = None) -> str:
    folders = {"folders": {"champion": champion}} if champion else {}
    return write_record(storage.join(root, "evaluate", name * 16), provenance={"model_sha256": name} | folders)


def alias_champion(root: Path, tags: dict[str, str]) -> str:
    uri = f"sqlite:///{root}/mlflow.db"
    client: MlflowClient = connect(uri)
    client.create_registered_model("trip")
    client.create_model_version("trip", str(root), tags=tags, await_creation_for=0)
    client.set_registered_model_alias("trip", "champion", "1")
    return uri


def names(root: str) -> dict[str, str]:
    """The first digit of each result that is there, by stage."""
    stages = {stage: storage.list_dir(storage.join(root, stage)) for stage in garbage.MARKS}
    return {stage: "".join(name[0] for name in found if len(name) == 16) for stage, found in stages.items()}


def test_only_what_nothing_in_use_refers_to_is_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(tmp_path)
    training(root, "a", model="sha of the champion")
    training(root, "b")
    training(root, "c")
    training(root, "d", finished=False)
    kept = evaluation(root, "a", champion=evaluation(root, "b"))
    evaluation(root, "c")
    night = Night("2026-11-28T03-00-00Z", "q", Artifact(f"{root}/data/{'a' * 16}", "m"), "trained", 5, report=kept)
    write_night(root, night)
    alias_champion(tmp_path, {"trip.judged_model": "sha of the champion"})

    command = ["gc", "--root", root, "--hours", "0"]
    with leases.lease(storage.join(root, "train", "b" * 16)):
        assert main(command) == 0
        listed = capsys.readouterr().out
        assert "2 removed" not in listed and "3 would be removed" in listed
        assert names(root) == {"data": "", "train": "abcd", "evaluate": "abc"}
        assert main([*command, "--no-dry-run"]) == 0
    assert names(root) == {"data": "", "train": "ab", "evaluate": "ab"}
    printed = capsys.readouterr().out
    for line in (
        f"keep    train     {root}/train/{'a' * 16}: models:/trip@champion",
        f"keep    train     {root}/train/{'b' * 16}: a running stage",
        f"keep    evaluate  {root}/evaluate/{'b' * 16}: {root}/evaluate/{'a' * 16}, which is compared with it",
    ):
        assert line in printed
    assert main(["gc", "--root", root, "--no-dry-run"]) == 0
    assert names(root)["train"] == "ab" and "hours ago" in capsys.readouterr().out


def test_shards_that_no_data_set_names_go_unless_a_prepare_may_need_them(tmp_path: Path) -> None:
    root = str(tmp_path)
    tar = storage.join(root, "shards", "recipe", f"shard-{'1' * 16}-{'2' * 16}.tar")
    index = tar.replace(".tar", ".json")
    for address in (tar, index):
        storage.write_bytes(address, b"x")
    dataset = storage.join(root, "data", "a" * 16)
    storage.write_bytes(storage.join(dataset, "recipe.json"), b"{}")

    def collect(hours: float, dry_run: bool = False) -> bool:
        """Whether the shard is there afterwards."""
        garbage.collect(root, f"sqlite:///{tmp_path}/mlflow.db", 1, hours, dry_run)
        assert storage.exists(tar) == storage.exists(index)
        return storage.exists(tar)

    with leases.lease(dataset):
        assert collect(0)  # a prepare is running
    assert collect(24) and collect(0, dry_run=True)
    assert not collect(0)


def test_a_registry_that_does_not_answer_removes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training(str(tmp_path), "a")
    gone = ["--tracking-uri", "http://127.0.0.1:9"]
    assert main(["gc", "--root", str(tmp_path), "--hours", "0", "--no-dry-run", *gone]) == 2
    assert "nothing was removed" in capsys.readouterr().err and names(str(tmp_path))["train"] == "a"


def test_on_an_object_store_the_mark_of_completion_goes_first(s3_folder: str, tmp_path: Path) -> None:
    folder = training(s3_folder, "a")
    (result,) = garbage.results(s3_folder, f"sqlite:///{tmp_path}/mlflow.db", 1, 0)
    assert result.address == folder and 0 <= result.age_hours < 0.1
    storage.delete(storage.join(folder, "report.json"))  # as far as a killed removal came
    (result,) = garbage.results(s3_folder, f"sqlite:///{tmp_path}/mlflow.db", 1, 0)
    garbage.remove(result)
    assert not storage.exists(folder) and garbage.results(s3_folder, f"sqlite:///{tmp_path}/mlflow.db", 1, 0) == []


@pytest.mark.slow
def test_a_removal_that_was_killed_is_completed(tmp_path: Path) -> None:
    folder = Path(training(str(tmp_path), "a"))
    for number in range(3000):
        (folder / f"{number}.bin").write_bytes(b"x")
    code = f"from flows.cli.app import main; main(['gc', '--root', {str(tmp_path)!r}, '--hours', '0', '--no-dry-run'])"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment) as process:
        while folder.exists():
            assert process.poll() is None
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
    # Nothing of it looks like a result, whether files are left or not.
    assert names(str(tmp_path))["train"] == ""
    counts = garbage.collect(str(tmp_path), f"sqlite:///{tmp_path}/mlflow.db", 1, 0, dry_run=False)
    assert counts == {"kept": 0, "removed": 0}
    assert [path.name for path in (tmp_path / "train").iterdir()] == [f"{'a' * 16}.lease-000001"]
