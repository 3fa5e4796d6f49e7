"""Draws a seeded sample of a source and writes it as a JSON file, which is a source of format "sample"."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from infra import storage
from tasks.ingest.annotations import MAX_DOCUMENT_BYTES, SAMPLE_SCHEMA, sample_sha256
from tasks.ingest.sources import has_scheme, local_root, read_rows, resolve_url, source_identity
from tasks.ingest.spec import SourceSpec
from tasks.records import ClipRef, UserError
from tasks.shards.split import SPLIT_RULE


@dataclass(frozen=True)
class SampleReport:
    """A written sample: `rows` of the `usable` rows in the source's split."""

    sample: str  # address of the file
    rows: int
    usable: int
    sha256: str


def sample_rows(spec: SourceSpec, count: int, seed: int) -> tuple[list[ClipRef], int]:
    """Returns the `count` usable rows with the lowest hashes of seed and key, in order, and the number of usable rows.

    The hash depends on the key only, so the order of the rows does not matter, and a sample begins with every smaller
    sample of its seed. Only `count` rows are in memory at once.

    Raises:
        UserError: the source cannot be read, or has fewer usable rows.
    """
    if count < 1:
        raise UserError(f"a sample of {count} rows, expected at least 1")
    usable = 0

    def refs() -> Iterator[ClipRef]:
        nonlocal usable
        for row in read_rows(spec):
            if isinstance(row, ClipRef):
                usable += 1
                yield row

    chosen = heapq.nsmallest(count, refs(), key=lambda ref: hashlib.sha256(f"{seed}\0{ref.key}".encode()).digest())
    if usable < count:
        part = f"split {spec.split!r} of {spec.table}" if spec.split is not None else spec.table
        raise UserError(f"{part} has {usable} usable rows, expected at least {count}; give a smaller count")
    return chosen, usable


def write_sample(spec: SourceSpec, count: int, seed: int, output: str) -> SampleReport:
    """Writes a sample, the options that determine it, and a sha256 over both; equal calls write equal bytes.

    A sample of rows with paths relative to the source must lie in the source's folder, where they resolve.

    Raises:
        UserError: as `sample_rows`; such a sample lies elsewhere; the output cannot be written.
    """
    output = storage.absolute(output)
    root = local_root(spec)
    rows, usable = sample_rows(spec, count, seed)
    if any(row.inside is not None for row in rows):
        raise UserError(f"videos of {spec.table} lie inside of its files, where no sample can name them; give --limit")
    if spec.base_url is None and root is None:
        urls = [resolve_url(spec, row.url) for row in rows]
    else:
        urls = [row.url for row in rows]
        relative = any(not has_scheme(url) for url in urls)
        if relative and spec.base_url is None and storage.parent(output) != root:
            raise UserError(
                f"rows of {spec.table} name files in its folder, not in that of {output}; write into {root}"
            )
    identity = source_identity(spec)
    document = {
        "schema": SAMPLE_SCHEMA,  # first in the file, where a reader looks for it
        "source": identity | {"limit": spec.limit},
        "split_rule": SPLIT_RULE if "held_out" in identity else None,
        "seed": seed,
        "order": "sha256(seed, a zero byte, key), lowest first",
        "usable": usable,
        "rows": [_row(row, url) for row, url in zip(rows, urls, strict=True)],
    }
    document["sha256"] = sample_sha256(document)
    data = json.dumps(document, indent=1, ensure_ascii=False).encode() + b"\n"
    if len(data) > MAX_DOCUMENT_BYTES:
        raise UserError(
            f"a sample of {count} rows takes {len(data)} bytes, at most {MAX_DOCUMENT_BYTES}; give a smaller count"
        )
    try:
        storage.write_bytes(output, data)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror or error}); give another --output") from error
    return SampleReport(output, len(rows), usable, document["sha256"])


def _row(row: ClipRef, url: str) -> dict[str, Any]:
    span = {} if row.span is None else {"start": row.start} | ({} if row.end is None else {"end": row.end})
    return {"key": row.key, "url": url, "caption": row.caption} | span
