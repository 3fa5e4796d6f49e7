"""The rig's table: usable rows and rows with one fault each, their expected outcomes, and the audit."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from benchmarks.rig.files import make_file
from tasks.ingest.drawing import draw_scene
from tasks.ingest.spec import DownloadSpec
from tasks.shards import ShardDataset, clip_key_of, read_manifest, read_shard_manifest
from tasks.video.spec import DecodeSpec

ENCODED = "encoded"
TABLE = "table.csv"
FIRST_KEY = 1000
SCENES = 40  # clips that differ; rows share their files
_LINE = "{key},{url},{caption}"


@dataclass(frozen=True)
class Kind:
    """A kind of row: its kind of response, its file, the format of its line, and its expected outcome."""

    answer: str
    file: str = "clip"
    outcome: str = ENCODED
    line: str = _LINE


# A relative address is `<how the server answers>/<file>`, see `benchmarks.rig.server`.
KINDS = {
    "plain": Kind("plain"),
    "gif": Kind("plain", "gif"),
    "long": Kind("plain", "long"),
    "odd-fps": Kind("plain", "odd-fps"),
    "vfr": Kind("plain", "vfr"),
    "rotated": Kind("plain", "rotated"),
    "busy-once": Kind("busy-once"),
    "cut-once": Kind("cut-once"),
    "moved": Kind("moved"),
    "no-length": Kind("no-length"),
    "quoted": Kind("plain", line='{key},{url},"{caption}, said ""so"""'),
    # The server.
    "forbidden": Kind("403", outcome="http_403"),
    "missing": Kind("404", outcome="http_404"),
    "gone": Kind("410", outcome="http_410"),
    "throttled": Kind("429", outcome="http_429"),
    "busy": Kind("503", outcome="http_503"),
    "moved-nowhere": Kind("to-dead-end", outcome="http_404"),
    "page": Kind("page", outcome="not_a_video"),
    "opted-out": Kind("opted-out", outcome="robots_opt_out"),
    "oversize": Kind("oversize", outcome="too_large"),
    "endless": Kind("endless", outcome="too_large"),
    # The network.
    "hang-up": Kind("hang-up", outcome="network"),
    "cut": Kind("cut", outcome="truncated"),
    "stall": Kind("stall", outcome="timeout"),
    "stall-midway": Kind("stall-midway", outcome="timeout"),
    "trickle": Kind("trickle", outcome="too_slow"),
    # Addresses that must not be requested.
    "private": Kind("http://10.0.0.1", outcome="blocked_address"),
    "to-private": Kind("to-private", outcome="blocked_address"),
    "to-metadata": Kind("to-metadata", outcome="blocked_address"),
    "to-other-port": Kind("to-other-port", outcome="blocked_address"),
    "to-name": Kind("to-name", outcome="blocked_address"),
    "to-file": Kind("to-file", outcome="blocked_address"),
    "own-file": Kind("file:///etc", outcome="blocked_address"),
    "loop": Kind("loop", outcome="too_many_redirects"),
    "bad-url": Kind("http://[", outcome="bad_url"),
    # The file.
    "empty": Kind("plain", "empty", "not_a_video"),
    "picture": Kind("plain", "picture", "not_a_video"),
    "playlist": Kind("plain", "playlist", "not_a_video"),
    "zip": Kind("plain", "zip", "not_a_video"),
    "noise": Kind("plain", "noise", "undecodable"),
    "no-index": Kind("plain", "no-index", "undecodable"),
    "cut-data": Kind("plain", "cut-data", "damaged"),
    "audio": Kind("plain", "audio", "no_video_stream"),
    "one-frame": Kind("plain", "one-frame", "too_short"),
    "short": Kind("plain", "short", "too_short"),
    "crash": Kind("plain", "crash", "decoder_crash"),
    "slow": Kind("plain", "slow", "decoder_timeout"),
    "bomb": Kind("plain", "bomb", "out_of_memory"),
    # The table.
    "no-caption": Kind("plain", outcome="bad_row", line="{key},{url},"),
    "no-key": Kind("plain", outcome="bad_row", line=",{url},{caption}"),
    "cut-line": Kind("plain", outcome="bad_row", line="{key}"),
    "broken-quotes": Kind("plain", outcome="bad_row", line='"{key},{url},{caption}\n"'),
    "same-key": Kind("plain", outcome="duplicate_key", line="{first},{url},{caption}"),
}
USABLE = [name for name, kind in KINDS.items() if kind.outcome == ENCODED]
# Limits for faults on loopback: short enough for a test, long enough for usable rows on a busy machine.
DOWNLOAD = DownloadSpec(
    max_bytes=16_000_000,
    read_seconds=3.0,
    total_seconds=20.0,
    rate_seconds=1.0,
    attempts=2,
    backoff_seconds=0.05,
    max_backoff_seconds=1.0,
)
DECODE = DecodeSpec(seconds=6.0, memory_bytes=1 << 30)


@dataclass(frozen=True)
class Row:
    """One row of the table: its kind, its expected outcome, and the provenance of a correct success."""

    kind: str
    outcome: str
    scene: int
    caption: str
    sha256: str


@dataclass(frozen=True)
class Audit:
    """The outcomes of the rows; the lists are empty if every row has its expected outcome."""

    rows: int
    found: dict[str, int]
    expected: dict[str, int]
    lost: list[str]  # rows that are in no shard
    wrong_successes: list[str]  # encoded although they are not usable, or with another row's file or caption
    wrong_reasons: list[str]

    @property
    def clean(self) -> bool:
        return not (self.lost or self.wrong_successes or self.wrong_reasons) and self.found == self.expected


def write_rig(folder: Path, size: int, each: int = 1, rows: int = 0, seed: int = 0) -> list[Row]:
    """Writes the table and `files/` into a folder: every kind `each` times, usable ones up to `rows`, shuffled.

    Returns the rows in the order of the table.
    """
    rng = np.random.default_rng(seed)
    kinds = [name for name in KINDS for _ in range(each)]
    kinds += [str(name) for name in rng.choice(USABLE, max(0, rows - len(kinds)))]
    rng.shuffle(kinds)
    first = kinds.index("plain")  # whose key others repeat
    kinds[0], kinds[first] = kinds[first], kinds[0]
    (folder / "files").mkdir(parents=True, exist_ok=True)
    made: list[Row] = []
    lines = ["videoid,contentUrl,name"]
    hashes: dict[str, str] = {}
    for number, name in enumerate(kinds):
        kind, scene = KINDS[name], number % SCENES
        # Of a kind that costs a decoder seconds one file is enough; the others are drawn from many scenes.
        file = f"{kind.file}-{0 if kind.file in ('slow', 'bomb') else scene}"
        if file not in hashes:
            content = make_file(kind.file, scene, size)
            (folder / "files" / file).write_bytes(content)
            hashes[file] = sha256(content).hexdigest()
        # The query makes each row another address, so that a fault that heals does so for every row.
        url, caption = f"{kind.answer}/{file}?row={number}", draw_scene(scene).caption
        lines.append(kind.line.format(key=FIRST_KEY + number, first=FIRST_KEY, url=url, caption=caption))
        written = f'{caption}, said "so"' if name == "quoted" else caption
        made.append(Row(name, kind.outcome, scene, written, hashes[file]))
    (folder / TABLE).write_text("\n".join(lines) + "\n")
    return made


def audit(dataset: str, rows: list[Row]) -> Audit:
    """Compares every row of a finished data set with its expected outcome."""
    manifest, _ = read_manifest(dataset)
    found: dict[int, str] = {}
    twice: list[int] = []
    for shard in manifest.shards:
        index = read_shard_manifest(dataset, shard.shard)
        assert index is not None, shard.shard
        begin = shard.rows[0] - index.start  # of a table that was prepared at once, rows are in its order
        outcomes = [(begin + row, ENCODED) for row in index.clips()]
        outcomes += [(begin + failure.row, failure.reason) for failure in index.failures]
        twice += [row for row, _ in outcomes if row in found]
        found |= dict(outcomes)
    honest = _honest(dataset, rows)

    def describe(number: int) -> str:
        return f"row {number}, {rows[number].kind}: {found.get(number)}, expected {rows[number].outcome}"

    wrong = [n for n in range(len(rows)) if n in found and found[n] != rows[n].outcome]
    bad = {n for n in wrong if found[n] == ENCODED} | {n for n in found if found[n] == ENCODED and n not in honest}
    return Audit(
        rows=manifest.rows,
        found=dict(sorted(Counter(found.values()).items())),
        expected=dict(sorted(Counter(row.outcome for row in rows).items())),
        lost=[describe(n) for n in range(len(rows)) if n not in found] + [f"row {n} occurs twice" for n in twice],
        wrong_successes=[describe(n) for n in sorted(bad)],
        wrong_reasons=[describe(n) for n in wrong if n not in bad],
    )


def _honest(dataset: str, rows: list[Row]) -> set[int]:
    """Returns the rows whose samples have their own file, key and caption."""
    data = ShardDataset(dataset)
    honest: set[int] = set()
    for index in range(len(data)):
        sample = data.read(index, ("caption", "meta"))
        number = int(clip_key_of(sample["key"])) - FIRST_KEY
        provenance = (clip_key_of(sample["key"]), sample["caption"], sample["meta"]["sha256"])
        if provenance == (str(FIRST_KEY + number), rows[number].caption, rows[number].sha256):
            honest.add(number)
    return honest
