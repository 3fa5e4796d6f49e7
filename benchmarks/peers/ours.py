"""Runs prepare with the stand-in VAE as a separate process: `python -m benchmarks.peers.ours JSON`."""

from __future__ import annotations

import json
import sys

from benchmarks.peers.corpus import FPS, FRAMES, SIZE
from benchmarks.peers.stand_in import local_ray
from benchmarks.rig.table import DOWNLOAD
from infra.settings import CHECKOUT
from tasks.encode.job import PrepareSpec, prepare
from tasks.ingest.spec import SourceSpec

BASE = str(CHECKOUT / "examples" / "demo_base" / "weights")


def main(table: str, url: str, output: str, workers: int, clips_per_shard: int, keep_pixels: bool) -> None:
    spec = PrepareSpec(
        SourceSpec(table, base_url=url),
        output,
        BASE,
        num_frames=FRAMES,
        fps=FPS,
        size=SIZE,
        keep_pixels=keep_pixels,
        clips_per_shard=clips_per_shard,
        workers=workers,
        download=DOWNLOAD,
    )
    with local_ray(workers, 0.0):
        prepare(spec)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
