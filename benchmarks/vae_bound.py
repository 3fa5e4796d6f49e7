"""Measures how busy prepare keeps the VAE: the rate of the stage relative to the rate of the VAE without it.

    python -m benchmarks.vae_bound --videos FOLDER [--vae cpu | gpu] [--rows 96] [--seconds-per-clip 0.5]

Without the stage, the VAE encodes pre-decoded frames clip by clip in one process on the same core. The stage runs with
one Ray worker; its rate is measured between its first and its last finished shard, so that starts do not count.
`cpu`: a random VAE with the layout of Stable Diffusion's, a quarter as wide, on one core with the rest of the stage.
`gpu`: a stand-in that sleeps, since a GPU leaves the core to the decoders. Prints one JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.data_plane import BASE
from benchmarks.peers.contender import busy_seconds
from benchmarks.peers.corpus import FPS, FRAMES, SIZE, write_clips, write_table
from benchmarks.peers.stand_in import StandIn, local_ray
from benchmarks.rig.server import serving
from benchmarks.rig.table import DOWNLOAD
from tasks.encode.job import PrepareSpec, prepare
from tasks.ingest.spec import SourceSpec
from tasks.video.decode import read_clip
from trip_model.encoders import encode_pixels, load_vae

CHANNELS = (32, 64, 128, 128)  # Stable Diffusion's are 128, 256, 512, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, required=True, help="a folder of videos, cut into clips of 4 s")
    parser.add_argument("--vae", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--seconds-per-clip", type=float, default=0.5, help="seconds of the sleeping VAE")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--clips-per-shard", type=int, default=24)
    parser.add_argument("--core", type=int, default=0, help="number of the core of the VAE and of the stage")
    given = parser.parse_args()
    everything = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="trip-vae-") as name:
        folder = Path(name)
        os.sched_setaffinity(0, set(everything) - {given.core} or everything)  # of the server
        rows = write_clips(given.videos, folder / "files", given.rows)
        with serving(folder / "files") as url:
            os.sched_setaffinity(0, {given.core})
            write_table(folder / "table.csv", rows, url)
            print(json.dumps(measure(given, folder, url), indent=2))


def measure(given: argparse.Namespace, folder: Path, url: str) -> dict[str, Any]:
    """Measures the VAE before and after the stage, since machines change their speed, and the stage."""
    torch.set_num_threads(1)
    sleep = given.seconds_per_clip / FRAMES
    base = wide_base(folder / "base") if given.vae == "cpu" else Path(BASE)
    vae: Any = load_vae(base) if given.vae == "cpu" else StandIn(sleep)
    clips = [
        read_clip(folder / "files" / f"clip-{row}.mp4", FRAMES, FPS, SIZE).pixels
        for row in range(given.clips_per_shard)
    ]
    before = vae_seconds(vae, clips)
    spec = PrepareSpec(
        SourceSpec(str(folder / "table.csv"), base_url=url),
        str(folder / "data"),
        str(base),
        size=SIZE,
        clips_per_shard=given.clips_per_shard,
        workers=1,
        download=DOWNLOAD,
    )
    marks: list[tuple[int, float, float]] = []  # rows done, wall clock, busy seconds of the core

    def progress(tick: dict[str, Any]) -> None:
        if not marks or tick["done"] > marks[-1][0]:
            marks.append((tick["done"], time.monotonic(), busy_seconds([given.core])))

    with local_ray(1, None if given.vae == "cpu" else sleep):
        report = prepare(spec, progress)
    after = vae_seconds(vae, clips)
    marks = [mark for mark in marks if mark[0]]
    (first, began, busy_then), (last, ended, busy) = marks[0], marks[-1]
    per_clip, vae_per_clip = (ended - began) / (last - first), (before + after) / 2
    cpu = (busy - busy_then) / (last - first)
    return {
        "vae": given.vae,
        "rows": report.rows,
        "encoded": report.encoded,
        "measured_rows": last - first,
        "vae_alone_seconds_per_clip": [round(before, 4), round(after, 4)],
        "stage_seconds_per_clip": round(per_clip, 4),
        "share_of_vae_alone": round(vae_per_clip / per_clip, 4),
        "cpu_seconds_per_clip": round(cpu, 4),
        "cpu_seconds_per_clip_beside_the_vae": round(cpu - (vae_per_clip if given.vae == "cpu" else 0), 4),
    }


def vae_seconds(vae: Any, clips: list[np.ndarray]) -> float:
    """Returns the VAE's seconds for one clip of pre-decoded frames."""
    encode_pixels(vae, clips[0], FRAMES)
    began = time.monotonic()
    for pixels in clips:
        encode_pixels(vae, pixels, FRAMES)
    return (time.monotonic() - began) / len(clips)


def wide_base(folder: Path) -> Path:
    """Writes the demo's base with a random VAE that is large enough to be the bottleneck of the stage."""
    from diffusers import AutoencoderKL

    shutil.copytree(BASE, folder, ignore=shutil.ignore_patterns("vae"))
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=SIZE,
    ).save_pretrained(folder / "vae")
    return folder


if __name__ == "__main__":
    main()
