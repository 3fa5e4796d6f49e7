"""Where the seconds go from the start of `train-trip` to its first training step: cold processes, warm files.

    python -m benchmarks.first_step [--workers 2] [--repeats 2] [--json benchmarks/results/first_step.json]

Trains one step of the demo's recipe on a data set of random latents, each time below a new root and in new processes;
the first run warms the file cache and is not shown. The parts add up: Python, the imports and the Prefect server; the
flow up to its training stage; Ray's session; from there to the first tick, of which `run_training` is the loop in its
worker, with loading and its first step. The goal is 25 s from the flow's start on two idle cores. Prints one JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import add_json, write_json
from flows.recipes import find_recipe
from infra import storage
from tasks.shards import PackedSample, encode_field, open_dataset, publish_dataset, write_shard

CLIPS = 64


def write_latents(uri: str) -> None:
    """Publishes a data set of random latents as the demo's recipe reads them."""
    model = find_recipe("demo").train.model
    rng, side = np.random.default_rng(0), model.size // 8
    caption = encode_field("caption", "a red circle moves to the left")

    def outcomes() -> Iterator[list[PackedSample]]:
        for row in range(CLIPS):
            latents = rng.standard_normal((model.num_frames, 4, side, side), np.float32).astype(np.float16)
            tokens = rng.integers(2, 100, 32).astype(np.int32)
            fields = {"latents": encode_field("latents", latents), "tokens": encode_field("tokens", tokens)}
            yield [PackedSample(f"clip{row:03d}_000", {"caption": caption} | fields)]

    open_dataset(uri, {})
    publish_dataset(uri, {}, "hash", {}, [write_shard(uri, 0, (0, CLIPS), outcomes(), "hash").summary()])


def trace(arguments: list[str]) -> None:
    """Runs the command in this process; the last line that it prints is the times of its parts, since 1970, as JSON."""
    times: dict[str, float] = {"command": time.time()}
    from flows.cli import app

    server = app.prefect_server

    @contextlib.contextmanager
    def timed_server(root: str, meanwhile: Callable[[], None]) -> Iterator[None]:
        def load() -> None:
            meanwhile()
            _time_parts(times)

        with server(root, load):
            times["flow"] = time.time()
            yield

    app.prefect_server = timed_server
    code = app.main(arguments)
    print(json.dumps(times))
    sys.exit(code)


def _time_parts(times: dict[str, float]) -> None:
    """Notes when the training stage, Ray's session and the first tick begin, and the seconds of the loop."""
    import infra.cluster
    import tasks.train.job

    session, train = infra.cluster.ray_session, tasks.train.job.train

    @contextlib.contextmanager
    def ray_session(*args: Any, **flags: Any) -> Iterator[None]:
        times["stage"] = time.time()
        with session(*args, **flags):
            times["session"] = time.time()
            yield

    def training(spec: Any, progress: Any, *rest: Any) -> Any:
        def first(values: dict[str, Any]) -> None:
            times.setdefault("tick", time.time())
            progress(values)

        report = train(spec, first, *rest)
        times["loop_seconds"] = report.seconds
        return report

    infra.cluster.ray_session = ray_session
    tasks.train.job.train = training


def measure(folder: Path, number: int, workers: int) -> dict[str, float]:
    """Seconds of each part of one run."""
    arguments = ["train-trip", "--root", str(folder / f"root{number}"), "--dataset", str(folder / "set")]
    values = {"steps": 1, "tick_every": 1, "workers": workers, "validation.every": 0}
    arguments += [word for name, value in values.items() for word in ("--set", f"train.{name}={value}")]
    begin = time.time()
    command = [sys.executable, "-c", f"from benchmarks.first_step import trace; trace({arguments!r})"]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    times = json.loads(output.splitlines()[-1])
    loop = times["loop_seconds"]
    return {
        "Python and imports of the command": times["command"] - begin,
        "Prefect server and imports of the flow": times["flow"] - times["command"],
        "the flow, up to the training stage": times["stage"] - times["flow"],
        "Ray's session": times["session"] - times["stage"],
        "Ray Train: controller, workers, process group": times["tick"] - times["session"] - loop,
        "the loop, with one step and a checkpoint": loop,
        "from the flow's start to the first step": times["tick"] - times["flow"],
    }


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """The median of each part."""
    with tempfile.TemporaryDirectory(prefix="trip-first-step-") as name:
        folder = Path(name)
        write_latents(storage.absolute(str(folder / "set")))
        measure(folder, 0, arguments.workers)
        runs = [measure(folder, number, arguments.workers) for number in range(1, arguments.repeats + 1)]
    medians = {part: statistics.median(run[part] for run in runs) for part in runs[0]}
    return {"workers": arguments.workers, "load": os.getloadavg()[0], "seconds": medians}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    add_json(parser)
    chosen = parser.parse_args()
    write_json("first_step", main(chosen), chosen.json)
