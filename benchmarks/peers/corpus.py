"""The input of the contenders: clips cut from real videos, the rig's faults, and tables with absolute addresses."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av

from benchmarks.rig.files import make_file
from benchmarks.rig.table import ENCODED, KINDS

SECONDS, HEIGHT, FPS, FRAMES, SIZE = 4.0, 360, 4, 16, 256  # a clip is one window of 16 frames at 4 fps
BLOCK = 16  # rows of a work unit: of a block of Ray Data, and of a shard of ours
MOST_PIECES = 40
FAULT_SIZE = 64
# Not for every contender: a crash that only our reader has; what would stop it for minutes or take all memory; lines
# that end the reading of the whole table; addresses beyond this machine.
LEFT_OUT = {"crash", "slow", "bomb", "cut-line", "broken-quotes", "private", "to-private", "to-metadata", "bad-url"}
# What a downloader of whole videos promises nothing of, and what is a matter of limits and of taste.
NOT_ASKED = {"short", "one-frame", "no-key", "same-key", "no-caption", "opted-out", "endless", "trickle"}


@dataclass(frozen=True)
class Row:
    """One row of a table: its kind, its path on the server, and whether it is usable."""

    kind: str
    path: str  # relative to the server, or an absolute address
    usable: bool
    key: str
    caption: str


def write_clips(videos: Path, files: Path, rows: int) -> list[Row]:
    """Cuts `videos` into clips of 4 s and 360 lines, frame rates as they are; repeats them, each row its own file."""
    pieces = list(itertools.islice(_pieces(videos), MOST_PIECES))
    if not pieces:
        raise SystemExit(f"no video of at least {SECONDS:g} s in {videos}")
    files.mkdir(parents=True, exist_ok=True)
    for row in range(rows):
        name = files / f"clip-{row}.mp4"
        if row < len(pieces):
            name.write_bytes(pieces[row])
        else:
            name.symlink_to(f"clip-{row % len(pieces)}.mp4")
    return [Row("plain", f"plain/clip-{row}.mp4", True, str(row), f"a clip, number {row}") for row in range(rows)]


def write_faults(files: Path, each: int, inside: str) -> list[Row]:
    """Rows of every kind of the rig that all contenders can be given, `each` times, beside two of the network.

    `inside` is the address of a video that the table must not reach, on a server in place of a private network.
    """
    files.mkdir(parents=True, exist_ok=True)
    own = files.parent / "own.mp4"  # a file of this machine, of no server
    own.write_bytes(make_file("clip", 0, FAULT_SIZE))
    rows = []
    for kind, number in itertools.product([name for name in KINDS if name not in LEFT_OUT], range(each)):
        rule, key = KINDS[kind], str(1000 + len(rows))
        name = f"{kind}-{number}.mp4"
        (files / name).write_bytes(make_file(rule.file, number, FAULT_SIZE))
        path = str(own) if kind == "own-file" else f"{rule.answer}/{name}"
        caption = {"no-caption": "", "quoted": 'a clip, said "so"'}.get(kind, "a clip")
        key = {"no-key": "", "same-key": "1000"}.get(kind, key)
        rows.append(Row(kind, path, rule.outcome == ENCODED, key, caption))
    rows += [Row("inside", inside, False, str(1000 + len(rows) + number), "a clip") for number in range(each)]
    return rows


def write_table(path: Path, rows: list[Row], url: str) -> None:
    """Writes a WebVid-like CSV with absolute addresses and the number of each row."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["videoid", "contentUrl", "name", "row"])
        for number, row in enumerate(rows):
            own = row.path.startswith(("http", "/"))
            writer.writerow([row.key, row.path if own else f"{url}/{row.path}", row.caption, number])


def _pieces(videos: Path) -> Iterator[bytes]:
    """mp4 clips of all files, the first of each file, then the second of each, so that few rows are of many scenes."""
    cuts = [_cut(path) for path in sorted(videos.iterdir()) if path.is_file()]
    for turn in itertools.zip_longest(*cuts):
        yield from (piece for piece in turn if piece is not None)


def _cut(path: Path) -> Iterator[bytes]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate
        assert rate is not None
        wanted = round(SECONDS * rate)
        frames = (frame for frame in container.decode(stream))
        while len(piece := list(itertools.islice(frames, wanted))) == wanted:
            yield _encoded(piece, rate)


def _encoded(frames: list[av.VideoFrame], rate: Fraction) -> bytes:
    buffer = io.BytesIO()
    width = round(frames[0].width * HEIGHT / frames[0].height / 2) * 2
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, HEIGHT, "yuv420p"
        stream.options = {"crf": "23", "preset": "veryfast"}
        for number, frame in enumerate(frames):
            small = frame.reformat(width, HEIGHT, "yuv420p")
            small.pts, small.time_base = number, 1 / rate
            file.mux(stream.encode(small))
        file.mux(stream.encode())
    return buffer.getvalue()
