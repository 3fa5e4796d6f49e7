"""Folders of Ray sessions that this project started and that have ended; imports no framework."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

STACK_FOLDERS = "trip-ray-"  # before the names of folders with sessions of stacks
_MARK = "trip.lock"  # in the folder of a local session; the process that started it holds a lock on this file
_STACK = "trip.stack"  # in a folder of sessions; contains the path of the stack


def temporary_folder() -> Path:
    """The folder of the system's temporary files, as Ray chooses it."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")


def mark_session(name: str) -> IO[str] | None:
    """Marks a local session as one of this project's; it counts as running until the returned file is closed.

    Args:
        name: of the session, as Ray gives it.
    Returns:
        None if the session is not in the usual folder, or its file system has no locks. `ended_folders` then never
        lists it.
    """
    try:
        file = (temporary_folder() / "ray" / name / _MARK).open("w")
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def mark_stack(folder: Path, stack: Path) -> None:
    """Notes in a folder of sessions which stack they belong to."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _STACK).write_text(str(stack))


def ended_folders(hours: float) -> list[Path]:
    """Folders of ended sessions that were last written `hours` ago or before, oldest first.

    A local session has ended if the process that started it and every process of Ray in it have. The sessions of a
    stack have if its folder does not exist and no process of Ray is left; those of an existing stack `up` removes
    itself. Where processes cannot be listed, nothing has ended.
    """
    commands = _commands()
    if not commands:
        return []
    limit = time.time() - 3600 * hours
    candidates = [*_marked_sessions(), *_folders_without_stack()]
    ended = [path for path in candidates if not any(str(path) in command for command in commands)]
    return sorted((path for path in ended if _written(path) <= limit), key=_written)


def remove_folder(folder: Path) -> None:
    """Removes a folder of sessions; the mark goes last, so that a later call completes what a kill interrupts."""
    for entry in folder.iterdir():
        if entry.name in (_MARK, _STACK):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _marked_sessions() -> Iterator[Path]:
    for mark in (temporary_folder() / "ray").glob(f"session_*/{_MARK}"):
        if mark.parent.is_symlink():  # session_latest
            continue
        try:
            with mark.open("r") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:  # its process holds the lock, or the session is another user's
            continue
        yield mark.parent


def _folders_without_stack() -> Iterator[Path]:
    for note in temporary_folder().glob(f"{STACK_FOLDERS}*/{_STACK}"):
        if not Path(note.read_text()).exists():
            yield note.parent


def _commands() -> list[str]:
    """The command lines of all processes, each with a trailing separator after every word."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:  # ended meanwhile
            continue
    return found


def _written(folder: Path) -> float:
    """When something in a folder or its logs was last written; 0 if it was removed meanwhile."""
    times = [0.0]
    for path in (folder, *folder.glob("*"), *folder.glob("logs/*"), *folder.glob("session_*/logs/*")):
        try:
            times.append(path.lstat().st_mtime)
        except OSError:
            continue
    return max(times)
