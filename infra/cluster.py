"""One Ray session for a stage: a quiet local one, the cluster at an address, or the one that is running already."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import ray
import ray.exceptions

from infra.settings import CHECKOUT, apply_environment_defaults

# Stages pass addresses through Ray, never tensors, so the object store only carries specs and reports.
OBJECT_STORE_BYTES = 300 * 1024 * 1024
# What a remote cluster does not need of the checkout; Ray uploads the rest as the working directory.
NOT_UPLOADED = [".git", ".venv*", "runs", "tests", "docs", "site", "htmlcov", "benchmarks", "*.mp4", "*.gif"]


# Of messages of Ray's start when a busy machine is too slow for its limits, which cannot be set.
_SLOW_START = ("timed out", "failed to start gcs", "no node info found", "started successfully", "start successfully")
_started_here = False  # the open session is a local one of this process, which never has more machines than now


class SessionNotStarted(ray.exceptions.RayError):
    """Ray's own processes were too slow to start; nothing is wrong with the work, and a later try may succeed."""


@contextlib.contextmanager
def ray_session(address: str | None = None, num_cpus: int | None = None) -> Iterator[None]:
    """A Ray session for the length of a `with` block.

    `address` None starts a local session with `num_cpus` (None: all cores) and ends it afterwards; an address joins
    that cluster, and so does None inside a Ray job, where Ray sets RAY_ADDRESS. A session that this process has open
    already is used as it is and left open: the outermost block owns it.

    Raises:
        ConnectionError: nothing answers at the address. SessionNotStarted: Ray's start timed out, twice.
    """
    global _started_here
    if ray.is_initialized():
        if machines_left():
            yield
            return
        _end()  # a kept session whose machine was lost under an earlier stage, or an earlier try of this one
    apply_environment_defaults()
    if _keepers and num_cpus is not None:
        num_cpus = max(num_cpus, os.cpu_count() or 1)  # the stages to come may ask for more than this one
    joins = address is not None or bool(os.environ.get("RAY_ADDRESS"))
    if address is not None:
        _start(address=address, runtime_env={"working_dir": str(CHECKOUT), "excludes": NOT_UPLOADED})
    elif joins:
        _start()  # the job has brought its own code
    else:
        with _importable_from_workers():
            _start(
                address="local",  # not what somebody else has started on this machine
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,  # stages report their own progress; the rest is in Ray's session folder
            )
    _started_here = not joins
    try:
        yield
    finally:
        if not _keepers:
            _end()


def _start(**how: Any) -> None:
    """`ray.init`, twice if need be: Ray gives its processes 30 s to start, which a busy machine may miss."""
    for last_try in (False, True):
        try:
            ray.init(logging_level=logging.WARNING, namespace="trip", **how)
            return
        except ConnectionError:
            raise
        except Exception as error:  # Ray raises bare classes here
            ray.shutdown()
            if not any(part in str(error).lower() for part in _SLOW_START):
                raise
            if last_try:
                raise SessionNotStarted(f"Ray did not start in time, twice: {error}") from error


def _end() -> None:
    global _started_here
    ray.shutdown()
    _started_here = False


# Open `kept_ray_session` blocks of this process.
_keepers: list[object] = []


@contextlib.contextmanager
def kept_ray_session() -> Iterator[None]:
    """Several stages in a row share one session: the first that needs Ray starts it, the end of this block ends it.

    Starting and ending Ray takes five to ten seconds, and a stage that finds its work done needs none at all.
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
    """Ids of the machines that the open session takes for alive; it notices a loss within about half a minute."""
    return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])


def machines_left() -> bool:
    """Whether the open session has a machine; it never gets another where the one that it started on is lost."""
    return bool(living_machines())


def can_grow() -> bool:
    """Whether machines may join the open session: a cluster's autoscaler or operator can add them."""
    return not _started_here


def lost_a_machine(error: object) -> bool:
    """Whether an error says that Ray lost a node or a process or did not start, and not that the code it ran failed."""
    return isinstance(error, ray.exceptions.RayError) and not isinstance(error, ray.exceptions.RayTaskError)


@contextlib.contextmanager
def _importable_from_workers() -> Iterator[None]:
    """The raylet hands its environment to the workers, and inherits ours at the moment it starts."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(CHECKOUT) + (os.pathsep + before if before else "")
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
