"""Reads a folder of videos: captions next to them (`clip.mp4`, `clip.txt`), or class folders as captions."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
from collections import Counter
from collections.abc import Iterator

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from infra import storage
from tasks.ingest.rows import NAMES, Row, reading, rows_of
from tasks.records import UserError

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ogv", ".flv"),
    *(".mpg", ".mpeg", ".ts", ".wmv", ".asf", ".gif"),
    *(".3gp", ".3g2", ".mts", ".m2ts", ".m2t", ".mxf", ".vob"),
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


def kind_of_folder(address: str) -> str | None:
    """Returns "classes" if every video lies in a subfolder and none has a caption file, "folder", or None if none."""
    sizes = list_files(address)[2]
    videos = _videos(sizes)
    if not videos:
        return None
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
    for _, size, row in _entries(address, kind):
        yield row if isinstance(row, str) else row._replace(size_bytes=size)


def folder_digest(address: str, kind: str) -> str:
    """Returns the sha256 over the sorted names, the sizes and the captions of the videos; their bytes are not read."""
    hasher = hashlib.sha256()
    for name, size, row in _entries(address, kind):
        # Key, URL and caption: a folder has no spans.
        entry = (name, size, row if isinstance(row, str) else row[: len(NAMES)])
        hasher.update(json.dumps(entry).encode() + b"\n")
    return hasher.hexdigest()


def passed_over(address: str) -> dict[str, int]:
    """Returns how many files of a folder are neither videos nor their captions, by the end of the name."""
    sizes = list_files(address)[2]
    captions = {_caption_file(name) for name in _videos(sizes)}
    others = [name for name in sizes if name not in captions and not name.lower().endswith(VIDEO_SUFFIXES)]
    return dict(sorted(Counter(posixpath.splitext(name)[1].lower() or "no ending" for name in others).items()))


def _entries(address: str, kind: str) -> Iterator[tuple[str, int, Row]]:
    filesystem, folder, sizes = list_files(address)
    names = _videos(sizes)
    if not names:
        raise UserError(
            f"folder {address} contains no videos ({', '.join(VIDEO_SUFFIXES[:5])}, ...); give another, or a table"
        )
    for begin in range(0, len(names), _BATCH):
        batch = names[begin : begin + _BATCH]
        captions = {} if kind == "classes" else _read_captions(filesystem, folder, sizes, batch)
        for name in batch:
            caption = captions.get(name, "")
            if kind == "classes":
                caption = name.partition("/")[0].replace("_", " ") if "/" in name else ""
            url = f"./{name}" if ":" in name else name  # otherwise a colon would look like the end of a scheme
            values: dict[str, str] = dict(zip(NAMES, (posixpath.splitext(name)[0], url, caption), strict=True))
            yield from ((name, sizes[name], row) for row in rows_of(values))


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


def list_files(address: str) -> tuple[AbstractFileSystem, str, dict[str, int]]:
    """Returns the file system, the folder in it, and the sizes in bytes of all files below except hidden ones.

    Links to files and folders are followed on a local disk; a folder that contains itself is read once.
    """
    if not is_folder(address):
        raise UserError(f"no folder at {address}; give a folder of videos that can be listed (not over HTTP)")
    with reading(address, "a folder of videos"):
        filesystem, folder = fsspec.core.url_to_fs(storage.absolute(address))
        folder = folder.rstrip("/")
        filesystem.invalidate_cache()  # another process may have written since the last listing
        if isinstance(filesystem, LocalFileSystem):
            sizes = dict(_local_files(folder, (os.path.realpath(folder),)))
        else:
            files = filesystem.find(folder, detail=True)
            sizes = {name.removeprefix(folder).lstrip("/"): int(info["size"] or 0) for name, info in files.items()}
    sizes = {name: size for name, size in sizes.items() if not any(part.startswith(".") for part in name.split("/"))}
    return filesystem, folder, sizes


def _local_files(folder: str, above: tuple[str, ...], prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yields (name, size) of the files below a local folder; `above` are the real paths of it and its parents."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir():
            real = os.path.realpath(entry.path)
            if real not in above:
                yield from _local_files(entry.path, (*above, real), f"{prefix}{entry.name}/")
        else:
            # A link to nothing is a file that is missing, so that its row is counted.
            yield f"{prefix}{entry.name}", entry.stat().st_size if os.path.exists(entry.path) else 0


def _videos(sizes: dict[str, int]) -> list[str]:
    return sorted(name for name in sizes if name.lower().endswith(VIDEO_SUFFIXES))


def _caption_file(name: str) -> str:
    return posixpath.splitext(name)[0] + ".txt"
