"""Reads tars of webdataset samples as sources, as video2dataset writes them; videos are read at their place in the tar.

webdataset groups the members to samples. `tarfile` lists them: it reads only headers and raises on a tar that is cut
off, where webdataset's own reader ends without an error.
"""

from __future__ import annotations

import json
import posixpath
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import fsspec

from tasks.ingest.folders import VIDEO_SUFFIXES
from tasks.ingest.rows import Row, reading, rows_of
from tasks.records import Inside, UserError

_MAX_TEXT_BYTES = 1 << 20  # of the caption or the JSON of one sample
_TEXTS = ("txt", "caption", "text")  # members with a caption, in order of preference


def read_tar(address: str, columns: dict[str, str], captions: str | int = "first") -> Iterator[Row]:
    """Yields a row for each sample of a tar. Its caption is its .txt, else a field of its .json.

    Its key is its name in the tar. If that does not begin with the tar's name, the tar's name goes before it, since
    samples of different tars may have the same name.

    Args:
        address: of the tar, which is not compressed.
        captions: of a list in the JSON: "first", "all", or a seed.
        columns: fields of the JSON, by name; a caption field of another name than `caption` goes before the .txt.
    Raises:
        UserError: the tar is compressed or damaged.
    """
    for values, inside in _samples(address, columns):
        if inside is None:
            yield f"sample {values['key']!r:.80} has no video"
        else:
            yield from rows_of(values, captions, inside)


def tar_samples(address: str, columns: dict[str, str]) -> Iterator[list[Any]]:
    """Yields what identifies each sample of a tar: its values, and the size of its video; the videos are not read."""
    for values, inside in _samples(address, columns):
        texts = {
            name: value.decode(errors="replace") if isinstance(value, bytes) else value
            for name, value in values.items()
        }
        yield [texts, inside.size if inside is not None else None]


def _samples(address: str, columns: dict[str, str]) -> Iterator[tuple[dict[str, Any], Inside | None]]:
    """Yields the values of each sample by name, and the place of its video or None."""
    from webdataset.tariterators import group_by_keys

    stem = posixpath.basename(address).split(".")[0]
    with reading(address, "an uncompressed tar"), fsspec.open(address, "rb") as opened:
        file = cast(BinaryIO, opened)
        try:
            groups = group_by_keys(iter(_members(address, file)))  # type: ignore[arg-type]
            for sample in groups:
                suffixes = {name: place for name, place in sample.items() if isinstance(place, tarfile.TarInfo)}
                video = next((suffixes[name] for name in suffixes if f".{name}".endswith(VIDEO_SUFFIXES)), None)
                fields = _json(file, suffixes["json"]) if "json" in suffixes else {}
                values: dict[str, Any] = {name: fields.get(column) for name, column in columns.items()}
                text = next((_text(file, suffixes[name]) for name in _TEXTS if name in suffixes), None)
                key = posixpath.basename(sample["__key__"])
                values["key"] = key if key.startswith(stem) else f"{stem}_{key}"
                values["url"] = None if video is None else video.name
                if text is not None and (values.get("caption") is None or columns["caption"] == "caption"):
                    values["caption"] = text
                yield values, None if video is None else Inside(address, video.offset_data, video.size)
        except tarfile.TarError as error:
            raise UserError(
                f"tar {address} cannot be read ({error}); give uncompressed, complete tars of webdataset samples"
            ) from error


def _members(address: str, file: BinaryIO) -> Iterator[dict[str, Any]]:
    """Yields the regular files of a tar as webdataset's grouping takes them, each with its header in place of data."""
    end = 0
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            end = member.offset_data + member.size
            tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it reads
            if member.isreg() and not member.issparse():
                yield {"fname": member.name, "data": member, "__url__": address}
    file.seek(0, 2)
    if file.tell() < end:
        raise tarfile.ReadError("it is cut off")


def _text(file: BinaryIO, member: tarfile.TarInfo) -> bytes | None:
    if member.size > _MAX_TEXT_BYTES:
        return None
    place = file.tell()
    file.seek(member.offset_data)
    data = file.read(member.size)
    file.seek(place)
    return data


def _json(file: BinaryIO, member: tarfile.TarInfo) -> dict[str, Any]:
    try:
        value = json.loads(_text(file, member) or b"null")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
