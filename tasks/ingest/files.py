"""Finds the files of a source: one file, several with commas, a glob, or a folder of tables."""

from __future__ import annotations

import itertools
import posixpath
import re

import fsspec

from infra import storage
from tasks.ingest import folders
from tasks.ingest.rows import reading
from tasks.records import UserError

ENDINGS = {
    **{".csv": "csv", ".tsv": "csv", ".tab": "csv", ".parquet": "parquet", ".pq": "parquet"},
    **{".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".tar": "tar"},
}
_COMPRESSED = re.compile(r"\.(gz|bz2|xz|zst|zip)$")
_GLOB = re.compile(r"[*?\[]")


def is_over_http(address: str) -> bool:
    return address[:8].lower().startswith(("http://", "https://"))


def ending_of(address: str) -> str:
    """Returns the end of a file's name in lower case, without that of a compression."""
    path = re.split(r"[?#]", address)[0] if is_over_http(address) else address
    return posixpath.splitext(_COMPRESSED.sub("", path.lower()))[1]


def files_of(table: str) -> list[str]:
    """Returns the files of a source: those that a list with commas or a glob names, or the table itself.

    A table that exists under its whole name is one file, whatever characters the name has.

    Raises:
        UserError: a glob that matches nothing or cannot be listed.
    """
    if is_over_http(table) and "," not in table:
        return [table]
    if not is_over_http(table) and ((not _GLOB.search(table) and "," not in table) or _exists(table)):
        return [table]
    files: list[str] = []
    for part in (part.strip() for part in table.split(",")):
        if part:
            files += _matching(part) if _GLOB.search(part) and not is_over_http(part) else [part]
    return list(dict.fromkeys(files)) if len(files) != 1 else files


def folder_of(files: list[str]) -> str:
    """Returns the folder that the rows of several files are relative to: the deepest that contains all of them."""
    if is_over_http(files[0]):
        return ""
    parents = [storage.parent(storage.absolute(file)).split("/") for file in files]
    same = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*parents, strict=False))
    return "/".join(names[0] for names in same) or "/"


def tables_in(folder: str) -> list[str]:
    """Returns the tables in a folder, by name: of the format that most of their bytes have.

    Names that begin with a dot or an underscore, which Spark and Dask write next to their parts, are left out.
    """
    _, _, sizes = folders.list_files(folder)
    bytes_of: dict[str, int] = {}
    kinds: dict[str, str] = {}
    for name, size in sizes.items():
        ending = ending_of(name)
        if ending in ENDINGS and not any(part.startswith("_") for part in name.split("/")):
            kinds[name] = ENDINGS[ending]
            bytes_of[kinds[name]] = bytes_of.get(kinds[name], 0) + size
    # The tables of video2dataset lie next to tars that contain the same rows.
    chosen = "tar" if "tar" in bytes_of else max(bytes_of, key=lambda kind: (bytes_of[kind], kind), default=None)
    root = storage.absolute(folder)
    return [storage.join(root, name) for name in sorted(kinds) if kinds[name] == chosen]


def _exists(table: str) -> bool:
    try:
        with reading(table):
            return storage.exists(table)
    except (UserError, storage.StorageError):
        return False


def _matching(pattern: str) -> list[str]:
    pattern = storage.absolute(pattern)
    with reading(pattern, "tables"):
        filesystem, path = fsspec.core.url_to_fs(pattern)
        filesystem.invalidate_cache()
        names = filesystem.glob(path)
        names = [name for name in names if not posixpath.basename(name).startswith((".", "_"))]
        files = sorted(filesystem.unstrip_protocol(name) for name in names if not filesystem.isdir(name))
    if not files:
        raise UserError(f"no file matches {pattern!r}; give the address of tables, with * for any part of a name")
    local = storage.local_path(pattern) is not None
    return [file.removeprefix("file://") if local else file for file in files]
