"""Measures a data set that grows every night: the cost of a night, the driver's memory, and a merge at the end.

    python -m benchmarks.nights [--rows 200000] [--nights 20] [--more 1000] [--plot nights.png]

Each night is `prepare` as a flow calls it, with its table, comparison, pool, index and manifest; only the samples are
synthetic: no download, no decoder, no VAE. Prints a line for each night, then the result of `verify` and of `compact`,
whose samples are compared with those of before by the hashes of all members.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from infra import storage
from tasks import shards
from tasks.curate.compact import compact
from tasks.curate.verify import problems
from tasks.encode import job
from tasks.encode.spec import PrepareSpec
from tasks.encode.work_unit import Unit
from tasks.ingest.spec import SourceSpec
from tasks.records import ClipRef, digest
from tasks.shards import (
    Outcome,
    PackedSample,
    ShardSummary,
    encode_field,
    pool_of,
    read_indexes,
    read_manifest,
    sample_key,
    stored_outcomes,
)

RECIPE = {"schema_version": 2, "num_frames": 2, "synthetic": True}
_FIRST = encode_field("first", np.zeros((8, 8, 3), np.uint8))
_TOKENS = encode_field("tokens", np.arange(8, dtype=np.int32))


def encode_synthetic(*arguments: Any) -> ShardSummary:
    """Stands for `encode_unit`: the same shard file, filled from the keys."""
    *_, pool, recipe_hash, _, unit = arguments
    assert isinstance(unit, Unit)

    def made(row: ClipRef) -> list[PackedSample]:
        seed = np.frombuffer(hashlib.sha256(row.key.encode()).digest(), np.uint8)
        latents = np.resize(seed, (2, 4, 2, 2)).astype(np.float16)
        meta = {"clip": row.key, "url": row.url, "times": [0.0, 0.25]}
        values = {"caption": row.caption, "latents": latents, "meta": meta}
        members = {name: encode_field(name, value) for name, value in values.items()}
        return [
            PackedSample(sample_key(row.key, 0), dict(sorted((members | {"first": _FIRST, "tokens": _TOKENS}).items())))
        ]

    def outcomes() -> Iterator[Outcome]:
        for row in unit.rows:
            yield made(row) if isinstance(row, ClipRef) else row

    assert unit.existing is None
    label = shards.rows_label(unit.row_ids)
    return shards.write_shard(pool, label, (0, len(unit.rows)), outcomes(), recipe_hash, row_ids=unit.row_ids).summary()


@contextlib.contextmanager
def synthetic_encoder() -> Iterator[None]:
    """Lets `prepare` run without a base, a decoder and a report page."""
    names = {"_load_encoder": mock.DEFAULT, "write_report": mock.DEFAULT, "encode_unit": encode_synthetic}
    with (
        mock.patch.multiple(job, **names),
        mock.patch.object(job, "open_decoders", return_value=contextlib.nullcontext()),
    ):
        yield


def member_hashes(dataset: str) -> tuple[int, str]:
    """Returns the number of samples and one hash of all their members, which does not depend on their order."""
    manifest = read_manifest(dataset)[0]
    pool, total, count = pool_of(dataset, manifest.recipe_hash), 0, 0
    for index in read_indexes(dataset, manifest):
        for outcome in stored_outcomes(pool, index):
            for sample in outcome if isinstance(outcome, list) else []:
                hasher = hashlib.sha256(sample.key.encode())
                for name, data in sorted(sample.members.items()):
                    hasher.update(f"{name} {len(data)} ".encode() + data)
                total, count = (total + int.from_bytes(hasher.digest(), "big")) % (1 << 256), count + 1
    return count, f"{total:064x}"


def measure(folder: Path, rows: int, nights: int, more: int) -> dict[str, Any]:
    table = folder / "clips.csv"
    dataset = str(folder / "root" / "data" / digest("clips.csv"))
    spec = PrepareSpec(SourceSpec(str(table)), dataset, "", workers=0, fingerprint=RECIPE)
    with table.open("w") as file:
        file.write("videoid,contentUrl,name\n")
    lines: list[dict[str, Any]] = []
    written = 0
    for night in range(nights + 2):  # the last one finds nothing new
        count = rows if night == 0 else more if night <= nights else 0
        with table.open("a") as file:
            for row in range(written, written + count):
                file.write(f"{10**9 + row},https://example.org/{row}.mp4,a man walks along beach number {row}\n")
        written += count
        began = time.perf_counter()
        with synthetic_encoder():
            report = job.prepare(replace(spec))
        lines.append(
            {
                "night": night,
                "new_rows": count,
                "rows": report.rows,
                "shards_made": report.shards - report.shards_reused,
                "seconds": round(time.perf_counter() - began, 2),
                "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            }
        )
        print(json.dumps(lines[-1]), flush=True)
    before = member_hashes(dataset)
    began = time.perf_counter()
    merged = compact(dataset)
    seconds = round(time.perf_counter() - began, 2)
    return {
        "nights": lines,
        "compact": {
            "shards_before": merged.before,
            "shards_after": merged.after,
            "seconds": seconds,
            "equal_samples": member_hashes(dataset) == before,
            "samples": before[0],
        },
        "verify_problems": list(problems(dataset, workers=2)),
        "pool_files": len(storage.list_dir(pool_of(dataset, digest(RECIPE)))),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def plot(lines: list[dict[str, Any]], path: str) -> None:
    """Draws seconds and peak memory over the nights after the first."""
    from matplotlib.figure import Figure

    figure = Figure((7, 3))
    left, right = figure.subplots(1, 2)
    x = [line["night"] for line in lines[1:]]
    left.plot(x, [line["seconds"] for line in lines[1:]])
    left.set(xlabel="night", ylabel="seconds", ylim=(0, None))
    right.plot(x, [line["peak_mb"] for line in lines[1:]])
    right.set(xlabel="night", ylabel="peak memory of the driver, MB", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--nights", type=int, default=20)
    parser.add_argument("--more", type=int, default=1000)
    parser.add_argument("--plot")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="trip-nights-"))
    try:
        result = measure(folder, given.rows, given.nights, given.more)
    finally:
        shutil.rmtree(folder)
    if given.plot:
        plot(result["nights"], given.plot)
    print(json.dumps({name: value for name, value in result.items() if name != "nights"}, indent=2))


if __name__ == "__main__":
    main()
