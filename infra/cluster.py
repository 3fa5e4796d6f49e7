"""One Ray session for a stage: a quiet local one, the cluster at an address, or the one that is running already."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

import ray
import ray.exceptions

from infra.settings import CHECKOUT, apply_environment_defaults

# Stages pass addresses through Ray, never tensors, so the object store only carries specs and reports.
OBJECT_STORE_BYTES = 300 * 1024 * 1024
# What a remote cluster does not need of the checkout; Ray uploads the rest as the working directory.
NOT_UPLOADED = [".git", ".venv*", "runs", "tests", "docs", "site", "htmlcov", "benchmarks", "*.mp4", "*.gif"]


@contextlib.contextmanager
def ray_session(address: str | None = None, num_cpus: int | None = None) -> Iterator[None]:
    """A Ray session for the length of a `with` block.

    `address` None starts a local session with `num_cpus` (None: all cores) and ends it afterwards; an address joins
    that cluster, and so does None inside a Ray job, where Ray sets RAY_ADDRESS. A session that this process has open
    already is used as it is and left open: the outermost block owns it. Raises `ConnectionError` when nothing answers
    at the address.
    """
    if ray.is_initialized():
        if machines_left():
            yield
            return
        ray.shutdown()  # a kept session whose machine was lost under an earlier stage, or an earlier try of this one
    apply_environment_defaults()
    if _keepers and num_cpus is not None:
        num_cpus = max(num_cpus, os.cpu_count() or 1)  # the stages to come may ask for more than this one
    if address is None and os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING, namespace="trip")  # the job has brought its own code
    elif address is None:
        with _importable_from_workers():
            _start_local(num_cpus)
    else:
        ray.init(
            address=address,
            runtime_env={"working_dir": str(CHECKOUT), "excludes": NOT_UPLOADED},
            logging_level=logging.WARNING,
            namespace="trip",
        )
    try:
        yield
    finally:
        if not _keepers:
            ray.shutdown()


def _start_local(num_cpus: int | None) -> None:
    """A local session. Ray gives its processes 30 s to start, which a busy machine may miss once."""
    for last_try in (False, True):
        try:
            ray.init(
                address="local",  # not what somebody else has started on this machine
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                logging_level=logging.WARNING,
                log_to_driver=False,  # stages report their own progress; the rest is in Ray's session folder
                namespace="trip",
            )
            return
        except Exception as error:  # Ray raises the bare class here
            if last_try or "timed out during startup" not in str(error):
                raise
            ray.shutdown()


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
            ray.shutdown()


def machines_left() -> bool:
    """Whether the open session has a machine; it never gets another where the one that it started on is lost."""
    return any(node["Alive"] for node in ray.nodes())


def lost_a_machine(error: object) -> bool:
    """Whether an error says that Ray lost a node or a process, and not that the code it ran has failed."""
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
