"""Reads a folder of videos: a caption beside each (`clip.mp4`, `clip.txt`), or its class folder's name as prompt."""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Iterator

import fsspec
from fsspec.spec import AbstractFileSystem

from infra import storage
from tasks.ingest.rows import Row, reading, text_cells
from tasks.records import UserError

_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ogv", ".flv"),
    *(".mpg", ".mpeg", ".ts", ".wmv", ".asf", ".gif"),
)
_MAX_CAPTION_BYTES = 1 << 16  # of a file; what is longer is no caption
_BATCH = 256  # caption files read at once: on an object store each alone is a round trip


def is_folder(address: str) -> bool:
    """Whether a folder lies at an address. Over HTTP there are none."""
    if address.startswith(("http://", "https://")):
        return False
    with reading(address):
        filesystem, path = fsspec.core.url_to_fs(storage.absolute(address))
        return bool(filesystem.isdir(path))


def kind_of_folder(address: str) -> str:
    """ "classes" where every video lies in a subfolder and none has a caption beside it, else "folder"."""
    sizes = _list_files(address)[2]
    videos = _videos(sizes)
    return "classes" if all("/" in name and _caption_file(name) not in sizes for name in videos) else "folder"


def read_folder(address: str, kind: str) -> Iterator[Row]:
    """Rows in the order of their sorted names, which are held in memory; a key is the path without its suffix.

    Args:
        kind: "folder", where `a/clip.mp4` has its caption in `a/clip.txt`; or "classes", where the caption of
            `fire/a.mp4` is "fire" (underscores read as spaces).
    Raises:
        UserError: no folder, or no videos in it.
    """
    return (row for _, _, row in _entries(address, kind))


def folder_digest(address: str, kind: str) -> str:
    """sha256 over the sorted names, the sizes and the captions of the videos; their bytes are not read."""
    hasher = hashlib.sha256()
    for entry in _entries(address, kind):
        hasher.update(json.dumps(entry).encode() + b"\n")
    return hasher.hexdigest()


def _entries(address: str, kind: str) -> Iterator[tuple[str, int, Row]]:
    filesystem, folder, sizes = _list_files(address)
    names = _videos(sizes)
    for begin in range(0, len(names), _BATCH):
        batch = names[begin : begin + _BATCH]
        captions = {} if kind == "classes" else _read_captions(filesystem, folder, sizes, batch)
        for name in batch:
            caption = captions.get(name, "")
            if kind == "classes":
                caption = name.partition("/")[0].replace("_", " ") if "/" in name else ""
            url = f"./{name}" if ":" in name else name  # else a colon would end a scheme
            yield name, sizes[name], text_cells([posixpath.splitext(name)[0], url, caption])


def _read_captions(
    filesystem: AbstractFileSystem, folder: str, sizes: dict[str, int], names: list[str]
) -> dict[str, str]:
    """The captions of some videos by name; a video without a caption, or with far too long a one, is left out.

    A store that fails stops the source: a caption that comes and goes would make another data set each time.
    """
    wanted = [name for name in names if 0 < sizes.get(_caption_file(name), 0) <= _MAX_CAPTION_BYTES]
    paths = [f"{folder}/{_caption_file(name)}" for name in wanted]
    with reading(folder, "a folder of videos"):
        texts = filesystem.cat_ranges(paths, [0] * len(paths), [_MAX_CAPTION_BYTES] * len(paths), on_error="raise")
    return {name: bytes(text).decode("utf-8-sig", "replace") for name, text in zip(wanted, texts, strict=True)}


def _list_files(address: str) -> tuple[AbstractFileSystem, str, dict[str, int]]:
    """The file system, the folder in it, and the size in bytes of each file below, hidden ones left out."""
    if not is_folder(address):
        raise UserError(f"no folder at {address}; give a folder of videos that can be listed (not over HTTP)")
    with reading(address, "a folder of videos"):
        filesystem, folder = fsspec.core.url_to_fs(storage.absolute(address))
        folder = folder.rstrip("/")
        filesystem.invalidate_cache()  # another process may have written since this one listed the folder
        files = filesystem.find(folder, detail=True)
    sizes = {name.removeprefix(folder).lstrip("/"): int(info["size"] or 0) for name, info in files.items()}
    sizes = {name: size for name, size in sizes.items() if not any(part.startswith(".") for part in name.split("/"))}
    if not _videos(sizes):
        raise UserError(
            f"folder {address} holds no videos ({', '.join(_SUFFIXES[:5])}, ...); give one that does, or a table"
        )
    return filesystem, folder, sizes


def _videos(sizes: dict[str, int]) -> list[str]:
    return sorted(name for name in sizes if name.lower().endswith(_SUFFIXES))


def _caption_file(name: str) -> str:
    return posixpath.splitext(name)[0] + ".txt"
