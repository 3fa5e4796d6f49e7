"""The same stages on Ray Data, as its documentation writes them: `python -m benchmarks.peers.ray_data JSON`.

What runs in a stage is our own code (reader, encoder, stand-in VAE, the fields of a sample), so that only the
engines differ. There are no retries, checks or accounting: every row must be usable.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from typing import Any

import aiohttp
import numpy as np
import ray
import ray.data

from benchmarks.peers.corpus import BLOCK, FPS, FRAMES, SIZE
from benchmarks.peers.ours import BASE
from benchmarks.peers.stand_in import install
from infra.settings import CHECKOUT, apply_environment_defaults
from tasks.encode.encoder import ClipEncoder, Decoded
from tasks.encode.filters import Window
from tasks.encode.spec import PrepareSpec
from tasks.records import ClipRef
from tasks.shards import SUFFIXES
from tasks.video.decode import Clip, read_windows

BATCH = 8  # clips of one call
Batch = dict[str, Any]  # columns, arrays of equal length


def fetch(batch: Batch) -> Batch:
    """Downloads the files of a batch concurrently."""

    async def get(session: aiohttp.ClientSession, url: str) -> bytes:
        async with session.get(url) as response:
            response.raise_for_status()
            return await response.read()

    async def get_all() -> list[bytes]:
        async with aiohttp.ClientSession() as session:
            return await asyncio.gather(*(get(session, str(url)) for url in batch["contentUrl"]))

    return batch | {"data": np.array(asyncio.run(get_all()), dtype=object)}


def decode(batch: Batch) -> Batch:
    """Decodes files to frames and drops the files."""
    clips = [read_windows(data, FRAMES, FPS, SIZE)[0] for data in batch.pop("data")]
    return batch | {
        "pixels": np.stack([clip.pixels for clip in clips]),
        "times": np.stack([clip.times for clip in clips]),
        "info": np.array([json.dumps(clip.info) for clip in clips]),
    }


def add_provenance(batch: Batch) -> Batch:
    """Adds hash and size of the files."""
    return batch | {
        "sha256": np.array([hashlib.sha256(data).hexdigest() for data in batch["data"]]),
        "size_bytes": np.array([len(data) for data in batch["data"]]),
    }


class Encode:
    """Encodes frames to samples, as bytes of tar members."""

    def __init__(self) -> None:
        install()
        self._encoder = ClipEncoder(BASE, PrepareSpec(num_frames=FRAMES, fps=FPS, size=SIZE))

    def __call__(self, batch: Batch) -> Batch:
        rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
        packed = [sample.pack() for [sample] in self._encoder.encode(map(_decoded, rows))]
        columns = {suffix: [sample.members.get(name) for sample in packed] for name, suffix in SUFFIXES.items()}
        made = {suffix: np.array(values, dtype=object) for suffix, values in columns.items() if None not in values}
        return {"__key__": np.array([sample.key for sample in packed]), **made}


class FetchDecodeEncode(Encode):
    """Runs all stages in one worker, so that frames stay in its memory."""

    def __call__(self, batch: Batch) -> Batch:
        return super().__call__(decode(add_provenance(fetch(batch))))


def _decoded(row: dict[str, Any]) -> Decoded:
    ref = ClipRef(key=str(row["videoid"]), url=str(row["contentUrl"]), caption=str(row["name"]), row=int(row["row"]))
    clip = Clip(row["pixels"], row["times"], json.loads(str(row["info"])))
    return Decoded(ref, str(row["sha256"]), int(row["size_bytes"]), [Window(0, clip)])


def main(table: str, output: str, rows: int, cpus: int, way: str) -> None:
    apply_environment_defaults()
    os.environ["PYTHONPATH"] = str(CHECKOUT)  # the raylet passes it to the workers
    ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    table_rows = ray.data.read_csv(table, override_num_blocks=-(-rows // BLOCK))
    # Shares of a CPU, so that every stage fits next to the actors and all CPUs are busy.
    if way == "stages":
        files = table_rows.map_batches(fetch, batch_size=BATCH, num_cpus=0.8)
        files = files.map_batches(add_provenance, batch_size=BATCH, num_cpus=0.8)
        frames = files.map_batches(decode, batch_size=BATCH, num_cpus=0.8)
        pool = ray.data.ActorPoolStrategy(size=1)
        samples = frames.map_batches(Encode, batch_size=BATCH, compute=pool, num_cpus=0.1)
    else:
        pool = ray.data.ActorPoolStrategy(size=cpus)
        samples = table_rows.map_batches(FetchDecodeEncode, batch_size=BATCH, compute=pool, num_cpus=0.4)
    samples.write_webdataset(output, encoder=None, ray_remote_args={"num_cpus": 0.2})
    ray.shutdown()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
