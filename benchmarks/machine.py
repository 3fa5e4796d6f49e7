"""The machine and the versions of a measurement, and where the scripts leave their results for `benchmarks.report`."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).with_name("results")
PACKAGES = ("torch", "diffusers", "transformers", "numpy", "ray")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds --json: the file of the result, by default only the standard output."""
    parser.add_argument("--json", type=Path, help="also write the result to this file, as benchmarks/results/NAME.json")


def write_json(script: str, result: dict[str, Any], path: Path | None) -> None:
    """Prints a result together with its machine; writes it, too, where a path is given."""
    text = json.dumps({"script": script, "machine": machine(), "result": result}, indent=1)
    print(text)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def machine() -> dict[str, Any]:
    """Processor or GPU, cores, threads, load, date and versions."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
