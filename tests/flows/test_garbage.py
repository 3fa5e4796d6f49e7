"""What gc keeps and what it removes: aliases, nights, running stages, young results, versions; a kill in between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.tracking import MlflowClient
from prefect.cache_policies import NO_CACHE
from prefect.flows import load_flow_from_entrypoint

from flows import garbage
from flows.cli.app import main
from flows.nights import Night, write_night
from flows.stage import STAGE_POLICY
from infra import leases, ray_sessions, storage
from infra.tracking import PACKAGE, connect
from tasks.records import Artifact
from tasks.register import retention
from tasks.register.consumer import addresses
from tasks.register.promotion import promote, rollback
from tests.support.reports import write_record

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's temporary folder is the test's own, so that nothing of this machine is removed."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))


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


def test_folders_of_ended_ray_sessions_go_after_the_hours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("session_1", "session_2", "session_3")
    for name in names:
        (tmp_path / "ray" / name / "logs").mkdir(parents=True)
    (tmp_path / "ray" / "session_latest").symlink_to("session_2")
    running, ended = ray_sessions.mark_session("session_1"), ray_sessions.mark_session("session_2")
    assert running is not None and ended is not None
    ended.close()
    gone = tmp_path / "trip-ray-0"
    for folder, stack in ((gone, tmp_path / "no stack"), (tmp_path / "trip-ray-1", tmp_path)):
        ray_sessions.mark_stack(folder, stack)

    def collect(hours: float, dry_run: bool = False) -> int:
        uri = f"sqlite:///{tmp_path}/mlflow.db"
        return garbage.collect(str(tmp_path / "root"), uri, 1, hours, dry_run)["removed"]

    with subprocess.Popen([sys.executable, "-c", "input()", str(gone)], stdin=subprocess.PIPE):
        assert collect(24) == 0 and collect(0, dry_run=True) == collect(0) == 1  # session_2
    assert collect(0) == 1 and not gone.exists()  # no process of the stack is left
    assert sorted(path.name for path in tmp_path.glob("*ray*/*")) == [*names[::2], "session_latest", "trip.stack"]
    running.close()


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


def register_version(client: MlflowClient, root: str, package: str, gate: str = "not passed") -> tuple[str, Path]:
    """A version of `trip` on a data set below the root; versions with the same package share it. Returns its folder."""
    experiment = client.get_experiment_by_name("trip") or client.get_experiment(client.create_experiment("trip"))
    ids = [experiment.experiment_id]
    existing = client.search_logged_models(ids, f"tags.`{PACKAGE}` = '{package}'")
    if existing:
        logged = existing[0]
    else:
        logged = client.create_logged_model(ids[0], "trip", tags={PACKAGE: package})
        with tempfile.TemporaryDirectory() as scratch:
            Path(scratch, "MLmodel").write_text(f"model_uuid: {logged.model_id}\nweights: {package}\n")
            client.log_model_artifacts(logged.model_id, scratch)
        client.finalize_logged_model(logged.model_id, "READY")
    tags = {
        PACKAGE: package,
        "lineage.data_uri": f"{root}/data/{'a' * 16}",
        "trip.gate": gate,
        "trip.consumer_check": "x",
    }
    uri = f"models:/{logged.model_id}"
    with addresses(client.tracking_uri):
        version = client.create_model_version("trip", uri, tags=tags, model_id=logged.model_id, await_creation_for=0)
    return str(version.version), Path(logged.artifact_location.removeprefix("file://"))


@pytest.fixture
def registry(tmp_path: Path) -> tuple[MlflowClient, str]:
    """A client of a registry in a SQLite file with the model `trip`, and its address."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = connect(uri)
    client.create_experiment("trip", artifact_location=str(tmp_path / "artifacts"))
    client.create_registered_model("trip")
    return client, uri


def numbers_of(client: MlflowClient) -> str:
    return " ".join(sorted((str(v.version) for v in client.search_model_versions("name = 'trip'")), key=int))


def test_versions_that_nothing_names_go_with_their_package(
    registry: tuple[MlflowClient, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client, uri = registry
    root = str(tmp_path / "root")
    (tmp_path / "root").mkdir()
    folders = {}
    for package in ("first", "second", "third", "shared", "shared", "night", "alias", "last"):
        number, folders[package] = register_version(client, root, package, gate="passed")
        if package in ("first", "second", "third"):
            promote(client, "trip", number)
    register_version(client, str(tmp_path / "another root"), "elsewhere")
    client.set_registered_model_alias("trip", "candidate", "7")
    write_night(root, Night("2026-11-28T03-00-00Z", "q", Artifact("", ""), "refused", 5, version="6"))
    client.create_registered_model("of another program")
    client.create_model_version("of another program", str(tmp_path), await_creation_for=0)

    command = ["gc", "--root", root, "--tracking-uri", uri, "--hours", "0", "--versions", "2"]
    assert main(command) == 0
    listed = capsys.readouterr().out
    for line in (
        "remove  version   models:/trip/1",
        "keep    version   models:/trip/2: the alias previous",
        "keep    version   models:/trip/3: the alias champion",
        "remove  version   models:/trip/4",
        "keep    version   models:/trip/6: a night",
        "keep    version   models:/trip/7: the alias candidate",
        "keep    version   models:/trip/8: one of the last 2 versions",
    ):
        assert line in listed, line
    assert "models:/trip/9" not in listed and "another program" not in listed
    assert numbers_of(client) == "1 2 3 4 5 6 7 8 9"

    assert main([*command, "--no-dry-run"]) == 0
    assert numbers_of(client) == "2 3 6 7 8 9"
    assert [name for name, folder in folders.items() if not any(folder.rglob("MLmodel"))] == ["first", "shared"]
    assert len(client.search_model_versions("name = 'trip-promotions'")) == 3
    assert client.search_model_versions("name = 'of another program'")
    # A registration of the same weights makes a package again, and one step back is possible.
    number, folder = register_version(client, root, "first")
    assert any(folder.rglob("MLmodel"))
    assert rollback(client, "trip").champion == "2"


def test_a_removed_version_leaves_a_package_that_another_version_has(
    registry: tuple[MlflowClient, str], tmp_path: Path
) -> None:
    client, uri = registry
    _, shared = register_version(client, str(tmp_path), "shared")
    for package in ("shared", "a"):
        register_version(client, str(tmp_path), package)
    client.set_registered_model_alias("trip", "champion", "2")
    garbage.collect(str(tmp_path), uri, 1, 0, dry_run=False, versions=1)
    assert numbers_of(client) == "2 3" and any(shared.rglob("MLmodel"))


def test_a_version_that_got_an_alias_meanwhile_stays_and_a_killed_removal_is_completed(
    registry: tuple[MlflowClient, str], tmp_path: Path
) -> None:
    client, uri = registry
    _, first = register_version(client, str(tmp_path), "a")
    for package in ("b", "c"):
        register_version(client, str(tmp_path), package)
    doomed = retention.registered_versions(client, str(tmp_path), 1, 0, [])[0]
    client.set_registered_model_alias("trip", "candidate", "1")
    assert not retention.remove_version(client, uri, doomed)
    client.delete_registered_model_alias("trip", "candidate")
    killed = (
        "import os; from tasks.register import retention; from infra.tracking import connect\n"
        f"client, folder = connect({uri!r}), {str(tmp_path)!r}\n"
        "retention._remove_package = lambda *_: os.kill(os.getpid(), 9)\n"
        "retention.remove_version(client, {uri!r}, retention.registered_versions(client, folder, 1, 0, [])[0])"
    ).replace("{uri!r}", repr(uri))
    subprocess.run([sys.executable, "-c", killed], cwd=REPOSITORY, check=False)
    assert numbers_of(client) == "2 3" and any(first.rglob("MLmodel"))
    garbage.collect(str(tmp_path), uri, 1, 24, dry_run=False, versions=1)
    assert numbers_of(client) == "2 3" and not any(first.rglob("MLmodel"))


@pytest.mark.slow
def test_the_package_of_a_version_goes_from_the_store_of_a_tracking_server(
    mlflow_server: Callable[[str], str], tmp_path: Path
) -> None:
    uri = mlflow_server(str(tmp_path / "artifacts"))
    client = connect(uri)
    client.create_registered_model("trip")
    for package in ("a", "b"):
        register_version(client, str(tmp_path), package)
    files = sorted((tmp_path / "artifacts").rglob("MLmodel"))
    garbage.collect(str(tmp_path), uri, 1, 0, dry_run=False, versions=1)
    assert numbers_of(client) == "2" and len(files) == 2
    assert [path.exists() for path in files].count(True) == 1


def test_no_flow_keeps_results_in_prefects_storage() -> None:
    """So there are none to remove: stages find their results by address."""
    from prefect.results import get_default_persist_setting

    assert not get_default_persist_setting()
    for deployment in yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())["deployments"]:
        flow: Any = load_flow_from_entrypoint(deployment["entrypoint"], use_placeholder_flow=False)
        assert not flow.persist_result and flow.result_storage is None, deployment["name"]
    assert "persist_result" not in STAGE_POLICY and STAGE_POLICY["cache_policy"] is NO_CACHE
