"""Measures how long the command line takes to answer: `--help`, `recipes`, and `NAME --help` of every command.

    python -m benchmarks.startup
    python -m benchmarks.startup --reproduce runs/demo

Each command runs `REPEATS` times as a process of its own after one run that warms the file cache; the table has the
median wall time and the heavy packages that were imported. The goal is below 1 s for each on two idle cores.

`--reproduce ROOT` instead runs `reproduce` on a root where it has finished, so that it only checks what is there, and
prints the seconds of each part of the second of two runs. The goal is at most 12 s in total on two idle cores.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from flows.cli import app
from flows.cli.app import COMMANDS, FLOWS
from flows.cli.session import prefect_server

REPEATS = 5
# Functions of flows.reproduce: the tasks of the flow.
STAGES = ("prepare_stage", "train_stage", "evaluate_stage", "register_stage", "animate_photo")
HEAVY = ("torch", "diffusers", "transformers", "ray", "prefect", "mlflow", "av", "open_clip")
PROBE = """
import sys
from flows.cli.app import main
try:
    code = main(sys.argv[1:])
except SystemExit as ended:
    code = ended.code
print(*(name for name in {heavy!r} if name in sys.modules), file=sys.stderr)
sys.exit(code)
"""


def measure(arguments: list[str]) -> tuple[float, str]:
    """Median wall seconds of `python -m flows ARGUMENTS`, and the heavy packages that it imports."""
    probe = [sys.executable, "-c", PROBE.format(heavy=HEAVY), *arguments]
    done = subprocess.run(probe, capture_output=True, text=True, check=True)
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "flows", *arguments], capture_output=True, check=True)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""


def trace(arguments: list[str]) -> None:
    """Runs a `reproduce` command in this process; the last line that it prints is the seconds of its parts as JSON."""
    seconds: dict[str, float] = {"begin": time.time()}

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **flags: Any) -> Any:
            with measured(part):
                return function(*args, **flags)

        return call

    @contextlib.contextmanager
    def measured(part: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - begin

    @contextlib.contextmanager
    def server(root: str, meanwhile: Callable[[], None]) -> Iterator[None]:
        def load() -> None:
            meanwhile()
            flow = importlib.import_module("flows.reproduce")
            for name in STAGES:
                setattr(flow, name, timed(name, getattr(flow, name)))

        running = contextlib.ExitStack()
        with measured("server"):
            running.enter_context(prefect_server(root, timed("imports", load)))
        with measured("flow"):
            yield
        with measured("end of the server"):
            running.close()

    app.prefect_server = server
    code = app.main(arguments)
    print(json.dumps(seconds | {"end": time.time()}))
    sys.exit(code)


def reproduce_parts(root: str, recipe: str) -> dict[str, float]:
    """Seconds of each part of one `reproduce` on a finished root, in the order of the command, and of the whole."""
    arguments = ["reproduce", "--recipe", recipe, "--root", root]
    begin = time.time()
    command = [sys.executable, "-c", f"from benchmarks.startup import trace; trace({arguments!r})"]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    end = time.time()
    seconds = json.loads(output.splitlines()[-1])
    stages = {name.split("_")[0]: seconds[name] for name in STAGES}
    return {
        "Python and the command line": seconds["begin"] - begin,
        "imports, while the Prefect server starts": seconds["imports"],
        "wait for the Prefect server": seconds["server"] - seconds["imports"],
        **{f"check of {name}": value for name, value in stages.items()},
        "rest of the flow": seconds["flow"] - sum(stages.values()),
        "end of the Prefect server": seconds["end of the server"],
        "exit of Python": end - seconds["end"],
        "total": end - begin,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="How long the command line takes to answer.")
    parser.add_argument("--reproduce", metavar="ROOT", help="a root where reproduce has finished")
    parser.add_argument("--recipe", default="demo", help="the recipe that has finished there")
    chosen = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {sys.version.split()[0]}")
    if chosen.reproduce is not None:
        reproduce_parts(chosen.reproduce, chosen.recipe)  # warms the file cache
        parts = reproduce_parts(chosen.reproduce, chosen.recipe)
        print(f"{'part':<42}{'s':>7}")
        for part, seconds in parts.items():
            print(f"{part:<42}{seconds:>7.2f}")
        return
    print(f"{'command':<28}{'median s':>9}  heavy imports")
    for arguments in [["--help"], ["recipes"], *([name, "--help"] for name in (*FLOWS, *COMMANDS))]:
        seconds, heavy = measure(arguments)
        print(f"{' '.join(arguments):<28}{seconds:>9.2f}  {heavy or 'none'}")


if __name__ == "__main__":
    main()
