"""The demo corpus: drawn clips as mp4, a WebVid-style table, and a loopback HTTP server."""

from __future__ import annotations

import csv
import hashlib
import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from infra import storage
from tasks.ingest.drawing import SOURCE_FPS, draw_clip, draw_scene
from tasks.records import UserError

FIRST_SEED = 1_000_000  # the demo base is trained on other seeds, so its training contains no demo clip
TABLE = "results_demo.csv"
_CRF = 12  # H.264 quality: finer than the feature extractors can measure


def write_demo_corpus(folder: str | Path, clips: int, size: int, progress: Callable[[int], None] | None = None) -> str:
    """Draws `clips` clips of `size` pixels into `folder` and returns the path of their table.

    A repeated call reuses existing files: every mp4 is written atomically, and the table is written last.

    Args:
        folder: of the clips and their table; made if it does not exist.
        clips: number of clips.
        size: side of the square frames in pixels.
        progress: called after each clip with the number of clips that are ready.
    Raises:
        UserError: the count or size is invalid, or the folder cannot be written.
    """
    if clips < 1:
        raise UserError(f"{clips} demo clips, expected at least 1")
    if size < 16 or size % 2:
        raise UserError(f"demo clips of {size} pixels, expected an even size of at least 16")
    root = Path(storage.absolute(str(folder)))
    table = root / TABLE
    try:
        for index in range(clips):
            _write_clip(root / _video(index, size), FIRST_SEED + index, size)
            if progress is not None:
                progress(index + 1)
        storage.write_bytes(str(table), _table_bytes(clips, size))
    except OSError as error:
        raise UserError(
            f"the demo corpus cannot be written to {root} ({error.strerror or error});"
            " free some space or name another folder"
        ) from error
    return str(table)


def demo_table(folder: str, clips: int, size: int) -> tuple[str, str]:
    """Returns address and sha256 of the table that `write_demo_corpus` writes into `folder`, without writing it."""
    return storage.join(storage.absolute(folder), TABLE), hashlib.sha256(_table_bytes(clips, size)).hexdigest()


@contextmanager
def serve_folder(folder: str | Path) -> Iterator[str]:
    """Serves a folder over HTTP on 127.0.0.1, on a free port, and yields its URL, which ends in a slash."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_QuietHandler, directory=str(folder)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="demo-http", daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _table_bytes(clips: int, size: int) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["videoid", "contentUrl", "duration", "page_dir", "name"])
    for index in range(clips):
        seed = FIRST_SEED + index
        writer.writerow([seed, _video(index, size), "PT00H00M04S", f"{size}px", draw_scene(seed).caption])
    return text.getvalue().encode()


def _video(index: int, size: int) -> str:
    return f"videos/{size}px/{FIRST_SEED + index}.mp4"


def _write_clip(path: Path, seed: int, size: int) -> None:
    """Draws one clip unless its file exists."""
    if not path.is_file():
        from trip_model.images import video_bytes  # not needed if the corpus exists

        pixels, _ = draw_clip(seed, size)
        storage.write_bytes(str(path), video_bytes(pixels, SOURCE_FPS, "mp4", _CRF))


class _QuietHandler(SimpleHTTPRequestHandler):
    """Serves complete files without a log line per request, which would hide the output of the demo."""

    protocol_version = "HTTP/1.1"  # keeps connections open between clips

    def log_message(self, format: str, *args: object) -> None:
        pass
