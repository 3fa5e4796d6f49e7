"""Reads a folder of videos: captions next to them (`clip.mp4`, `clip.txt`), or class folders as captions."""

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
_MAX_CAPTION_BYTES = 1 << 16  # of a caption file; a longer one is ignored
_BATCH = 256  # caption files per request; on an object store one read each would be a round trip each


def is_folder(address: str) -> bool:
    """Returns whether an address is a folder; over HTTP it never is."""
    if address.startswith(("http://", "https://")):
        return False
    with reading(address):
        filesystem, path = fsspec.core.url_to_fs(storage.absolute(address))
        return bool(filesystem.isdir(path))


def kind_of_folder(address: str) -> str:
    """Returns "classes" if every video lies in a subfolder and none has a caption file, else "folder"."""
    sizes = _list_files(address)[2]
    videos = _videos(sizes)
    return "classes" if all("/" in name and _caption_file(name) not in sizes for name in videos) else "folder"


def read_folder(address: str, kind: str) -> Iterator[Row]:
    """Returns the rows in the order of the sorted names, which are kept in memory; a key is the path without suffix.

    Args:
        address: of the folder.
        kind: "folder", where `a/clip.mp4` has its caption in `a/clip.txt`; or "classes", where the caption of
            `fire/a.mp4` is "fire" (underscores read as spaces).
    Raises:
        UserError: there is no folder, or it contains no videos.
    """
    return (row for _, _, row in _entries(address, kind))


def folder_digest(address: str, kind: str) -> str:
    """Returns the sha256 over the sorted names, the sizes and the captions of the videos; their bytes are not read."""
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
            url = f"./{name}" if ":" in name else name  # otherwise a colon would look like the end of a scheme
            yield name, sizes[name], text_cells([posixpath.splitext(name)[0], url, caption])


def _read_captions(
    filesystem: AbstractFileSystem, folder: str, sizes: dict[str, int], names: list[str]
) -> dict[str, str]:
    """Returns the captions of some videos by name; videos without a caption, or with too long a one, are omitted.

    A failing store raises: captions that are missing at times would change the data set from run to run.
    """
    wanted = [name for name in names if 0 < sizes.get(_caption_file(name), 0) <= _MAX_CAPTION_BYTES]
    paths = [f"{folder}/{_caption_file(name)}" for name in wanted]
    with reading(folder, "a folder of videos"):
        texts = filesystem.cat_ranges(paths, [0] * len(paths), [_MAX_CAPTION_BYTES] * len(paths), on_error="raise")
    return {name: bytes(text).decode("utf-8-sig", "replace") for name, text in zip(wanted, texts, strict=True)}


def _list_files(address: str) -> tuple[AbstractFileSystem, str, dict[str, int]]:
    """Returns the file system, the folder in it, and the sizes in bytes of all files below except hidden ones."""
    if not is_folder(address):
        raise UserError(f"no folder at {address}; give a folder of videos that can be listed (not over HTTP)")
    with reading(address, "a folder of videos"):
        filesystem, folder = fsspec.core.url_to_fs(storage.absolute(address))
        folder = folder.rstrip("/")
        filesystem.invalidate_cache()  # another process may have written since the last listing
        files = filesystem.find(folder, detail=True)
    sizes = {name.removeprefix(folder).lstrip("/"): int(info["size"] or 0) for name, info in files.items()}
    sizes = {name: size for name, size in sizes.items() if not any(part.startswith(".") for part in name.split("/"))}
    if not _videos(sizes):
        raise UserError(
            f"folder {address} contains no videos ({', '.join(_SUFFIXES[:5])}, ...); give another folder, or a table"
        )
    return filesystem, folder, sizes


def _videos(sizes: dict[str, int]) -> list[str]:
    return sorted(name for name in sizes if name.lower().endswith(_SUFFIXES))


def _caption_file(name: str) -> str:
    return posixpath.splitext(name)[0] + ".txt"
