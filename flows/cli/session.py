"""Resources of a running command: the lock of its root and, for a flow, a Prefect server."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from infra import storage
from tasks.records import UserError


@functools.cache
def prefect_home(root: str) -> Path:
    """The folder of Prefect's own state: below a local root; for a remote root a temporary folder."""
    if storage.local_path(root) is None:
        return Path(tempfile.mkdtemp(prefix="trip-prefect-"))
    return Path(storage.absolute(root)) / ".prefect"


@contextlib.contextmanager
def locked(root: str) -> Iterator[None]:
    """Holds the lock of a local root, so that two commands do not write over each other; it ends with the process.

    Raises:
        UserError: another command holds it.
    """
    if storage.local_path(root) is None:
        yield
        return
    folder = Path(storage.absolute(root))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another command is running in {folder}; wait for it, or give another --root") from None
        yield


@contextlib.contextmanager
def prefect_server(root: str, meanwhile: Callable[[], None]) -> Iterator[None]:
    """Uses the server at PREFECT_API_URL where that is set, else starts one for the length of this command.

    Args:
        root: the root that the command writes below.
        meanwhile: called while the server starts; the imports of a flow take as long.
    """
    if "PREFECT_API_URL" in os.environ:
        meanwhile()
        yield
        return
    from flows.cli.local_server import local_server

    with local_server(prefect_home(root), meanwhile) as url:
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker
        from prefect.settings import PREFECT_API_URL, temporary_settings

        with temporary_settings({PREFECT_API_URL: url}):
            try:
                yield
            finally:
                # What is still queued would find no server when Prefect sends it at exit.
                EventsWorker.drain_all(timeout=5)
                APILogWorker.drain_all(timeout=5)
