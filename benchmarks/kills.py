"""Kills prepare's driver, a worker or the raylet at random moments and holds what the same command makes of it against
the bytes of an undisturbed run: issue 3, second bar.

    python -m benchmarks.kills [--moments 20] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from infra.settings import CHECKOUT
from tasks.encode.job import PrepareSpec, prepare
from tasks.ingest.demo import write_demo_corpus
from tasks.ingest.sources import SourceSpec
from tasks.records import from_json, to_json

VICTIMS = ("driver", "worker", "raylet")
_MARKS = {"worker": "ray::EncodeWorker", "raylet": "raylet/raylet "}
_PATIENCE_SECONDS = 300.0  # for a command that has lost something to end by itself
_GRACE_SECONDS = 30.0  # for Ray's processes to follow their driver


def make_spec(folder: Path, base: str, clips: int = 24, size: int = 64) -> PrepareSpec:
    """A job of many small shards, so that most moments lie between two writes of it."""
    table = write_demo_corpus(folder / "corpus", clips, size)
    return PrepareSpec(SourceSpec(table), str(folder / "calm"), base, size=size, clips_per_shard=2, workers=2)


def calm_run(spec: PrepareSpec) -> dict[str, float]:
    """The undisturbed run. Returns how many seconds each victim lived."""
    process = _start(spec)
    born: dict[str, float] = {}
    while process.poll() is None:
        for victim in VICTIMS:
            if victim not in born and _find(process, victim) is not None:
                born[victim] = time.monotonic()
        time.sleep(0.1)
    assert process.returncode == 0, f"the undisturbed run ended with {process.returncode}"
    return {victim: time.monotonic() - when for victim, when in born.items()}


def killed_run(spec: PrepareSpec, victim: str, after_seconds: float) -> dict[str, Any]:
    """One run whose victim is killed so long after it appeared, then the same command until it succeeds.

    Returns what happened; `identical` says whether the data set has the bytes of `calm` beside it.
    """
    spec = replace(spec, output=f"{spec.output}-{victim}-{after_seconds:.2f}")
    process = _start(spec)
    target = _wait(lambda: _find(process, victim) if process.poll() is None else process)
    time.sleep(after_seconds)
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    hit = isinstance(target, psutil.Process) and target.is_running() and process.poll() is None
    if hit:
        target.kill()
    began = time.monotonic()
    try:
        status: int | None = process.wait(_PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        status = None
        process.kill()
        process.wait()
    seconds = time.monotonic() - began
    _, left = psutil.wait_procs(family, _GRACE_SECONDS)
    for orphan in left:
        orphan.kill()
    reruns = 0
    while status != 0 and reruns < 3:
        reruns, status = reruns + 1, _start(spec).wait()
    return {
        "victim": victim,
        "after_seconds": round(after_seconds, 2),
        "hit": hit,
        "ended_after_seconds": round(seconds, 1),
        "processes_left": len(left),
        "reruns": reruns,
        "status": status,
        "identical": status == 0 and contents(spec) == contents(replace(spec, output=_calm(spec))),
    }


def contents(spec: PrepareSpec) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(spec.output).iterdir()}


def _calm(spec: PrepareSpec) -> str:
    return str(Path(spec.output).parent / "calm")


def _start(spec: PrepareSpec) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.kills", "--drive", json.dumps(to_json(spec))]
    return subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _find(process: subprocess.Popen[bytes], victim: str) -> psutil.Process | None:
    """The victim among the processes of a run, if it lives."""
    try:
        driver = psutil.Process(process.pid)
        if victim == "driver":
            return driver
        return next(
            (child for child in driver.children(recursive=True) if _MARKS[victim] in " ".join(child.cmdline()) + " "),
            None,
        )
    except psutil.Error:
        return None


def _wait(found: Callable[[], Any]) -> Any:
    until = time.monotonic() + _PATIENCE_SECONDS
    while (value := found()) is None:
        assert time.monotonic() < until, "nothing to kill came up"
        time.sleep(0.05)
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drive", help="the JSON of a spec: run it, and nothing else")
    given = parser.parse_args()
    if given.drive:
        prepare(from_json(PrepareSpec, json.loads(given.drive)))
        return
    rng = random.Random(given.seed)
    with tempfile.TemporaryDirectory(prefix="trip-kills-") as name:
        spec = make_spec(Path(name), str(CHECKOUT / "examples" / "demo_base" / "weights"))
        lives = calm_run(spec)
        print(json.dumps({"calm": {victim: round(seconds, 1) for victim, seconds in lives.items()}}), flush=True)
        for moment in range(given.moments):
            victim = VICTIMS[moment % len(VICTIMS)]
            told = killed_run(spec, victim, rng.uniform(0, lives[victim]))
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
