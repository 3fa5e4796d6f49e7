"""Measures the prepare stage: the accounting under injected faults, and the driver's memory over many rows.

    python -m benchmarks.data_plane faults [--rows 500] [--each 5]      every fault has its expected reason
    python -m benchmarks.data_plane flat [--rows 100000]                the driver's memory does not grow

Each prints one JSON. Both run prepare on Ray, with the VAE of the demo's base.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from benchmarks.rig.crashing import install
from benchmarks.rig.server import serving
from benchmarks.rig.table import DECODE, DOWNLOAD, TABLE, audit, write_rig
from benchmarks.rig.watch import Timeline, watching
from infra.cluster import OBJECT_STORE_BYTES, ray_session
from infra.settings import CHECKOUT, apply_environment_defaults
from tasks.curate.verify import problems
from tasks.encode.job import prepare
from tasks.encode.spec import PrepareSpec
from tasks.ingest.drawing import draw_clip
from tasks.ingest.spec import SourceSpec
from trip_model.images import video_bytes

BASE = str(CHECKOUT / "examples" / "demo_base" / "weights")


def faults(rows: int, each: int, size: int, workers: int, seed: int) -> dict[str, Any]:
    """Runs every kind of fault `each` times among usable clips, on Ray; returns expected and actual counts."""
    with tempfile.TemporaryDirectory(prefix="trip-rig-") as name:
        folder, output = Path(name) / "corpus", Path(name) / "data"
        table = write_rig(folder, size, each, rows, seed)
        with serving(folder / "files") as url, _crashing_ray(workers):
            source = SourceSpec(str(folder / TABLE), base_url=url)
            spec = PrepareSpec(
                source,
                str(output),
                BASE,
                size=size,
                clips_per_shard=25,
                workers=workers,
                download=DOWNLOAD,
                decode=DECODE,
            )
            with watching() as watch:
                report = prepare(spec)
        result = audit(str(output), table)
        verify_problems = list(problems(str(output)))
    return {
        "rows": report.rows,
        "books_close": report.rows == report.encoded + sum(report.failed.values()) == len(table),
        "clean": result.clean,
        **asdict(result),
        "verify_problems": verify_problems,
        **_costs(report.rows, report.seconds, watch.cpu_seconds(), watch.peak_mb),
    }


def flat(rows: int, workers: int) -> dict[str, Any]:
    """Runs tiny clips (32 pixels, 2 frames) from files; returns the driver's memory over the rows."""
    with tempfile.TemporaryDirectory(prefix="trip-flat-") as name:
        folder, output = Path(name) / "corpus", Path(name) / "data"
        folder.mkdir()
        for scene in range(8):
            (folder / f"{scene}.mp4").write_bytes(video_bytes(draw_clip(scene, 32, fps=4.0, seconds=0.5)[0], 4.0))
        with (folder / TABLE).open("w") as file:
            file.write("videoid,contentUrl,name\n")
            file.writelines(f"{row},{row % 8}.mp4,a shape number {row}\n" for row in range(rows))
        spec = PrepareSpec(SourceSpec(str(folder / TABLE)), str(output), BASE, num_frames=2, size=32, workers=workers)
        with ray_session(None, workers), watching() as watch:
            timeline = Timeline(watch)
            report = prepare(spec, timeline)
        verify_problems = list(problems(str(output)))
    return {
        "rows": report.rows,
        "encoded": report.encoded,
        "failed": report.failed,
        "verify_problems": verify_problems,
        "timeline": timeline.points,
        **_costs(report.rows, report.seconds, watch.cpu_seconds(), watch.peak_mb),
    }


def _costs(rows: int, seconds: float, cpu_seconds: dict[str, float], peak_mb: dict[str, float]) -> dict[str, Any]:
    cpu_total = sum(seconds for role, seconds in cpu_seconds.items() if role != "ray")
    return {
        "seconds": seconds,
        "rows_per_second": round(rows / seconds, 2),
        "cpu_seconds": cpu_seconds,
        "cpu_seconds_per_row": round(cpu_total / rows, 4),
        "peak_mb": dict(sorted(peak_mb.items())),
    }


@contextmanager
def _crashing_ray(workers: int) -> Iterator[None]:
    """Starts a local session whose workers use decoders that the rig's marked files crash."""
    apply_environment_defaults()
    os.environ["PYTHONPATH"] = str(CHECKOUT)  # the raylet hands it to the workers
    ray.init(
        address="local",
        num_cpus=workers,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        runtime_env={"worker_process_setup_hook": f"{install.__module__}.{install.__qualname__}"},
    )
    try:
        yield
    finally:
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("faults", "flat"))
    parser.add_argument("--rows", type=int, help="rows of the table (500, or 100000)")
    parser.add_argument("--each", type=int, default=5, help="rows of each kind of fault")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side, for faults")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    began = time.monotonic()
    if given.what == "faults":
        numbers = faults(given.rows or 500, given.each, given.size, given.workers, given.seed)
    else:
        numbers = flat(given.rows or 100_000, given.workers)
    print(json.dumps(numbers | {"whole_seconds": round(time.monotonic() - began, 1)}, indent=2))


if __name__ == "__main__":
    main()
