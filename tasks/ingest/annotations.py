"""Reads sources that are one JSON document: MSR-VTT's annotation and samples written by this project."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import fsspec

from infra import storage
from tasks.ingest.rows import Row, reading, text_cells
from tasks.records import UserError

SAMPLE_SCHEMA = "trip-sample/1"
MAX_DOCUMENT_BYTES = 1 << 28  # a document is read at once; MSR-VTT's has 40 MB


def is_sample(address: str) -> bool:
    """Returns whether a JSON file begins like a sample of this project."""
    with reading(address, "a JSON file"), fsspec.open(address, "rb", compression="infer") as file:
        return SAMPLE_SCHEMA.encode() in file.read(64)  # type: ignore[attr-defined]


def read_msrvtt(address: str, split: str | None, captions: str | int) -> Iterator[Row]:
    """Yields the rows of MSR-VTT's annotation: `videos` (video_id, split) and `sentences` (video_id, caption).

    A clip is the file `<video_id>.mp4`, since the URLs in the annotation are YouTube pages. Rows keep the order of the
    document, and splits are its own (officially 6,513 train, 497 validate, 2,990 test).

    Args:
        address: of the JSON document.
        split: takes only the clips of this split; None takes all.
        captions: "first" or "all" of a clip's 20 captions (a row `<video_id>-<number>` each), or a seed that draws one.
    Raises:
        UserError: the document is not MSR-VTT's annotation, or has no such split.
    """
    document = _load(address, "MSR-VTT's annotation")
    videos, sentences = document.get("videos"), document.get("sentences")
    if not isinstance(videos, list) or not isinstance(sentences, list) or not videos:
        raise UserError(
            f"{address} has no videos with sentences; give MSR-VTT's annotation or a sample of this project"
        )
    captions_of: dict[Any, list[Any]] = defaultdict(list)
    for sentence in sentences:
        if isinstance(sentence, dict):
            captions_of[str(sentence.get("video_id"))].append(sentence.get("caption"))
    splits = sorted({str(video.get("split")) for video in videos if isinstance(video, dict)})
    if split is not None and split not in splits:
        raise UserError(f"{address} has no split {split!r}; it has {', '.join(map(repr, splits))}")
    for video in videos:
        name = video.get("video_id") if isinstance(video, dict) else None
        if not isinstance(name, str):
            yield "a video without a video_id"
        elif split is None or video.get("split") == split:
            for key, caption in _choose(name, captions_of[name], captions):
                yield text_cells([key, f"{name}.mp4", caption])


def read_sample(address: str) -> Iterator[Row]:
    """Yields the rows of a sample. Raises UserError if the document is not a sample or was changed."""
    document = _load(address, "a sample")
    rows = document.get("rows")
    if document.get("schema") != SAMPLE_SCHEMA or not isinstance(rows, list):
        raise UserError(f"{address} is not a sample of schema {SAMPLE_SCHEMA!r}; write one with the command sample")
    with reading(address, "a sample"):
        sha256 = sample_sha256(document)
    if document.get("sha256") != sha256:
        raise UserError(f"sample {address} does not match its sha256; it was changed, write it again")
    for row in rows:
        if isinstance(row, dict):
            yield text_cells([row.get("key"), row.get("url"), row.get("caption")])
        else:
            yield "not an object"


def sample_sha256(document: dict[str, Any]) -> str:
    """Returns the hash of a sample without its own hash, over the canonical JSON."""
    return hashlib.sha256(storage.json_bytes({k: v for k, v in document.items() if k != "sha256"})).hexdigest()


def _choose(name: str, captions: list[Any], choice: str | int) -> Iterator[tuple[str, Any]]:
    if choice == "all" and captions:
        yield from ((f"{name}-{number:02d}", caption) for number, caption in enumerate(captions))
        return
    mark = 0 if isinstance(choice, str) else int(hashlib.sha256(f"{choice}\0{name}".encode()).hexdigest(), 16)
    yield name, captions[mark % len(captions)] if captions else None


def _load(address: str, wanted: str) -> dict[str, Any]:
    with reading(address, wanted), fsspec.open(address, "rb", compression="infer") as file:
        data = file.read(MAX_DOCUMENT_BYTES + 1)  # type: ignore[attr-defined]
        if len(data) > MAX_DOCUMENT_BYTES:
            raise UserError(f"{address} has more than {MAX_DOCUMENT_BYTES} bytes; give a table of JSON lines instead")
        try:
            value = json.loads(data)
        except RecursionError as error:
            raise ValueError("JSON that is nested too deep") from error
    return value if isinstance(value, dict) else {}
