"""Measures prepare against video2dataset and Ray Data.

    python -m benchmarks.peers video2dataset --videos FOLDER --video2dataset PYTHON --ffmpeg FFMPEG [--rows 320]
    python -m benchmarks.peers faults --video2dataset PYTHON --ffmpeg FFMPEG [--each 2]
    python -m benchmarks.peers ray-data --videos FOLDER [--rows 320]

Each prints one JSON. Run it on a quiet machine, as the CPU time is that of complete cores.
docs/decisions/data_plane_peers.md describes the environment of video2dataset.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import theirs
from benchmarks.peers.contender import Cost, between_marks, run, steady, whole
from benchmarks.peers.corpus import BLOCK, FPS, FRAMES, NOT_ASKED, SIZE, write_clips, write_faults, write_table
from benchmarks.rig.files import make_file
from benchmarks.rig.server import serving
from benchmarks.rig.table import DOWNLOAD
from tasks.shards import ShardDataset
from tasks.video.decode import read_clip

FAULTS_PER_SHARD = 50
THEIR_SHARDS = 5  # of video2dataset, which restarts its processes after this many
Start = Callable[[Path, str, Path], Cost]  # table, address of the server, output


def against_video2dataset(given: argparse.Namespace, cores: list[int], folder: Path) -> dict[str, Any]:
    """Both make 16 frames of each clip: ours become the stand-in's latents and a checksum, theirs mp4.

    The steady rate of each is that between the first and the last shard of one run, as they appear on disk.
    """
    theirs_per_shard, rest = divmod(given.rows, THEIR_SHARDS)
    if rest or given.rows % BLOCK:
        raise SystemExit(f"{given.rows} rows, expected a multiple of {THEIR_SHARDS * BLOCK}: shards of equal size")
    rows = write_clips(given.videos, folder / "files", given.rows)
    numbers: dict[str, Any] = {"rows": len(rows), "cores": cores}
    with serving(folder / "files") as url:
        table = folder / "many.csv"
        write_table(table, rows, url)
        costs = {
            "ours": _ours(table, url, folder / "ours-many", cores, BLOCK, given.keep_pixels),
            "video2dataset": _video2dataset(
                given, table, folder / "video2dataset-many", cores, theirs_per_shard, timeout=60.0
            ),
        }
    for name, cost in costs.items():
        numbers[name] = {
            "whole": whole(cost, len(rows), len(cores)),
            "steady": between_marks(cost, len(cores)),
        }
    _compare(numbers, list(costs))
    files = [folder / "files" / f"clip-{row}.mp4" for row in range(given.rows)]
    want = {row: read_clip(file, FRAMES, FPS, SIZE).pixels for row, file in enumerate(files)}
    numbers["ours"]["frames"] = _checked(folder / "ours-many", want)
    result = theirs.read_result(folder / "video2dataset-many")
    numbers["video2dataset"] |= {"frames": _compared(result.frames, want), "books": result.counted}
    return numbers


def against_ray_data(given: argparse.Namespace, cores: list[int], folder: Path) -> dict[str, Any]:
    """All write the same samples with the stand-in VAE; Ray Data once in stages and once with all stages fused."""

    def ray_data(way: str) -> Start:
        def start(table: Path, url: str, out: Path) -> Cost:
            rows = len(table.read_text().splitlines()) - 1
            arguments = {"table": str(table), "output": str(out), "rows": rows, "cpus": len(cores), "way": way}
            return _python("ray_data", cores, out, arguments)

        return start

    starts: dict[str, Start] = {"ours": lambda table, url, out: _ours(table, url, out, cores, BLOCK, keep_pixels=False)}
    starts |= {f"ray_data_{way}": ray_data(way) for way in given.ways}
    numbers = _rates(starts, given, cores, folder)
    numbers["ours"]["samples"] = len(ShardDataset(str(folder / "ours-many")))
    for way in given.ways:
        tars = (folder / f"ray_data_{way}-many").glob("*.tar")
        numbers[f"ray_data_{way}"]["samples"] = sum(theirs.count_members(tar, "latents.npy") for tar in tars)
    return numbers


def faults(given: argparse.Namespace, cores: list[int], folder: Path) -> dict[str, Any]:
    """Runs rows with every fault that applies to both, and counts the outcomes; kinds in NOT_ASKED do not count."""
    (folder / "inside").mkdir()
    (folder / "inside" / "secret.mp4").write_bytes(make_file("clip", 1, 64))
    table = folder / "table.csv"
    with serving(folder / "inside") as inside:
        rows = write_faults(
            folder / "files", given.each, f"{inside.replace('127.0.0.1', 'localhost')}/plain/secret.mp4"
        )
        with serving(folder / "files") as url:
            write_table(table, rows, url)
            _ours(table, url, folder / "ours", cores, FAULTS_PER_SHARD, keep_pixels=True)
        with serving(folder / "files") as url:  # a new server, so that faults that pass after one request occur again
            write_table(table, rows, url)
            _video2dataset(given, table, folder / "video2dataset", cores, FAULTS_PER_SHARD, DOWNLOAD.read_seconds)
    result = theirs.read_result(folder / "video2dataset")
    found = {
        "ours": (_our_pixels(folder / "ours"), _our_failures(folder / "ours")),
        "video2dataset": (result.frames, result.failed),
    }
    table_of: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    wrong = {name: Counter(wrong_successes=0, usable_not_made=0, in_no_book=0) for name in found}
    for number, row in enumerate(rows):
        asked = row.kind not in NOT_ASKED
        table_of[row.kind]["right"] = "not asked" if not asked else "made" if row.usable else "refused"
        for name, (frames, failed) in found.items():
            said = f"made, {len(frames[number])} frames" if number in frames else failed.get(number, "in no book")
            if number in frames and row.usable:
                file = folder / "files" / row.path.rpartition("/")[2]
                want = read_clip(file, FRAMES, FPS, SIZE).pixels
                said += f", {_psnr(frames[number][:FRAMES], want):.0f} dB from the reader's"
            outcomes = table_of[row.kind].setdefault(name, Counter())
            outcomes[said] += 1
            if asked:
                wrong[name]["wrong_successes"] += number in frames and not row.usable
                wrong[name]["usable_not_made"] += row.usable and number not in frames
            wrong[name]["in_no_book"] += number not in frames and number not in failed
    return {"rows": len(rows), "wrong": wrong, "video2dataset_books": result.counted, "kinds": table_of}


def _rates(starts: dict[str, Start], given: argparse.Namespace, cores: list[int], folder: Path) -> dict[str, Any]:
    """Runs each contender on few rows and on all: rates with and without the start, and ratios to ours."""
    rows = write_clips(given.videos, folder / "files", given.rows)
    numbers: dict[str, Any] = {"rows": len(rows), "rows_of_the_start": given.few, "cores": cores}
    with serving(folder / "files") as url:
        few, many = folder / "few.csv", folder / "many.csv"
        write_table(few, rows[: given.few], url)
        write_table(many, rows, url)
        for name, start in starts.items():
            short = start(few, url, folder / f"{name}-few")
            long = start(many, url, folder / f"{name}-many")
            numbers[name] = {
                "whole": whole(long, len(rows), len(cores)),
                "steady": steady(short, long, len(rows) - given.few, len(cores)),
            }
    _compare(numbers, list(starts))
    return numbers


def _compare(numbers: dict[str, Any], names: list[str]) -> None:
    """Adds the ratios of ours to each of the others; above 1 ours is better."""
    for kind in ("whole", "steady"):
        for measure, better in (("clips_per_second_per_core", 1), ("cpu_seconds_per_clip", -1)):
            found = {name: numbers[name][kind][measure] for name in names}
            numbers[f"ours_is_better_{kind}_{measure}"] = {
                name: round((found["ours"] / value) ** better, 2) for name, value in found.items() if name != "ours"
            }


def _ours(table: Path, url: str, output: Path, cores: list[int], clips_per_shard: int, keep_pixels: bool) -> Cost:
    arguments = {"table": str(table), "url": url, "output": str(output), "workers": len(cores)}
    arguments |= {"clips_per_shard": clips_per_shard, "keep_pixels": keep_pixels}
    return _python("ours", cores, output, arguments, lambda: clips_per_shard * _count(output, "shard-*.json"))


def _video2dataset(
    given: argparse.Namespace, table: Path, output: Path, cores: list[int], rows_per_shard: int, timeout: float
) -> Cost:
    processes = len(cores) * given.processes_per_core
    command = theirs.command(given.video2dataset, table, output, processes, rows_per_shard, timeout)
    environment = theirs.environment(given.ffmpeg)
    log = output.with_suffix(".log")
    return run(command, cores, log, environment, lambda: rows_per_shard * _count(output, "*_stats.json"))


def _python(
    module: str, cores: list[int], output: Path, arguments: dict[str, Any], rows_done: Callable[[], int] = lambda: 0
) -> Cost:
    command = [sys.executable, "-m", f"benchmarks.peers.{module}", json.dumps(arguments)]
    return run(command, cores, output.with_suffix(".log"), rows_done=rows_done)


def _count(folder: Path, pattern: str) -> int:
    return sum(1 for _ in folder.glob(pattern))


def _our_pixels(dataset: Path) -> dict[int, np.ndarray]:
    data = ShardDataset(str(dataset))
    return {row: data.read(place, ("pixels",))["pixels"] for place, row in enumerate(_rows(data))}


def _rows(data: ShardDataset) -> list[int]:
    """Returns the row of each sample, in a data set that was prepared at once with one window per clip."""
    return np.flatnonzero(data.index.outcomes_R == 0).tolist()


def _our_failures(dataset: Path) -> dict[int, str]:
    index = ShardDataset(str(dataset)).index
    failed = np.flatnonzero(index.outcomes_R)
    return {row: index.reasons[index.outcomes_R[row] - 1] for row in failed.tolist()}


def _checked(dataset: Path, want: dict[int, np.ndarray]) -> dict[str, int]:
    """Counts the clips, and those with exactly the frames of the reader, by checksum."""
    data = ShardDataset(str(dataset))
    told = [data.read(place, ("meta",))["meta"] for place in range(len(data))]
    rows = zip(_rows(data), told, strict=True)
    same = (meta["pixels_sha256"] == hashlib.sha256(want[row].data).hexdigest() for row, meta in rows)
    return {"clips": len(told), "identical": sum(same)}


def _compared(frames: dict[int, np.ndarray], want: dict[int, np.ndarray]) -> dict[str, Any]:
    """Counts clips and frames, and compares frames with the reader's if their number is equal."""
    distances = [
        _psnr(frames[row], want[row]) for row in want if row in frames and frames[row].shape == want[row].shape
    ]
    return {
        "clips": len(frames),
        "frame_counts": Counter(len(clip) for clip in frames.values()),
        "psnr_db_median": round(float(np.median(distances)), 1) if distances else None,
        "psnr_db_least": round(min(distances), 1) if distances else None,
    }


def _psnr(found: np.ndarray, want: np.ndarray) -> float:
    if found.shape != want.shape:
        return float("nan")
    error = float(np.mean((found.astype(np.float32) - want) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


@contextmanager
def _workplace(cores: list[int]) -> Iterator[Path]:
    """Yields a folder, and moves this process and its servers to the other cores, if there are any."""
    everything = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, set(everything) - set(cores) or everything)
    with tempfile.TemporaryDirectory(prefix="trip-peers-") as name:
        yield Path(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("video2dataset", "faults", "ray-data"))
    parser.add_argument("--videos", type=Path, help="a folder of videos; clips of 4 s are cut from those long enough")
    parser.add_argument("--rows", type=int, default=4 * THEIR_SHARDS * BLOCK)
    # Enough for a unit of every worker, and for the six pictures of prepare's page, which cost seconds.
    parser.add_argument("--few", type=int, default=6 * BLOCK, help="beside Ray Data: rows of the short run, its start")
    parser.add_argument("--each", type=int, default=2, help="rows of each kind of fault")
    parser.add_argument("--keep-pixels", action="store_true", help="beside video2dataset, ours stores frames as well")
    parser.add_argument("--cores", type=int, nargs="+", default=[0], help="numbers of the cores of each contender")
    parser.add_argument("--video2dataset", help="the Python interpreter of its environment")
    parser.add_argument("--ffmpeg", default="/usr/bin/ffmpeg", help="the program of that name that it calls")
    parser.add_argument("--processes-per-core", type=int, default=1, help="of video2dataset")
    parser.add_argument("--ways", nargs="+", default=["stages", "fused"], help="of Ray Data: stages, fused")
    given = parser.parse_args()
    measures = {"video2dataset": against_video2dataset, "faults": faults, "ray-data": against_ray_data}
    with _workplace(given.cores) as folder:
        print(json.dumps(measures[given.what](given, given.cores, folder), indent=2))


if __name__ == "__main__":
    main()
