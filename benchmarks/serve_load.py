"""Sends valid and invalid requests to the service while the alias moves and a replica is killed; prints JSON.

    python -m benchmarks.serve_load runs/demo/train/.../model --requests 200 --clients 16

It registers the model twice (the second with another guidance), starts `python -m flows serve` on loopback, and
compares every clip, frame by frame, with the pipeline's for the same photo, prompt, seed and version.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cyclopts
import httpx
import numpy as np
import psutil
from PIL import Image

from infra import storage
from infra.settings import CHECKOUT
from infra.tracking import connect
from tasks.evaluation_record import REPORT_FILE, EvaluationRecord, Gate
from tasks.records import to_json
from tasks.register.packaging import drawn_photo
from tasks.register.registry import CHAMPION, RegisterSpec, register
from trip_model.folders import RECORD
from trip_model.pipeline import TripPipeline

NAME = "trip"
PROMPT = "a red circle moving right slowly"
SEEDS = 6  # of the valid requests; few, because the pipeline computes each clip for the comparison
START_SECONDS = 300
INVALID: list[tuple[dict[str, Any], int]] = [
    ({"steps": -1}, 422),
    ({"image": "bm8gaW1hZ2U="}, 400),
    ({"prompt": "word " * 10_000}, 422),
    ({"strength": 3}, 422),
    ({"image": "A" * (24 * 2**20)}, 413),
]


@dataclass
class Service:
    """A running `flows serve`: its process, its address, its registry, and the model folder of each version."""

    process: subprocess.Popen[bytes]
    url: str
    registry: str
    folders: dict[str, Path]

    def replicas(self) -> list[psutil.Process]:
        return [p for p in psutil.Process(self.process.pid).children(True) if "ServeReplica" in _title(p)]

    def memory_mb(self) -> dict[int, float]:
        """Resident memory of the gateway and of each replica."""
        processes = [psutil.Process(self.process.pid), *self.replicas()]
        return {p.pid: round(p.memory_info().rss / 2**20, 1) for p in processes}

    def point(self, version: str) -> None:
        connect(self.registry).set_registered_model_alias(NAME, CHAMPION, version)


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


@contextlib.contextmanager
def service(model: Path, *flags: str) -> Iterator[Service]:
    """Registers a model and a variant of it in a new registry, and serves version 1."""
    with tempfile.TemporaryDirectory(prefix="trip-load-", ignore_cleanup_errors=True) as scratch:
        home = Path(scratch)
        variant = home / "variant"
        shutil.copytree(model, variant)
        about = json.loads((variant / RECORD).read_text())
        about["config"]["guidance"] += 2.0
        (variant / RECORD).write_text(json.dumps(about))
        _write_passed_report(home)
        registry = f"sqlite:///{home}/mlflow.db"
        folders = {}
        for folder in (model, variant):
            spec = RegisterSpec(str(folder), str(home), registry, NAME, check_steps=1)
            folders[register(spec, lambda _: None).version] = folder
        connect(registry).set_registered_model_alias(NAME, CHAMPION, "1")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "flows", "serve", "--name", NAME, "--tracking-uri", registry]
        # The number of threads changes the last bits of a clip: one here and one in each replica.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([*command, "--port", str(port), *flags], cwd=CHECKOUT, env=environment)
        try:
            running = Service(process, f"http://127.0.0.1:{port}", registry, folders)
            _wait_until_ready(running)
            yield running
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _write_passed_report(folder: Path) -> None:
    """Writes the record of an evaluation that passed its gate, without results."""
    maps = ("rows", "differences", "floors", "infinity", "curves", "counts", "provenance", "best")
    values: dict[str, Any] = {name: {} for name in maps} | dict.fromkeys(("files", "samples"), ())
    record = EvaluationRecord(key="load", gate=Gate(True, ()), notes=[], clips=0, items=0, generations="", **values)
    storage.write_json(str(folder / REPORT_FILE), to_json(record))


def _wait_until_ready(running: Service) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and running.process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{running.url}/readyz", timeout=10).status_code == 200:
                return
        time.sleep(0.2)
    raise RuntimeError(f"the service was not ready within {START_SECONDS} s (exit code {running.process.poll()})")


@dataclass
class Tally:
    """The results of the requests."""

    answers: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    versions: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def problem(self, kind: str, text: str) -> None:
        self.answers[kind] += 1
        self.problems.append(text[:300])


def load(running: Service, requests: int, clients: int, num_frames: int, steps: int) -> dict[str, Any]:
    """Sends the requests; after a third of them the alias moves, after a half a replica is killed with signal 9."""
    photo = drawn_photo(48)
    valid = {
        "image": base64.b64encode(photo).decode(), "prompt": PROMPT, "format": "frames",
        "num_frames": num_frames, "steps": steps,
    }  # fmt: skip

    @functools.cache
    def expected(version: str, seed: int) -> np.ndarray:
        pipe = _pipeline(running.folders[version])
        return pipe.generate([photo], [PROMPT], [seed], num_frames=num_frames, steps=steps)[0]

    for version in running.folders:
        for seed in range(SEEDS):
            expected(version, seed)
    tally = Tally()
    events: dict[int, Callable[[], Any]] = {
        requests // 3: lambda: running.point("2"),
        requests // 2: lambda: running.replicas()[0].kill(),
    }
    memory = {"start": running.memory_mb()}
    draw = random.Random(0)
    plan = [
        (number, draw.choice(INVALID) if draw.random() < 0.25 else None, draw.randrange(SEEDS))
        for number in range(requests)
    ]

    def send(item: tuple[int, tuple[dict[str, Any], int] | None, int]) -> None:
        number, invalid, seed = item
        if number in events:
            events[number]()
        if number == requests // 4:
            memory["warm"] = running.memory_mb()
        start = time.monotonic()
        try:
            values = {**valid, "seed": seed, **(invalid[0] if invalid else {})}
            answer = client.post(f"{running.url}/v1/animate", json=values)
        except httpx.HTTPError as error:
            tally.problem("lost", f"request {number}: {error!r}")
            return
        if invalid is not None:
            right = answer.status_code == invalid[1] and answer.json()["error"]["message"]
            tally.answers.update(["invalid, refused"]) if right else tally.problem(
                "invalid, wrong response", answer.text
            )
        elif answer.status_code == 429:
            tally.answers["valid, refused with 429"] += 1
            time.sleep(int(answer.headers["retry-after"]))  # before the next request of this client
        elif answer.status_code != 200:
            tally.problem("lost", f"request {number}: {answer.status_code} {answer.text}")
        else:
            version = answer.headers["x-model-version"]
            same = np.array_equal(_frames(answer.content), expected(version, int(answer.headers["x-seed"])))
            tally.seconds.append(time.monotonic() - start)
            tally.versions[version] += 1
            tally.answers.update(["valid, right"]) if same else tally.problem(
                "wrong", f"request {number}: other frames"
            )

    with httpx.Client(timeout=300, limits=httpx.Limits(max_connections=clients)) as client:
        start = time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(send, plan))
        wall = time.monotonic() - start
        retries = next(
            float(line.split()[1])
            for line in client.get(f"{running.url}/metrics").text.splitlines()
            if line.startswith("trip_request_retries_total ")
        )
    memory["end"] = running.memory_mb()
    return {
        "requests": requests,
        "clients": clients,
        "answers": dict(tally.answers),
        "versions": dict(tally.versions),
        "retries": retries,
        "problems": tally.problems,
        "wall_seconds": round(wall, 1),
        "median_seconds": round(float(np.median(tally.seconds)), 2),
        "longest_seconds": round(max(tally.seconds), 2),
        "memory_mb": memory,
        "drained": drained(running, valid),
    }


def drained(running: Service, valid: dict[str, Any]) -> bool:
    """Whether a request in flight at SIGTERM is completed, and the service then exits with 0."""
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(httpx.post, f"{running.url}/v1/animate", json={**valid, "steps": 40}, timeout=120)
        time.sleep(0.5)
        running.process.send_signal(signal.SIGTERM)
        answered = request.result().status_code == 200
    return answered and running.process.wait(60) == 0


@functools.cache
def _pipeline(folder: Path) -> TripPipeline:
    return TripPipeline.from_pretrained(folder)


def _frames(archive: bytes) -> np.ndarray:
    with zipfile.ZipFile(io.BytesIO(archive)) as packed:
        return np.stack([np.asarray(Image.open(io.BytesIO(packed.read(name)))) for name in sorted(packed.namelist())])


def main(
    model: Path,
    requests: int = 200,
    clients: int = 16,
    replicas: int = 2,
    max_queue: int = 8,
    num_frames: int = 4,
    steps: int = 4,
    output: Path | None = None,
) -> None:
    """Run the load and print the result as JSON.

    Args:
        model: an exported model folder.
        requests: number of requests; a quarter of them are invalid.
        clients: number of concurrent clients.
        replicas: processes with the model, one processor each.
        max_queue: requests that may wait at each replica.
        num_frames: frames of a clip.
        steps: DDIM steps of a clip.
        output: file for the result, in addition to the console.
    """
    import torch

    torch.set_num_threads(1)
    flags = ("--replicas", str(replicas), "--cpus", "1", "--max-queue", str(max_queue), "--no-page")
    with service(model.resolve(), *flags) as running:
        result = json.dumps(load(running, requests, clients, num_frames, steps), indent=2)
    print(result)
    if output is not None:
        output.write_text(result + "\n")


if __name__ == "__main__":
    cyclopts.run(main)
