"""The processes of one run, known by descent, never by name alone: other sessions of Ray may run on the machine."""

from __future__ import annotations

import ctypes
import os
import time
from contextlib import suppress

import psutil

_PR_SET_CHILD_SUBREAPER = 36
VICTIMS = ("driver", "worker", "raylet")
# By a part of the command line; what has none of them goes by its own name.
_ROLES = {
    "ray::EncodeWorker": "worker",
    "ray::RayTrainWorker": "worker",
    "ray::DashboardAgent": "agent",
    "ray::RuntimeEnvAgent": "agent",
    "ray::": "idle worker",
    "default_worker.py": "new worker",
    "log_monitor": "log monitor",
    "dashboard/agent": "agent",
    "runtime_env_agent": "agent",
    "tasks.video.decode_pool": "decoder",
    "tasks.encode.report": "report",
    "benchmarks.rig.driver": "driver",
    "benchmarks.rig.train_driver": "driver",
}


def adopt_orphans() -> None:
    """From now on a process whose parent died becomes a child of this one, and stays in `family`."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "this system adopts no orphans")


def family() -> list[psutil.Process]:
    """All living processes below this one."""
    return [process for process in psutil.Process().children(recursive=True) if alive(process)]


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def role(process: psutil.Process) -> str:
    """What a process is for, in a word."""
    try:
        words, name = process.cmdline(), process.name()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return "gone"
    if name in ("raylet", "gcs_server"):  # whose command lines name those that they start
        return name
    line = " ".join(words)
    return next((what for mark, what in _ROLES.items() if mark in line), name)


def victims(driver: int) -> dict[str, psutil.Process]:
    """The driver, one of its workers and its raylet, as far as they live; `driver` is its process id."""
    found: dict[str, psutil.Process] = {}
    with suppress(psutil.NoSuchProcess):
        me = psutil.Process(driver)
        found = {role(process): process for process in me.children(recursive=True) if alive(process)}
        found["driver"] = me
    return {what: process for what, process in found.items() if what in VICTIMS}


def bury(processes: list[psutil.Process]) -> None:
    """Does what an init does for adopted ones that have died: processes of Ray take an unburied raylet for alive."""
    for process in processes:
        with suppress(psutil.NoSuchProcess, ChildProcessError):
            if process.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(process.pid, os.WNOHANG)


class Leftovers:
    """What a command left running when it ended, and how long each kind of process stayed, in seconds."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._known = psutil.Process().children(recursive=True)
        self._alive = {process: role(process) for process in self._known if alive(process)}
        self.stayed: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def look(self) -> bool:
        """Whether any of them is still there."""
        bury(self._known)
        self._alive = {process: what for process, what in self._alive.items() if alive(process)}
        self.stayed |= {what: round(self.seconds, 1) for what in self._alive.values()}
        return bool(self._alive)


def end_family() -> list[psutil.Process]:
    """Ends all that still runs below this process, and returns it."""
    left = family()
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(psutil.Process().children(recursive=True), timeout=10)  # adopted ones are ours to bury
    return left
