"""Reads and writes at any fsspec address (a path, s3://, memory://); a reader never sees a half-written file."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.spec import AbstractFileSystem

from infra.redaction import redact

_TEMPORARY_SUFFIX = ".part"
# Packages whose errors `boundary` explains; a missing file, a forbidden one and a full store are OSErrors already.
_LIBRARIES = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure", "adlfs", "requests", "urllib3")
_NO_RESPONSE = re.compile("Connect|Timeout|Closed|HTTPClient|IncompleteRead|Payload")  # in the names of their errors

BUSY_SECONDS = 120.0  # how long an object store may answer that it is busy or down (503), before a call fails
_patient = ContextVar("patient", default=True)
_LONGEST_PAUSE_SECONDS = 10.0

# Some S3 servers (rclone's) answer a read of a part with the checksum of the whole object, and botocore then takes the
# part for damaged. What is read here has hashes of our own.
os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")

_log = logging.getLogger(__name__)


class StorageError(Exception):
    """A store cannot be used: credentials or a library are missing, or it does not respond."""


class StoreNotResponding(StorageError):
    """A store does not respond, or stopped in the middle; a later attempt may succeed."""


@contextlib.contextmanager
def boundary(uri: str) -> Iterator[None]:
    """Converts errors of a store's library that are no `OSError` into `StorageError`; the log has the original text."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.split(".")[0] not in _LIBRARIES:
            raise
        _log.debug("%s", redact(str(error)), exc_info=error)
        kind, text = type(error).__name__, redact(" ".join(str(error).split()))
        if "Credential" in kind or "Token" in kind:
            remedy = (
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), for Ray workers in the environment"
                " of their machines"
            )
        else:
            remedy = "check the address, its endpoint (AWS_ENDPOINT_URL) and the network"
        problem = StoreNotResponding if _NO_RESPONSE.search(kind) else StorageError
        raise problem(f"{redact(uri)} cannot be used ({kind}: {text}); {remedy}") from error


def local_path(uri: str) -> Path | None:
    """The local path of an address, or None if it is in another store."""
    if uri.startswith("file://"):
        return Path(uri.removeprefix("file://"))
    return None if "://" in uri else Path(uri)


def absolute(uri: str) -> str:
    """A local path made absolute (`~` expanded, `file://` removed); any other address without its final slash."""
    path = local_path(uri)
    if path is None:
        return uri.rstrip("/")
    return os.path.abspath(path.expanduser())


def join(uri: str, *parts: str) -> str:
    """The address `parts` below `uri`, always with forward slashes."""
    return "/".join([uri.rstrip("/") if uri != "/" else "", *(part.strip("/") for part in parts)])


def parent(uri: str) -> str:
    """The parent folder of an address; "." for a bare file name."""
    path = local_path(uri)
    return str(path.parent) if path is not None else uri.rstrip("/").rsplit("/", 1)[0]


def exists(uri: str) -> bool:
    path = local_path(uri)
    if path is not None:
        return path.exists()
    with boundary(uri):
        filesystem, name = _remote(uri)
        return bool(filesystem.exists(name))


def read_bytes(uri: str) -> bytes:
    """Reads the content of one address. Raises FileNotFoundError when there is none."""
    path = local_path(uri)
    if path is not None:
        return path.read_bytes()
    with boundary(uri):
        filesystem, name = _remote(uri)
        return cast(bytes, filesystem.cat_file(name))


def read_range(uri: str, start: int, end: int) -> bytes:
    """Bytes start (inclusive) to end (exclusive) of one address; fewer where the file ends before."""
    path = local_path(uri)
    if path is not None:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(end - start)
    with boundary(uri):
        filesystem, name = _remote(uri)
        return cast(bytes, filesystem.cat_file(name, start=start, end=end))


def open_stream(uri: str) -> BinaryIO:
    """Opens one address for reading in pieces. Raises FileNotFoundError."""
    path = local_path(uri)
    if path is not None:
        return path.open("rb")
    with boundary(uri):
        filesystem, name = _remote(uri)
        return cast(BinaryIO, filesystem.open(name, "rb", cache_type="readahead"))


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """Yields one address as a local file: the file itself, else a temporary copy."""
    path = local_path(uri)
    if path is not None:
        yield path
        return
    filesystem, name = _remote(uri)
    with tempfile.TemporaryDirectory(prefix="trip-copy-") as folder:
        copy = Path(folder) / "copy"
        with boundary(uri):
            filesystem.get_file(name, str(copy))
        yield copy


def cached_file(uri: str) -> Path:
    """One address as a local file: the file itself, else a copy that stays below `~/.cache/trip-i2v/files`.

    The copy is known by its address, so the file's name must contain the hash of its content. Raises FileNotFoundError.
    """
    path = local_path(uri)
    if path is not None:
        if not path.is_file():
            raise FileNotFoundError(f"no file at {redact(uri)}")
        return path
    copy = Path.home() / ".cache" / "trip-i2v" / "files" / hashlib.sha256(uri.encode()).hexdigest()[:24]
    if not copy.is_file():
        filesystem, name = _remote(uri)
        temporary = _sibling(copy)
        try:
            with boundary(uri):
                filesystem.get_file(name, str(temporary))
            os.replace(temporary, copy)
        finally:
            temporary.unlink(missing_ok=True)
    return copy


def read_json(uri: str) -> Any:
    """Parsed JSON. Raises FileNotFoundError when missing and ValueError when it is not JSON."""
    return json.loads(read_bytes(uri))


def write_bytes(uri: str, data: bytes) -> None:
    """Writes atomically: the address holds the old content or all of the new, also after a kill or a full disk."""
    path = local_path(uri)
    if path is None:
        with boundary(uri):
            filesystem, name = _remote(uri)
            filesystem.pipe_file(name, data)  # one put is the commit; a rename would be a copy and a delete
        return
    temporary = _sibling(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def create_bytes(uri: str, data: bytes) -> bool:
    """Writes a new file, atomically; False if there is one already.

    Of several callers at once one succeeds, on local disks and on stores with conditional writes (S3's If-None-Match).
    A store that ignores the condition overwrites; see `infra.leases` for how to detect that.
    """
    path = local_path(uri)
    if path is not None:
        temporary = _sibling(path)
        try:
            temporary.write_bytes(data)
            os.link(temporary, path)  # fails if the name exists, also on NFS
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True
    with boundary(uri):
        filesystem, name = _remote(uri)
        try:
            filesystem.pipe_file(name, data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:  # of s3fs, for two writers at the same moment
            if "ConditionalRequestConflict" in str(error) or "PreconditionFailed" in str(error):
                return False
            raise
    return True


def write_json(uri: str, value: Any) -> None:
    """Writes canonical JSON (sorted keys, two spaces), atomically."""
    write_bytes(uri, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """The bytes `write_json` writes: equal values give equal bytes. Raises ValueError for NaN, which is not JSON."""
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def upload_file(local: str | Path, uri: str) -> None:
    """Copies one local file to an address, atomically."""
    path = local_path(uri)
    if path is None:
        with boundary(uri):
            filesystem, name = _remote(uri)
            filesystem.put_file(str(local), name)
        return
    temporary = _sibling(path)
    try:
        with open(local, "rb") as source, temporary.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
            target.flush()
            os.fsync(target.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def copy_file(source: str, target: str) -> None:
    """Gives a file of one store a second address in it, atomically: by a hard link if possible, else by a copy."""
    path, copy = local_path(source), local_path(target)
    if path is None or copy is None:
        with boundary(source):
            filesystem, name = _remote(source)
            filesystem.cp_file(name, _remote(target)[1])
        return
    temporary = _sibling(copy)
    try:
        os.link(path, temporary)
    except OSError:
        upload_file(path, target)
        return
    os.replace(temporary, copy)
    temporary.unlink(missing_ok=True)  # remains if both names were links of one file


@contextlib.contextmanager
def local_draft(uri: str) -> Iterator[Path]:
    """Yields a local path for one file; the end of the block moves it to the address, atomically; an error removes it.

    On local disks the draft is renamed, so the content is written once; for other stores it is in the temporary folder.
    """
    path = local_path(uri)
    if path is None:
        filesystem, name = _remote(uri)
        with tempfile.TemporaryDirectory(prefix="trip-draft-") as folder:
            draft = Path(folder) / "draft"
            yield draft
            with boundary(uri):
                filesystem.put_file(str(draft), name)
        return
    temporary = _sibling(path)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def list_dir(uri: str) -> list[str]:
    """Sorted names directly below a folder, unfinished local writes left out; empty when there is no such folder."""
    path = local_path(uri)
    if path is not None:
        names = [entry.name for entry in path.iterdir()] if path.is_dir() else []
    else:
        filesystem, folder = _remote(uri)
        try:
            with boundary(uri):
                entries = filesystem.ls(folder, detail=False)
        except FileNotFoundError:
            return []
        names = [entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry.strip("/") != folder.strip("/")]
    return sorted(name for name in names if not name.endswith(_TEMPORARY_SUFFIX))


def modified(uri: str) -> float | None:
    """When a file or local folder was last written, in seconds since 1970; None if there is none, or no time of it."""
    path = local_path(uri)
    if path is not None:
        return path.stat().st_mtime if path.exists() else None
    with boundary(uri):
        filesystem, name = _remote(uri)
        try:
            return filesystem.modified(name).timestamp()
        except (FileNotFoundError, IsADirectoryError, NotImplementedError):
            return None


def drop_unfinished(uri: str) -> None:
    """Removes the unfinished writes of killed processes from a local folder; other stores never show theirs."""
    path = local_path(uri)
    if path is not None:
        for temporary in path.glob(f".*{_TEMPORARY_SUFFIX}"):
            temporary.unlink(missing_ok=True)


def delete(uri: str) -> None:
    """Removes a file, or a folder with its content; a missing one is no error."""
    path = local_path(uri)
    if path is not None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return
    with boundary(uri):
        filesystem, name = _remote(uri)
        if filesystem.exists(name):
            filesystem.rm(name, recursive=True)


def local_folder(uri: str, cache_dir: str | Path | None = None) -> Path:
    """A folder as a local path: the path itself, else a downloaded copy below `cache_dir`.

    The copy is named after the address and the size and tag of every file in it, so a changed folder is fetched again,
    and it appears under that name only when complete. Raises FileNotFoundError when the folder is missing or empty.
    """
    path = local_path(uri)
    if path is not None:
        if not path.is_dir():
            raise FileNotFoundError(f"no folder at {redact(uri)}")
        return path
    filesystem, folder = _remote(uri)
    with boundary(uri):
        files = cast(dict[str, dict[str, Any]], filesystem.find(folder, detail=True))
    if not files:
        raise FileNotFoundError(f"no folder at {redact(uri)}")
    print_of = [(name, info.get("size"), str(info.get("ETag", info.get("mtime", "")))) for name, info in files.items()]
    name = hashlib.sha256(json.dumps([uri, sorted(print_of)]).encode()).hexdigest()[:24]
    root = Path(cache_dir) if cache_dir is not None else Path.home() / ".cache" / "trip-i2v"
    target = root / name
    if not target.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        temporary = root / f".{name}.{uuid.uuid4().hex}{_TEMPORARY_SUFFIX}"
        try:
            for remote in files:
                copy = temporary / remote.removeprefix(folder).strip("/")
                copy.parent.mkdir(parents=True, exist_ok=True)
                with boundary(uri):
                    filesystem.get_file(remote, str(copy))
            try:
                temporary.rename(target)
            except OSError:
                if not target.is_dir():  # another process fetched the same folder
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def sha256_file(path: str | Path) -> str:
    """Hex sha256 of one local file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """Within it a busy object store is an error at once, for callers that have an order and a limit of their own."""
    token = _patient.set(False)
    try:
        yield
    finally:
        _patient.reset(token)


class _Patient:
    """A file system whose methods repeat a request that the store refused because it is busy."""

    def __init__(self, filesystem: AbstractFileSystem) -> None:
        self._filesystem = filesystem

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._filesystem, name)
        return _patiently(value) if callable(value) else value


def _patiently(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*arguments: Any, **options: Any) -> Any:
        began, pause = time.monotonic(), 1.0
        while True:
            try:
                return method(*arguments, **options)
            except OSError as error:
                # s3fs raises EBUSY for 503 and SlowDown, after the few attempts of its library.
                if error.errno != errno.EBUSY or not _patient.get() or time.monotonic() - began > BUSY_SECONDS:
                    raise
                _log.warning("the store is busy, trying again: %s", redact(str(error)))
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    return call


def _remote(uri: str) -> tuple[AbstractFileSystem, str]:
    try:
        filesystem, name = fsspec.core.url_to_fs(uri)
        # A kept listing hides what another process writes later, also from `cat_file`, which asks it for the size.
        filesystem.dircache.use_listings_cache = False
        filesystem.invalidate_cache()  # of another user of the same instance
        return cast(AbstractFileSystem, _Patient(filesystem)), name
    except (ImportError, ValueError) as error:  # a library that is not installed, or an unknown scheme
        raise StorageError(f"{redact(uri)} cannot be used ({redact(str(error))}); install it, or correct it") from error


def _sibling(path: Path) -> Path:
    """A temporary name in the same folder: `os.replace` is atomic only within one file system."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name[:80]}.{uuid.uuid4().hex[:12]}{_TEMPORARY_SUFFIX}")
