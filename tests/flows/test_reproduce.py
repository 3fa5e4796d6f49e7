"""The complete path as a user runs it: one command, the same command again, and the same command after a kill."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import psutil
import pytest
from mlflow.tracking import MlflowClient

from infra.settings import code_version
from tasks.shards import ShardDataset
from tasks.video.decode import read_clip
from tests.support.hashes import model_hashes, recording
from trip_model.folders import folder_hash
from trip_model.images import load_image

TINY = Path(__file__).resolve().parents[1] / "support" / "tiny_cli.py"


def command(base: Path, root: Path, *flags: str) -> list[str]:
    return [sys.executable, str(TINY), str(base), "reproduce", "--recipe", "tiny", "--root", str(root), *flags]


def environment() -> dict[str, str]:
    """This process's, without a server of somebody else's, and one thread per process."""
    left_out = ("PREFECT_", "RAY_", "MLFLOW_")
    return {k: v for k, v in os.environ.items() if not k.startswith(left_out)} | {
        "OMP_NUM_THREADS": "1",
        "RAY_worker_niceness": "0",
    }


def run(base: Path, root: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    arguments, variables = command(base, root, *flags), environment() | variables
    return subprocess.run(arguments, capture_output=True, text=True, timeout=900, env=variables)


def only(folder: Path) -> Path:
    """The one folder in a folder: content addresses leave no doubt about which run a result belongs to."""
    found = [path for path in folder.iterdir() if path.is_dir()]
    assert len(found) == 1, found
    return found[0]


def state(root: Path) -> dict[str, object]:
    """What a run comes to: the samples, the model and the scores."""
    data = ShardDataset(str(only(root / "data")))
    report = json.loads((only(root / "evaluate") / "report.json").read_text())
    training = json.loads((only(root / "train") / "report.json").read_text())
    return {
        "samples": sorted(data.keys),
        "manifest": data.manifest_sha256,
        "step": training["step"],
        "unet": folder_hash(root / "model", "unet"),
        "fusion": folder_hash(root / "model", "fusion"),
        "rows": report["rows"],
    }


@pytest.fixture(scope="module")
def done(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A root where the tiny recipe has run, and what the command printed."""
    root = tmp_path_factory.mktemp("road") / "run"
    finished = run(tiny_base, root, **recording(root.with_name("hashes")))
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    return root, finished.stdout


def test_one_command_leads_from_clips_to_a_moving_photo(done: tuple[Path, str]) -> None:
    root, output = done
    assert len(set(ShardDataset(str(only(root / "data"))).keys)) == 12
    photo = load_image(root / "photo.png", 32)
    clip = read_clip((root / "animation.mp4").read_bytes(), 16, 4.0, 32)
    assert clip.pixels.shape == (16, 32, 32, 3)
    assert abs(clip.pixels[0].astype(int) - photo).mean() < 12  # the first frame is the photo, but for the codec
    assert (root / "animation.gif").read_bytes().startswith(b"GIF8")
    assert (root / "model" / "trip.json").is_file()
    last = output[output.index("Done.") :]
    for place in (root / "animation.mp4", root / "model", only(root / "evaluate") / "report.html"):
        assert str(place) in last
    assert "mlflow" in last.lower() and f"sqlite:///{root}/mlflow.db" in last


def test_every_stage_shows_progress(done: tuple[Path, str]) -> None:
    _, output = done
    for stage in ("corpus", "prepare", "train", "base", "generate", "judge", "register", "animate"):
        assert any(line.startswith(stage) for line in output.splitlines()), f"no line of {stage}"
    assert "Traceback" not in output


def test_a_run_hashes_its_model_at_the_export_and_at_the_registration(done: tuple[Path, str], tiny_base: Path) -> None:
    root, _ = done
    exported, registered = model_hashes(root.with_name("hashes"), tiny_base)
    assert "trip-export-" in exported and Path(registered).is_relative_to(only(root / "train"))


def test_the_runs_of_mlflow_and_prefect_name_each_other(done: tuple[Path, str]) -> None:
    root, _ = done
    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert {run.data.tags.get("trip.stage") for run in runs} == {"train", "register"}
    with contextlib.closing(sqlite3.connect(root / ".prefect" / "prefect.db")) as database:
        flow_runs = {str(UUID(row[0])) for row in database.execute("select id from flow_run")}
        artifacts = dict(database.execute("select key, data from artifact"))
    for run in runs:
        assert run.data.tags["prefect.flow_run_id"] in flow_runs
        assert run.data.tags["trip.code_version"] == code_version()
    (version,) = client.search_model_versions("name = 'trip'")
    assert version.tags["prefect.flow_run_id"] in flow_runs
    assert artifacts.keys() >= {"prepare-result", "train-result", "evaluate-result", "register-result"}
    assert next(r.info.run_id for r in runs if r.data.tags["trip.stage"] == "train") in artifacts["train-result"]


def running(root: Path) -> bool:
    """Whether MLflow has a run that is running, read without MLflow, which would create its tables."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{root}/mlflow.db?mode=ro", uri=True)) as database:
            return bool(database.execute("select 1 from runs where status = 'RUNNING'").fetchall())
    except sqlite3.Error:
        return False


@pytest.mark.slow
def test_sigterm_ends_a_training_in_order(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_STEPS", "2000")
    root, log = tmp_path / "run", tmp_path / "log"
    with started(tiny_base, root, log) as process:
        deadline = time.monotonic() + 600
        while len(list(root.glob("train/*/checkpoints/*"))) < 3 or not running(root):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.05)
        process.terminate()
        assert process.wait(timeout=120) == 143
    text = log.read_text()
    assert text.rstrip().endswith("terminated; the same command continues")
    assert "SIGTERM received" not in text and "Traceback" not in text
    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    (training,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert training.info.status == "KILLED"


def test_the_same_command_again_makes_nothing_twice(done: tuple[Path, str], tiny_base: Path, tmp_path: Path) -> None:
    root, _ = done
    before = state(root)
    weights = {path: path.stat().st_mtime_ns for path in (root / "train").rglob("*.safetensors")}
    again = run(tiny_base, root, **recording(tmp_path / "hashes"))
    assert again.returncode == 0, again.stderr[-3000:]
    assert len(model_hashes(tmp_path / "hashes", tiny_base)) <= 1  # the registration's check of the folder
    assert state(root) == before
    assert {path: path.stat().st_mtime_ns for path in (root / "train").rglob("*.safetensors")} == weights
    assert "version 1" in again.stdout


@pytest.mark.slow
def test_a_missing_table_is_one_sentence(done: tuple[Path, str], tiny_base: Path) -> None:
    root, _ = done
    refused = run(tiny_base, root, "--source", str(root / "nowhere.csv"))
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ") and "nowhere.csv" in refused.stderr
    assert refused.stderr.count("\n") == 1 and "Traceback" not in refused.stdout + refused.stderr


@pytest.mark.slow
def test_what_a_protocol_lacks_is_known_before_the_training(
    done: tuple[Path, str], tiny_base: Path, tmp_path: Path
) -> None:
    clips = str(next((done[0] / "corpus").rglob("*.csv")))
    (tmp_path / "many.toml").write_text('title = "more clips than there are"\nnumber = 99\n')
    asked = ["--held-out-source", clips, "--protocol", str(tmp_path / "many.toml")]
    refused = run(tiny_base, tmp_path / "run", *asked)
    assert refused.returncode == 2, refused.stderr[-3000:]
    assert refused.stderr.startswith("error: protocol many asks for 99 clips") and refused.stderr.count("\n") == 1
    assert not (tmp_path / "run" / "train").exists()


@contextlib.contextmanager
def started(base: Path, root: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with open(log, "ab") as out:
        process = subprocess.Popen(command(base, root), stdout=out, stderr=out, env=environment())
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("word", ["corpus", "prepare ", "train ", "base ", "generate", "register"])
def test_a_killed_run_continues_to_the_same_result(
    word: str, done: tuple[Path, str], tiny_base: Path, tmp_path: Path
) -> None:
    undisturbed, _ = done
    root, log = tmp_path / "run", tmp_path / "log"
    with started(tiny_base, root, log) as process:
        deadline = time.monotonic() + 600
        while f"\n{word}" not in "\n" + log.read_text(errors="replace"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.05)
        offspring = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
    _, left = psutil.wait_procs(offspring, timeout=90)  # Ray's agents notice after half a minute
    assert not left, f"still there after the kill: {[p.cmdline() for p in left]}"
    finished = run(tiny_base, root)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert state(root) == state(undisturbed)
