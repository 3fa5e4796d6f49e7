"""The examples as a stranger runs them: from another folder, with nothing but the registry."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import torch

from infra.settings import RAY, TELEMETRY_OFF
from infra.tracking import connect
from tasks.register.packaging import drawn_photo
from tasks.register.registry import RegisterSpec, register
from tasks.video.decode import read_clip
from tests.support.reports import write_record

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROMPT = "a red circle moving left"


@pytest.fixture(scope="module")
def home(tiny_model, tmp_path_factory) -> Path:
    """A folder as `make demo` leaves one: runs/demo/mlflow.db with a champion, and runs/demo/photo.png."""
    home = tmp_path_factory.mktemp("home")
    demo = home / "runs" / "demo"
    demo.mkdir(parents=True)
    write_record(demo)
    register(RegisterSpec(str(tiny_model), str(demo), registry(home), check_steps=1), lambda _: None)
    (demo / "photo.png").write_bytes(drawn_photo(48))
    return home


def registry(home: Path) -> str:
    return f"sqlite:///{home}/runs/demo/mlflow.db"


def command(home: Path, example: str, *arguments: str) -> dict:
    """How an example is started: nothing of this checkout is on its path."""
    foreign = ("MLFLOW_", "PYTHONPATH", "RAY_ADDRESS")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    environment |= {**TELEMETRY_OFF, **RAY, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    return {"args": [sys.executable, str(EXAMPLES / example), *arguments], "cwd": home, "env": environment}


def batch(home: Path, *arguments: str) -> subprocess.CompletedProcess:
    started = command(home, "batch.py", *arguments, "--tracking", "sqlite:///runs/demo/mlflow.db")
    return subprocess.run(**started, capture_output=True, text=True, timeout=300)


def write_table(folder: Path, rows: list[dict]) -> Path:
    """A table with a photo next to it."""
    folder.mkdir()
    (folder / "photo.png").write_bytes(drawn_photo(48))
    (folder / "photos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "photos.jsonl"


def results(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def videos(out: Path) -> dict[str, int]:
    """The name of each video, and the time it was written at."""
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.mp4")}


@pytest.mark.slow  # a process that imports torch and mlflow again
def test_the_quickstart_writes_a_playable_video_after_the_demo(home):
    done = subprocess.run(**command(home, "quickstart.py"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "16 frames of 32x32, seed 7" in done.stdout
    assert read_clip(home / "quickstart.mp4", 16, 4.0, 32).pixels.shape == (16, 32, 32, 3)


@pytest.mark.slow
def test_a_batch_makes_what_the_model_makes_and_names_what_it_cannot(home, tmp_path):
    good = {"photo": "photo.png", "prompt": PROMPT}
    rows = [
        {**good, "seed": 2**53 + 1},
        {**good, "photo": "absent.png"},
        {**good, "photo": "photos.jsonl"},
        {**good, "prompt": ""},
        {**good, "seed": "x"},
        good,
    ]
    table, out = write_table(tmp_path / "table", rows), tmp_path / "out"
    arguments = (str(table), str(out), "--param", "num_frames=3", "--seed", "5")
    done = batch(home, *arguments)
    assert done.returncode == 3, done.stderr
    assert "2 rows have a video, 4 failed" in done.stdout
    lines = results(out)
    assert [line["state"] for line in lines] == ["made", "failed", "failed", "failed", "failed", "made"]
    for line, words in zip(
        lines[1:5], ("absent.png", "not an image", "prompt of row 3 is ''", "seed of row 4 is 'x'"), strict=True
    ):
        assert words in line["error"]

    mlflow.set_tracking_uri(registry(home))
    mlflow.set_registry_uri(registry(home))
    model = mlflow.pyfunc.load_model("models:/trip/1")
    frame = pd.DataFrame({"image": [drawn_photo(48)], "prompt": [PROMPT]})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as a worker has: they decide a clip's last bits
    for line, seed in ((lines[0], 2**53 + 1), (lines[5], 5)):
        expected = model.predict(frame, params={"num_frames": 3, "seed": seed})["video"][0]
        assert Path(line["video"]).read_bytes() == expected
    torch.set_num_threads(threads)

    # A moved alias does not mix two models; the recorded version continues.
    client = connect(registry(home))
    other = client.create_model_version("trip", client.get_model_version("trip", "1").source, run_id="0123abcd")
    before = videos(out)
    try:
        client.set_registered_model_alias("trip", "champion", other.version)
        refused = batch(home, *arguments)
        assert refused.returncode == 1 and "continue with --model models:/trip/1" in refused.stderr
        (table.parent / "absent.png").write_bytes(drawn_photo(32))
        again = batch(home, *arguments, "--model", "models:/trip/1")
    finally:
        client.set_registered_model_alias("trip", "champion", "1")
    assert "6 rows, 4 videos to generate" in again.stdout and "3 rows have a video, 3 failed" in again.stdout
    assert {name: written for name, written in videos(out).items() if name in before} == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("absent.csv", "out"), "absent.csv"),
        (("runs/demo/photo.png", "out"), "expected .csv, .parquet or .jsonl"),
        (("bare.csv", "out"), "has no column 'prompt', only photo"),
        (("good.csv", "out", "--model", "models:/trip@nobody"), "nobody"),
        (("good.csv", "out", "--model", "trip"), "give models:/NAME@ALIAS or models:/NAME/VERSION"),
        (("good.csv", "out", "--param", "step=5"), "parameter 'step' is unknown, expected one of num_frames"),
        pytest.param(
            ("good.csv", "out", "--cpus", "1000"), "a worker needs 1000 processors", marks=pytest.mark.slow, id="cpus"
        ),
    ],
)
def test_a_batch_that_cannot_start_reports_the_reason_without_a_traceback(home, arguments, words, monkeypatch, capsys):
    import runpy

    import ray

    monkeypatch.chdir(home)
    for name, value in RAY.items():
        monkeypatch.setenv(name, value)
    (home / "bare.csv").write_text("photo\nruns/demo/photo.png\n")
    (home / "good.csv").write_text(f"photo,prompt\nruns/demo/photo.png,{PROMPT}\n")
    try:
        main = runpy.run_path(str(EXAMPLES / "batch.py"))["main"]
        assert main([*arguments, "--tracking", registry(home)]) == 1
    finally:
        ray.shutdown()
    assert words in capsys.readouterr().err
    assert not list(home.glob("out/*.mp4"))


@pytest.mark.slow
def test_a_batch_that_is_stopped_goes_on_where_it_was(home, tmp_path):
    rows = [{"photo": "photo.png", "prompt": PROMPT, "seed": seed} for seed in range(12)]
    table, out = write_table(tmp_path / "table", rows), tmp_path / "out"
    arguments = (str(table), str(out), "--param", "steps=12", "--workers", "2")
    tracking = ("--tracking", registry(home))
    before: dict[str, int] = {}
    for ending, status in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        started = subprocess.Popen(**command(home, "batch.py", *arguments, *tracking), start_new_session=True)
        while len(videos(out)) < len(before) + 3 and started.poll() is None:
            time.sleep(0.02)
        started.send_signal(ending)
        assert started.wait(60) == status
        assert ending == signal.SIGKILL or {line["state"] for line in results(out)} == {"made", "not yet"}
        time.sleep(3)  # Ray's own processes end when they miss their driver
        after = videos(out)
        assert len(before) + 3 <= len(after) < 12
        assert {name: after[name] for name in before} == before, "what was made is not made again"
        before = after
    done = batch(home, *arguments)
    assert done.returncode == 0, done.stderr
    assert f"12 rows, {12 - len(before)} videos to generate" in done.stdout
    after = videos(out)
    assert len(after) == 12 and {name: after[name] for name in before} == before
    assert {line["state"] for line in results(out)} == {"made"}
    assert not list(out.glob("*.tmp"))
    assert len({(out / name).read_bytes() for name in after}) == 12, "each seed has a clip of its own"
    assert "0 videos to generate" in batch(home, *arguments).stdout


@pytest.mark.slow
def test_a_batch_whose_machine_is_lost_makes_all_videos_on_the_other(home, tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    rows = [{"photo": "photo.png", "prompt": PROMPT, "seed": seed} for seed in range(8)]
    table, out = write_table(tmp_path / "table", rows), tmp_path / "out"
    for name, value in RAY.items():
        monkeypatch.setenv(name, value)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        victim, _ = (cluster.add_node(num_cpus=1) for _ in range(2))
        arguments = (str(table), str(out), "--param", "steps=12", "--workers", "2", "--ray", cluster.address)
        tracking = ("--tracking", registry(home))
        started = subprocess.Popen(**command(home, "batch.py", *arguments, *tracking), stdout=subprocess.PIPE)
        while len(videos(out)) < 2 and started.poll() is None:
            time.sleep(0.02)
        victim.all_processes["raylet"][0].process.kill()
        words = started.communicate(timeout=300)[0].decode()
    finally:
        cluster.shutdown()
    assert started.returncode == 0 and "8 rows have a video, 0 failed" in words
