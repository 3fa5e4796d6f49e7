"""Measures what a changed table costs: requests at the server and shards made, for a data set that is there already.

    python -m benchmarks.growth [--rows 20] [--clips-per-shard 4]

Draws a small corpus, serves it on loopback with a server that counts requests, and prepares it again and again below
one root. Prints one line per change. `tests/encode/test_growth.py` checks the same table.
"""

from __future__ import annotations

import argparse
import http.server
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from infra import storage
from tasks.curate.compact import compact
from tasks.curate.forget import forget
from tasks.curate.verify import problems
from tasks.encode.fingerprint import fingerprint_of
from tasks.encode.job import prepare
from tasks.encode.spec import PrepareReport, PrepareSpec
from tasks.ingest.demo import FIRST_SEED, write_demo_corpus
from tasks.ingest.spec import DownloadSpec, SourceSpec
from tasks.records import digest
from tasks.shards import ShardDataset, clip_key_of, pool_of

HEADER = "videoid,contentUrl,name\n"
BASE = Path(__file__).resolve().parents[1] / "examples" / "demo_base" / "weights"


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder and keeps the paths that were requested; `/broken/503` answers with that status."""

    requested: list[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class _Handler(http.server.SimpleHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        self.server.requested.append(self.path.lstrip("/"))
        if self.path.startswith("/broken/"):
            self.send_error(int(self.path.rsplit("/", 1)[1]))
        else:
            super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def counting_server(folder: Path) -> Iterator[Server]:
    """Serves a folder on loopback until the end of the block."""
    with Server(("127.0.0.1", 0), partial(_Handler, directory=str(folder))) as server:
        server.requested = []
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@dataclass(frozen=True)
class Night:
    """What one prepare cost."""

    change: str
    requests: int
    shards_made: int
    shards: int
    rows: int
    forgotten: int
    version: str


class Growth:
    """A root with one data set whose table changes from night to night.

    Args:
        folder: an empty folder; gets the corpus, the table and the root.
        base: folder of the base.
        rows: of the first night.
        more: further rows for later nights.
        clips_per_shard: rows of a new shard.
    """

    def __init__(self, folder: Path, base: Path, server: Server, rows: int, clips_per_shard: int) -> None:
        self.table, self.root, self.server = folder / "clips.csv", folder / "root", server
        self.lines = [self._line(number) for number in range(rows)]
        self.spec = PrepareSpec(
            SourceSpec(str(self.table), base_url=server.url),
            str(self.root / "data" / digest("clips.csv")),
            str(base),
            num_frames=4,
            size=32,
            clips_per_shard=clips_per_shard,
            workers=0,
            download=DownloadSpec(attempts=1, allow_private=True),
        )

    def _line(self, number: int) -> str:
        return f"k{number},videos/32px/{FIRST_SEED + number}.mp4,a shape number {number}\n"

    def grow(self, count: int) -> None:
        """Appends rows to the table."""
        self.lines += [self._line(number) for number in range(len(self.lines), len(self.lines) + count)]

    @property
    def dataset(self) -> str:
        return self.spec.output

    def night(self, change: str, lines: list[str] | None = None, **changes: Any) -> Night:
        """Writes the table, prepares, and returns what it cost; the data set verifies afterwards."""
        self.table.write_text(HEADER + "".join(self.lines if lines is None else lines))
        spec = replace(self.spec, **changes)
        pool = pool_of(spec.output, digest(fingerprint_of(spec)))
        before = {name for name in storage.list_dir(pool) if name.endswith(".tar")}
        self.server.requested.clear()
        report: PrepareReport = prepare(spec)
        after = {name for name in storage.list_dir(pool) if name.endswith(".tar")}
        if found := list(problems(spec.output)) + list(problems(report.dataset)):
            raise SystemExit(f"{change}: {found[0]}")
        made, requests = len(after - before), len(self.server.requested)
        forgotten = report.failed.get("forgotten", 0)
        return Night(change, requests, made, report.shards, report.rows, forgotten, report.manifest_sha[:8])


def growth_table(growth: Growth) -> list[Night]:
    """Takes a data set through every change of its table."""
    nights = [growth.night("first night"), growth.night("same table")]
    forget(growth.dataset, ["k1"])
    nights.append(growth.night("one clip taken down"))
    growth.grow(5)
    nights.append(growth.night("5 rows more"))
    removed = growth.lines.pop(2)
    nights.append(growth.night("one row less"))
    growth.lines[6] = growth.lines[6].replace("a shape", "another shape")
    nights.append(growth.night("one caption edited"))
    nights.append(growth.night("another order", growth.lines[::-1]))
    nights.append(growth.night("a trailing newline", [*growth.lines, "\n"]))
    compact(growth.dataset)
    nights.append(growth.night("after compact"))
    growth.lines.append(removed)
    nights.append(growth.night("the row again"))
    other = growth.dataset[:-16] + digest("another name")
    nights.append(growth.night("the table under another name", output=other))
    nights.append(growth.night("another recipe", output=growth.dataset[:-16] + digest("recipe"), num_frames=5))
    keys = {clip_key_of(key) for key in ShardDataset(growth.dataset).keys}
    assert "k1" not in keys
    return nights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--clips-per-shard", type=int, default=4)
    parser.add_argument("--base", type=Path, default=BASE)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="trip-growth-"))
    try:
        write_demo_corpus(folder / "corpus", given.rows + 5, 32)
        with counting_server(folder / "corpus") as server:
            nights = growth_table(Growth(folder, given.base, server, given.rows, given.clips_per_shard))
    finally:
        shutil.rmtree(folder)
    print("| change of the table | requests | shards made | shards | rows | forgotten | manifest |")
    print("|---|---|---|---|---|---|---|")
    for night in nights:
        print("| " + " | ".join(str(value) for value in vars(night).values()) + " |")


if __name__ == "__main__":
    main()
