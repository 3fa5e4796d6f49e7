"""The service on Ray Serve: nothing lost or wrong through a move and a kill; the frames of `mlflow models serve`."""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from benchmarks.serve_load import PROMPT, load, service
from tasks.register.packaging import drawn_photo
from trip_model.video import read_clip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def running(tiny_model):
    """Two replicas of two versions; as many threads here as a replica has, since they decide a clip's last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with service(tiny_model, "--replicas", "2", "--cpus", "1", "--max-queue", "16", "--no-page") as running:
        yield running
    torch.set_num_threads(before)


@contextlib.contextmanager
def mlflow_server(registry: str, version: str):
    """The address of `mlflow models serve`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/trip/{version}", "-p", str(port)]
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": registry,
        "MLFLOW_REGISTRY_URI": registry,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # it starts `uvicorn` by its name
    }
    process = subprocess.Popen([*command, "--env-manager", "local"], env=environment, start_new_session=True)
    try:
        for _ in range(600):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/ping").status_code == 200:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


def test_the_frames_are_those_of_mlflow_models_serve(running):
    photo = base64.b64encode(drawn_photo(48)).decode()
    numbers = {"seed": 11, "steps": 5, "num_frames": 6, "guidance": 2.0, "fps": 8.0, "format": "mp4"}
    ours = httpx.post(f"{running.url}/v1/animate", json={"image": photo, "prompt": PROMPT, **numbers}, timeout=120)
    rows = {"columns": ["image", "prompt"], "data": [[photo, PROMPT]]}
    with mlflow_server(running.registry, "1") as server:
        theirs = httpx.post(f"{server}/invocations", json={"dataframe_split": rows, "params": numbers}, timeout=120)
    video = base64.b64decode(theirs.json()["predictions"][0]["video"])
    assert ours.headers["x-model-version"] == "1"
    frames = [read_clip(source, 6, 8, 32).pixels for source in (ours.content, video)]
    np.testing.assert_array_equal(*frames)


def test_an_alias_move_and_a_killed_replica_lose_nothing_and_sigterm_finishes_what_is_under_way(running):
    result = load(running, requests=60, clients=8, num_frames=4, steps=4)
    assert result["oddities"] == []
    assert set(result["answers"]) <= {"good, right", "good, refused with 429", "bad, refused as due"}
    assert set(result["versions"]) == {"1", "2"}
    assert result["drained"]
