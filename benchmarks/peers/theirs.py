"""video2dataset on the same rows: its settings, its command, and the outcome of each row."""

from __future__ import annotations

import io
import json
import os
import tarfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq

from benchmarks.peers.corpus import FPS, SIZE

_START = Path(__file__).parent / "start_video2dataset.py"


@dataclass(frozen=True)
class Result:
    """The outcomes: the frames of each success and the status of each failure; other rows are in neither."""

    frames: dict[int, np.ndarray]  # uint8 [F, H, W, 3]
    failed: dict[int, str]
    counted: dict[str, int]  # its own statistics


def command(python: str, table: Path, output: Path, processes: int, rows_per_shard: int, timeout: float) -> list[str]:
    """Returns the command for frames of the same rate and size in webdataset tars; its YAML settings are JSON."""
    video = {"encode_format": "mp4"}
    config = {
        "subsampling": {
            "ResolutionSubsampler": {"args": {"video_size": SIZE, "resize_mode": ["scale", "crop"], **video}},
            "FrameSubsampler": {"args": {"frame_rate": FPS, **video}},
        },
        "reading": {
            "yt_args": {"download_size": 360, "download_audio_rate": 44100, "yt_metadata_args": None},
            "timeout": timeout,
            "sampler": None,
        },
        "storage": {"number_sample_per_shard": rows_per_shard, "oom_shard_count": 5, "captions_are_subtitles": False},
        "distribution": {
            "processes_count": processes,
            "thread_count": 16,
            "subjob_size": 1000,
            "distributor": "multiprocessing",
        },
    }
    settings = output.with_suffix(".yaml")
    settings.write_text(json.dumps(config))
    flags = {
        "url_list": table,
        "output_folder": output,
        "output_format": "webdataset",
        "input_format": "csv",
        "url_col": "contentUrl",
        "caption_col": "name",
        "save_additional_columns": '["row"]',
        "tmp_dir": "/tmp",
        "config": settings,
    }
    return [python, str(_START), *(f"--{name}={value}" for name, value in flags.items())]


def environment(ffmpeg: str) -> dict[str, str]:
    """It calls `ffmpeg` by name."""
    return {**os.environ, "PATH": f"{Path(ffmpeg).parent}{os.pathsep}{os.environ['PATH']}"}


def read_result(output: Path) -> Result:
    frames: dict[int, np.ndarray] = {}
    failed: dict[int, str] = {}
    counted = {"count": 0, "successes": 0, "failed_to_download": 0, "failed_to_subsample": 0}
    rows: dict[str, int] = {}
    for table in output.glob("*.parquet"):
        for line in pq.read_table(table).to_pylist():
            rows[line["key"]] = line["row"]
            if line["status"] != "success":
                failed[line["row"]] = line["status"]
    for stats in output.glob("*_stats.json"):
        values: dict[str, Any] = json.loads(stats.read_text())
        counted = {name: count + values[name] for name, count in counted.items()}
    for shard in output.glob("*.tar"):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".mp4"):
                    data = tar.extractfile(member)
                    assert data is not None
                    frames[rows[member.name.removesuffix(".mp4")]] = _all_frames(data.read())
    return Result(frames, failed, counted)


def _all_frames(data: bytes) -> np.ndarray:
    pictures: list[np.ndarray] = []
    with suppress(av.FFmpegError), av.open(io.BytesIO(data)) as container:
        if container.streams.video:
            pictures += [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(pictures) if pictures else np.zeros((0, SIZE, SIZE, 3), np.uint8)


def count_members(shard: Path, ending: str) -> int:
    with tarfile.open(shard) as tar:
        return sum(member.name.endswith(ending) for member in tar)
