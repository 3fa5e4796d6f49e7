"""The Ray session of a stage: a quiet local one, the cluster at an address, or the open one."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import IO, Any

import ray
import ray.exceptions

from infra.ray_sessions import mark_session
from infra.settings import CHECKOUT, apply_environment_defaults

# Stages pass addresses through Ray, never tensors, so the object store only carries specs and reports.
OBJECT_STORE_BYTES = 300 * 1024 * 1024
# Files of the checkout that a remote cluster does not need; Ray uploads the rest as the working directory.
NOT_UPLOADED = [".git", ".venv*", "runs", "tests", "docs", "site", "htmlcov", "benchmarks", "*.mp4", "*.gif"]


# Parts of Ray's messages when a busy machine starts too slowly for its limits, which cannot be set.
_SLOW_START = ("timed out", "failed to start gcs", "no node info found", "started successfully", "start successfully")
_started_here = False  # the open session is a local one of this process, to which no machine can be added
_mark: IO[str] | None = None  # open while a local session of this process is


class SessionNotStarted(ray.exceptions.RayError):
    """Ray's processes were too slow to start; a later attempt may succeed."""


@contextlib.contextmanager
def ray_session(address: str | None = None, num_cpus: int | None = None) -> Iterator[None]:
    """Opens a Ray session for a `with` block.

    `address` None starts a local session with `num_cpus` (None: all cores) and ends it afterwards; an address joins
    that cluster, and so does None inside a Ray job, where Ray sets RAY_ADDRESS. An open session of this process
    is used and left open: the outermost block owns it.

    Raises:
        ConnectionError: no response from the address. SessionNotStarted: Ray's start timed out, twice. OSError
        ENAMETOOLONG: the path of the temporary folder is too long.
    """
    global _started_here, _mark
    if ray.is_initialized():
        if machines_left():
            yield
            return
        _end()  # a kept session that lost its machine in an earlier stage or attempt
    apply_environment_defaults()
    if _keepers and num_cpus is not None:
        num_cpus = max(num_cpus, os.cpu_count() or 1)  # later stages may need more than this one
    joins = address is not None or bool(os.environ.get("RAY_ADDRESS"))
    if address is not None:
        _start(address=address, runtime_env={"working_dir": str(CHECKOUT), "excludes": NOT_UPLOADED})
    elif joins:
        _start()  # the job has brought its own code
    else:
        with _importable_from_workers():
            _start(
                address="local",  # not another session of this machine
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,  # stages report their own progress; the rest is in Ray's session folder
            )
        _mark = mark_session(ray.get_runtime_context().get_session_name())
    _started_here = not joins
    try:
        yield
    finally:
        if not _keepers:
            _end()


def _start(**options: Any) -> None:
    """Calls `ray.init`, at most twice: Ray gives its processes 30 s to start, too short for a busy machine."""
    for last_try in (False, True):
        try:
            with _own_sigterm():
                ray.init(logging_level=logging.WARNING, namespace="trip", **options)
            return
        except ConnectionError:
            raise
        except Exception as error:  # Ray raises bare classes here
            ray.shutdown()
            if "AF_UNIX path length" in str(error):
                raise OSError(
                    errno.ENAMETOOLONG, "this path is too long for Ray's sockets", tempfile.gettempdir()
                ) from error
            if not any(part in str(error).lower() for part in _SLOW_START):
                raise
            if last_try:
                raise SessionNotStarted(f"Ray did not start in time, twice: {error}") from error


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keeps this process's handler of SIGTERM: Ray's aborts with a C++ stack, and no `finally` block runs.

    Without a handler, SIGTERM raises SystemExit from here on, so that the session ends in order.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if callable(before) else lambda *_: sys.exit(128 + signal.SIGTERM))


def _end() -> None:
    global _started_here, _mark
    ray.shutdown()
    _started_here = False
    if _mark is not None:
        _mark.close()
        _mark = None


# Open `kept_ray_session` blocks of this process.
_keepers: list[object] = []


@contextlib.contextmanager
def kept_ray_session() -> Iterator[None]:
    """Stages inside the block share one session: the first that needs Ray starts it, the end of the block ends it.

    Starting and ending Ray takes five to ten seconds, and a stage with finished results does not need it.
    """
    token = object()
    _keepers.append(token)
    try:
        yield
    finally:
        _keepers.remove(token)
        if not _keepers and ray.is_initialized():
            _end()


def living_machines() -> frozenset[str]:
    """Ids of the alive machines of the open session; a loss is detected within about half a minute."""
    return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])


def machines_left() -> bool:
    """Whether the open session has a machine; a lost local machine is never replaced."""
    return bool(living_machines())


def can_grow() -> bool:
    """Whether machines can join the open session, added by a cluster's autoscaler or operator."""
    return not _started_here


def lost_a_machine(error: object) -> bool:
    """Whether Ray lost a node or a process, or did not start; False for an error of the code that it ran."""
    return isinstance(error, ray.exceptions.RayError) and not isinstance(error, ray.exceptions.RayTaskError)


@contextlib.contextmanager
def _importable_from_workers() -> Iterator[None]:
    """Adds the checkout to PYTHONPATH: the raylet inherits this environment at its start, and passes it to workers."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(CHECKOUT) + (os.pathsep + before if before else "")
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
