"""One writer for each output, on any store: a lease names its owner, is renewed during the work, and expires.

The lease of `root/train/0ab1` is the newest of the files `root/train/0ab1.lease-000001`, `...-000002`, ... Each is
created by one writer, with a conditional write, and renewed only by that writer. A process that takes over creates the
next number, so of two processes one succeeds, and the former owner sees that it lost the lease
(`docs/decisions/leases.md`).
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from infra import storage
from infra.redaction import redact

RENEW_SECONDS = 15.0
# Without a renewal, until another process takes over. The clocks of the machines must agree within half of it.
EXPIRE_SECONDS = 90.0
SETTLE_SECONDS = 2.0  # on a store without conditional writes: until the last of several simultaneous writers is known
_SUFFIX = ".lease-"
# Interrupts the work of an owner that lost its lease. Not SIGINT, which background jobs of a script ignore; no program
# sends this one, and by default it has no effect.
_INTERRUPT = signal.SIGURG
P = ParamSpec("P")
T = TypeVar("T")
_logger = logging.getLogger(__name__)


class LeaseHeld(Exception):
    """Another process writes to the output; the message names it."""


@dataclass(frozen=True)
class Lease:
    """The content of a lease file.

    Attributes:
        token: identity of one acquisition.
        owner: for people: user, machine, process and flow run.
        process: identity of the process on its machine, to know that it has died.
        renewed: time of the last renewal, seconds since 1970.
        released: whether the owner has finished.
    """

    token: str
    owner: str
    process: str
    renewed: float
    released: bool = False

    @property
    def held(self) -> bool:
        """Whether the owner may still write: neither released, expired nor dead."""
        age = time.time() - self.renewed
        return not self.released and age < EXPIRE_SECONDS and not _is_dead(self.process)


@contextlib.contextmanager
def lease(output: str) -> Iterator[None]:
    """Holds the lease of an output during the block.

    If another process takes it over, since this one did not renew it for `EXPIRE_SECONDS` (a suspended machine), the
    main thread is interrupted.

    Args:
        output: absolute address of a stage's output.
    Raises:
        LeaseHeld: another process holds it, or has taken it over.
    """
    own = Lease(uuid.uuid4().hex, _owner(), _process(os.getpid()), time.time())
    number = _take(output, own)
    stop, lost = threading.Event(), threading.Event()
    main, owner_thread = threading.current_thread() is threading.main_thread(), threading.get_ident()
    before = signal.signal(_INTERRUPT, _interrupt) if main else None  # Python allows it in the main thread only

    def renew() -> None:
        while not stop.wait(RENEW_SECONDS):
            try:
                if newest(output)[0] > number:
                    lost.set()
                    if main:
                        signal.pthread_kill(owner_thread, _INTERRUPT)
                    return
                _write(output, number, replace(own, renewed=time.time()))
            except (OSError, ValueError, storage.StorageError) as error:
                _logger.warning("the lease of %s was not renewed: %s", redact(output), redact(str(error)))

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if not lost.is_set():
            raise
    finally:
        stop.set()
        thread.join()
        if main:
            signal.signal(_INTERRUPT, before or signal.SIG_DFL)
        if not lost.is_set():
            _write(output, number, replace(own, renewed=time.time(), released=True))
    if lost.is_set():
        raise LeaseHeld(f"{_held(output, newest(output)[1])}; it took over since this process did not answer")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def leased(stage: Callable[P, T]) -> Callable[P, T]:
    """A stage that holds the lease of its output; the first argument is its spec, with the address as `output`."""

    @functools.wraps(stage)
    def run(*arguments: P.args, **options: P.kwargs) -> T:
        spec: Any = arguments[0]
        with lease(storage.absolute(spec.output)):
            return stage(*arguments, **options)

    return run


def newest(output: str) -> tuple[int, Lease | None]:
    """The number and the content of the newest lease file of an output; 0 and None without one."""
    numbers = _numbers(output)
    if not numbers:
        return 0, None
    try:
        return numbers[-1], Lease(**storage.read_json(_file(output, numbers[-1])))
    except FileNotFoundError:  # removed by an owner of a newer one
        return newest(output)


def is_held(output: str) -> bool:
    """Whether a process may be writing to the output."""
    current = newest(output)[1]
    return current is not None and current.held


def _take(output: str, own: Lease) -> int:
    number, current = newest(output)
    if current is not None and current.held:
        raise LeaseHeld(_held(output, current))
    if current is not None and not current.released:
        _logger.warning("%s was written by %s, which has ended; this process continues", redact(output), current.owner)
    data = storage.json_bytes(asdict(own))
    file = _file(output, number + 1)
    if not storage.create_bytes(file, data):
        raise LeaseHeld(_held(output, newest(output)[1]))
    if storage.create_bytes(file, data):  # it exists, so a store with conditional writes refuses
        _logger.warning(
            "the store of %s has no conditional writes: two processes that start within %g s may both write",
            *(redact(output), SETTLE_SECONDS),
        )
        time.sleep(SETTLE_SECONDS)
        current = newest(output)[1]
        if current is None or current.token != own.token:
            raise LeaseHeld(_held(output, current))
    for old in _numbers(output):
        if old <= number:
            storage.delete(_file(output, old))
    return number + 1


def _held(output: str, current: Lease | None) -> str:
    owner = current.owner if current is not None else "another process"
    return (
        f"{redact(output)} is being written by {owner}; wait until it ends, or stop it and repeat the command"
        f" after {EXPIRE_SECONDS:g} s"
    )


def _write(output: str, number: int, content: Lease) -> None:
    storage.write_json(_file(output, number), asdict(content))


def _file(output: str, number: int) -> str:
    return f"{output.rstrip('/')}{_SUFFIX}{number:06d}"


def is_lease(name: str) -> bool:
    """Whether a name in a folder of outputs is that of a lease; the leases of an output are next to it."""
    return _SUFFIX in name


def _numbers(output: str) -> list[int]:
    prefix = output.rstrip("/").rsplit("/", 1)[-1] + _SUFFIX
    names = storage.list_dir(storage.parent(output))
    return sorted(int(name.removeprefix(prefix)) for name in names if name.startswith(prefix))


def _owner() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # an image with a user of no name
        user = str(os.getuid())
    run = os.environ.get("PREFECT__FLOW_RUN_ID")
    return f"{user}@{socket.gethostname()}, process {os.getpid()}" + (f", flow run {run}" if run else "")


@functools.cache
def _machine() -> str:
    """This boot of this machine and its process ids' namespace, "" where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process(pid: int) -> str:
    """Identity of a process with its start time, since process ids are used again; "" where it is not known."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    if state in "ZX" or not _machine():  # ended, though its parent has not noticed
        return ""
    return json.dumps([_machine(), pid, fields[18]])


def _is_dead(process: str) -> bool:
    """Whether a process of this machine has ended; False for one of another machine."""
    if not process:
        return False
    machine, pid, _ = json.loads(process)
    return machine == _machine() and _process(pid) != process
