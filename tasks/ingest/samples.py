"""Draws a seeded sample of a source and writes it as a manifest, which is a source itself (format "sample")."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterator
from dataclasses import dataclass

from infra import storage
from tasks.ingest.annotations import MAX_DOCUMENT_BYTES, SAMPLE_SCHEMA, sample_sha256
from tasks.ingest.rows import SPLIT_RULE
from tasks.ingest.sources import has_scheme, local_root, read_rows, resolve_url, source_identity
from tasks.ingest.spec import SourceSpec
from tasks.records import ClipRef, UserError


@dataclass(frozen=True)
class SampleReport:
    """A written sample: `rows` of the `usable` rows that the source's split has."""

    sample: str  # address of the manifest
    rows: int
    usable: int
    sha256: str


def sample_rows(spec: SourceSpec, count: int, seed: int) -> tuple[list[ClipRef], int]:
    """The `count` usable rows whose keys hash lowest with the seed, lowest first, and how many rows are usable.

    A row's hash is its own, so the order of the rows does not matter, and a sample begins with every smaller one. Only
    `count` rows are held at once.

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
        of = f"split {spec.split!r} of {spec.table}" if spec.split is not None else spec.table
        raise UserError(f"{of} has {usable} usable rows, which is no sample of {count}; ask for fewer")
    return chosen, usable


def write_sample(spec: SourceSpec, count: int, seed: int, output: str) -> SampleReport:
    """Writes a sample with all that decides it and a sha256 over both; the same call writes the same bytes.

    Rows that name files beside the source are readable from its folder alone, so such a sample must lie there.

    Raises:
        UserError: as `sample_rows`; a sample of such rows elsewhere; an output that cannot be written.
    """
    output = storage.absolute(output)
    root = local_root(spec)
    rows, usable = sample_rows(spec, count, seed)
    if spec.base_url is None and root is None:
        urls = [resolve_url(spec, row.url) for row in rows]
    else:
        urls = [row.url for row in rows]
        beside = any(not has_scheme(url) for url in urls)
        if beside and spec.base_url is None and storage.parent(output) != root:
            raise UserError(f"rows of {spec.table} name files beside it, not beside {output}; write into {root}")
    identity = source_identity(spec)
    document = {
        "schema": SAMPLE_SCHEMA,  # first in the file, where a reader looks for it
        "source": identity | {"limit": spec.limit},
        "split_rule": SPLIT_RULE if "held_out" in identity else None,
        "seed": seed,
        "order": "sha256(seed, a zero byte, key), lowest first",
        "usable": usable,
        "rows": [{"key": row.key, "url": url, "caption": row.caption} for row, url in zip(rows, urls, strict=True)],
    }
    document["sha256"] = sample_sha256(document)
    data = json.dumps(document, indent=1, ensure_ascii=False).encode() + b"\n"
    if len(data) > MAX_DOCUMENT_BYTES:
        raise UserError(
            f"a sample of {count} rows takes {len(data)} bytes, at most {MAX_DOCUMENT_BYTES}; ask for fewer"
        )
    try:
        storage.write_bytes(output, data)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror or error}); give another --output") from error
    return SampleReport(output, len(rows), usable, document["sha256"])
