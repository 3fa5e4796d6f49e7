"""Keeps a process alive whose reader of stdout and stderr has ended, as a flow run whose Prefect worker was killed."""

from __future__ import annotations

import atexit
import contextlib
import os
import stat
import sys
import threading

_BYTES = 1 << 16
_END_SECONDS = 2.0  # for the last lines; a child that still has the pipe open keeps it from ending
_relayed: set[int] = set()


def outlive_reader(*_: object, **__: object) -> None:
    """Sends stdout and stderr through pipes of this process, which are read also after their reader has ended.

    Without it the next printed line is an error, in whatever library prints it. Children inherit the pipes. Outputs
    that are no pipe, such as a terminal or a file, stay as they are. A hook of flows: takes any arguments.
    """
    for descriptor in (1, 2):
        if descriptor in _relayed or not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            continue
        _relayed.add(descriptor)
        original = os.dup(descriptor)
        read, write = os.pipe()
        os.dup2(write, descriptor)
        os.close(write)
        thread = threading.Thread(target=_relay, args=(read, original), name="output", daemon=True)
        thread.start()
        atexit.register(_end, descriptor, original, thread)


def _relay(read: int, original: int) -> None:
    while data := os.read(read, _BYTES):
        with contextlib.suppress(OSError):  # nobody reads it anymore
            while data:
                data = data[os.write(original, data) :]


def _end(descriptor: int, original: int, thread: threading.Thread) -> None:
    """Delivers what was printed, and restores the output for what is printed later."""
    with contextlib.suppress(OSError, ValueError):
        (sys.stdout if descriptor == 1 else sys.stderr).flush()
    os.dup2(original, descriptor)
    thread.join(_END_SECONDS)
