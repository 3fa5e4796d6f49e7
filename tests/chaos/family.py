"""The processes of one run, by descent and not only by name: other Ray sessions may run on the machine."""

from __future__ import annotations

import ctypes
import os
import time
from contextlib import suppress

import psutil

_PR_SET_CHILD_SUBREAPER = 36
VICTIMS = ("driver", "worker", "raylet")
# By a part of the command line; other processes keep their own name.
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
    "tests.chaos.driver": "driver",
    "tests.chaos.train_driver": "driver",
}


def adopt_orphans() -> None:
    """Makes this process the parent of orphaned descendants, so that they stay in `family`."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "this system has no child subreaper")


def family() -> list[psutil.Process]:
    """Returns all living descendants of this process."""
    return [process for process in psutil.Process().children(recursive=True) if alive(process)]


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def role(process: psutil.Process) -> str:
    """Returns the role of a process in one word."""
    try:
        words, name = process.cmdline(), process.name()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return "gone"
    if name in ("raylet", "gcs_server"):  # their command lines contain those of the processes that they start
        return name
    line = " ".join(words)
    return next((what for mark, what in _ROLES.items() if mark in line), name)


def victims(driver: int) -> dict[str, psutil.Process]:
    """Returns the driver, one of its workers and its raylet, those that are alive; `driver` is a process id."""
    processes: dict[str, psutil.Process] = {}
    with suppress(psutil.NoSuchProcess):
        me = psutil.Process(driver)
        processes = {role(process): process for process in me.children(recursive=True) if alive(process)}
        processes["driver"] = me
    return {what: process for what, process in processes.items() if what in VICTIMS}


def reap(processes: list[psutil.Process]) -> None:
    """Reaps dead adopted processes as init would: processes of Ray take a zombie raylet for alive."""
    for process in processes:
        with suppress(psutil.NoSuchProcess, ChildProcessError):
            if process.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(process.pid, os.WNOHANG)


class Leftovers:
    """Processes that were still running when a command ended, and how many seconds each role stayed."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._known = psutil.Process().children(recursive=True)
        self._alive = {process: role(process) for process in self._known if alive(process)}
        self.stayed: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def poll(self) -> bool:
        """Updates `stayed` and returns whether any of them is still running."""
        reap(self._known)
        self._alive = {process: what for process, what in self._alive.items() if alive(process)}
        self.stayed |= {what: round(self.seconds, 1) for what in self._alive.values()}
        return bool(self._alive)


def end_family() -> list[psutil.Process]:
    """Kills all living descendants of this process and returns them."""
    remaining = family()
    for process in remaining:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(psutil.Process().children(recursive=True), timeout=10)  # reaps adopted ones
    return remaining
