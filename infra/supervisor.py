"""Starts, checks and stops services as plain processes, with one folder of a log and a process id for each."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pwd
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOG_BYTES = 20 * 1024 * 1024  # a longer log is renamed to log.1 at the next start
POLL_SECONDS = 0.2
UNHEALTHY_ANSWERS = 5  # of a running service, one after the other, before `up` starts it again
# Every process of a service has these two in its environment, so that its children are found after its death.
STACK_VARIABLE, SERVICE_VARIABLE = "TRIP_STACK", "TRIP_STACK_SERVICE"


class ServiceFailed(RuntimeError):
    """A service ended, or did not become healthy in time."""


@dataclass(frozen=True)
class Service:
    """A process that runs until it is stopped, or a step that ends by itself.

    Attributes:
        name: unique in a stack; its folder below the stack's has this name.
        command: the program and its arguments. Secrets belong into `environment`.
        environment: variables in addition to those of the supervisor.
        after: names of the services that must be healthy first.
        is_healthy: whether the service responds; None for a step, which is done when it ends with code 0.
        prepare: called before the start.
        when_healthy: called after every start, once the service is healthy.
        missing: returns what the service waits for; "" if it can start.
        address: where users find it; "" for none.
        stop_signal: the signal for an orderly end.
        user: the account that runs it if the supervisor runs as root; "" for the same one.
        adopts: whether its children go on after its death, as the flow runs of a worker do.
        start_seconds: the limit of a start.
        tries: how many times one `up` starts a service that ends before it is healthy.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    after: tuple[str, ...] = ()
    is_healthy: Callable[[], bool] | None = None
    prepare: Callable[[], None] = lambda: None
    when_healthy: Callable[[], None] = lambda: None
    missing: Callable[[], str] = lambda: ""
    address: str = ""
    stop_signal: signal.Signals = signal.SIGTERM
    user: str = ""
    adopts: bool = False
    start_seconds: float = 180.0
    tries: int = 1

    @property
    def fingerprint(self) -> str:
        """Identifies command and environment: a service that runs with others is started again."""
        text = json.dumps([self.command, dict(sorted(self.environment.items())), self.user])
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class State:
    """What a service does now.

    Attributes:
        name: the name of the service.
        status: `healthy`, `unhealthy` (it runs and does not respond), `stopped`, `done` (a step), or `waits`.
        reason: what a service waits for.
        pid: the process; 0 without one.
    """

    name: str
    status: str
    reason: str = ""
    pid: int = 0


class Supervisor:
    """The services of one folder. It is no process of its own: each call reads the process ids in the folder.

    Args:
        folder: absolute path; `NAME/log` and `NAME/process.json` of every service lie below it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seconds: dict[str, float] = {}
        """Seconds from the start of each service of the last `up` to its first healthy response."""

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Waits for another supervisor of this folder to end."""
        with open(self.folder / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def log(self, name: str) -> Path:
        """The log of a service."""
        return self.folder / name / "log"

    def up(self, services: Sequence[Service], log: Callable[[str], None]) -> None:
        """Starts what does not run, each service as soon as those that it needs are healthy.

        Services without a common dependency start at the same time.

        Raises:
            ServiceFailed: a service ended, or was too slow; services that are up keep running.
        """
        self.seconds = {}
        pending = list(services)
        starting: dict[str, tuple[Service, subprocess.Popen[bytes], float]] = {}
        tried: Counter[str] = Counter()
        ready: set[str] = set()
        while pending or starting:
            for service in [s for s in pending if ready.issuperset(s.after)]:
                pending.remove(service)
                if self._is_current(service):
                    ready.add(service.name)
                    continue
                reason = service.missing()
                if reason:
                    log(f"{service.name:<12} waits for {reason}")
                    continue
                began = time.monotonic()
                starting[service.name] = (service, self._start(service), began)
            for name, (service, process, began) in list(starting.items()):
                seconds = time.monotonic() - began
                if self._has_started(service, process):
                    service.when_healthy()
                    del starting[name]
                    ready.add(name)
                    self.seconds[name] = round(time.monotonic() - began, 1)
                    log(f"{name:<12} {'done' if service.is_healthy is None else 'healthy'} in {seconds:.1f} s")
                elif process.poll() is not None or seconds > service.start_seconds:
                    code = process.poll()
                    tried[name] += 1
                    if code is not None and tried[name] < service.tries:
                        log(f"{name:<12} ended with code {code}, starting it again")
                        starting[name] = (service, self._start(service), time.monotonic())
                        continue
                    how = f"did not respond within {seconds:.0f} s" if code is None else f"ended with code {code}"
                    self.stop(service)
                    raise ServiceFailed(f"{name} {how}; its log is {self.log(name)}\n{self._tail(name)}")
            waiting = {s.name for s in pending if not ready.issuperset(s.after)}
            if not starting and len(waiting) == len(pending):
                for service in pending:  # only a service that waits holds others back
                    log(f"{service.name:<12} waits for {', '.join(n for n in service.after if n not in ready)}")
                return
            time.sleep(POLL_SECONDS)

    def down(self, services: Sequence[Service], log: Callable[[str], None]) -> None:
        """Stops the services in the reverse order, and every process that they left."""
        for service in reversed(services):
            if self.stop(service):
                log(f"{service.name:<12} stopped")
        _kill(_family(set(), {STACK_VARIABLE: str(self.folder)}))

    def states(self, services: Sequence[Service]) -> list[State]:
        """The state of every service."""
        return [self._state(service) for service in services]

    def running(self) -> set[str]:
        """Names of the services whose process is running."""
        names = {path.parent.name for path in self.folder.glob("*/process.json")}
        records = {name: self._record(name) for name in names}
        return {name for name, record in records.items() if _is_alive(record.get("pid", 0), record.get("began", ""))}

    def end_leftovers(self, adopting: Sequence[str]) -> None:
        """Ends the children of services that do not run, but those of `adopting`: they may hold a port."""
        dead = {path.parent.name for path in self.folder.glob("*/process.json")} - self.running() - set(adopting)
        for name in dead:
            _kill(_family(set(), self._marks(name)))

    def stop(self, service: Service) -> bool:
        """Ends a service and its children; False if it did not run."""
        record = self._record(service.name)
        pid = record.get("pid", 0)
        running = _is_alive(pid, record.get("began", ""))
        members = _family({pid} if running else set(), self._marks(service.name))
        if running and service.is_healthy is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, service.stop_signal)
            _wait_for_end(pid, record["began"], 20)
        _kill(members | _family(set(), self._marks(service.name)))
        if service.is_healthy is not None:
            (self.folder / service.name / "process.json").unlink(missing_ok=True)
        return running

    def _state(self, service: Service) -> State:
        if service.is_healthy is None:
            return State(service.name, "done" if self._is_current(service) else "stopped")
        record = self._record(service.name)
        if _is_alive(record.get("pid", 0), record.get("began", "")):
            return State(service.name, "healthy" if service.is_healthy() else "unhealthy", pid=record["pid"])
        reason = service.missing()
        return State(service.name, "waits" if reason else "stopped", reason)

    def _is_current(self, service: Service) -> bool:
        """Whether the service runs, or the step is done, with this command and environment."""
        record = self._record(service.name)
        if record.get("fingerprint") != service.fingerprint:
            return False
        if service.is_healthy is None:
            return bool(record.get("done"))
        # A busy service may miss one of its two seconds.
        for _ in range(UNHEALTHY_ANSWERS):
            if not _is_alive(record["pid"], record["began"]):
                return False
            if service.is_healthy():
                return True
            time.sleep(1)
        return False

    def _has_started(self, service: Service, process: subprocess.Popen[bytes]) -> bool:
        if service.is_healthy is not None:
            return process.poll() is None and service.is_healthy()
        if process.poll() != 0:
            return False
        path = self.folder / service.name / "process.json"
        _write(path, json.dumps({"fingerprint": service.fingerprint, "done": True}))
        return True

    def _start(self, service: Service) -> subprocess.Popen[bytes]:
        folder = self.folder / service.name
        folder.mkdir(parents=True, exist_ok=True)
        record = self._record(service.name)
        if not service.adopts or _is_alive(record.get("pid", 0), record.get("began", "")):
            self.stop(service)  # what a killed service left, or one that does not respond
        service.prepare()
        log_path = self.log(service.name)
        if log_path.exists() and log_path.stat().st_size > LOG_BYTES:
            os.replace(log_path, log_path.with_name("log.1"))
        group = pwd.getpwnam(service.user).pw_gid if service.user else None
        with open(log_path, "ab") as log:
            process = subprocess.Popen(
                service.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=folder,
                env=os.environ | service.environment | self._marks(service.name),
                start_new_session=True,  # Ctrl-C reaches the supervisor only
                # A background shell leaves SIGINT ignored, and Prefect's worker then never ends.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
                user=service.user or None,
                group=group,
            )
        began = _start_time(process.pid)
        text = json.dumps({"pid": process.pid, "began": began, "fingerprint": service.fingerprint})
        _write(folder / "process.json", text)
        return process

    def _marks(self, name: str) -> dict[str, str]:
        return {STACK_VARIABLE: str(self.folder), SERVICE_VARIABLE: name}

    def _record(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self.folder / name / "process.json").read_text())
        except (FileNotFoundError, ValueError):
            return {}

    def _tail(self, name: str, lines: int = 15) -> str:
        return "\n".join(self.log(name).read_text(errors="replace").splitlines()[-lines:])


def responds(url: str, headers: Mapping[str, str] | None = None) -> bool:
    """Whether a URL on loopback responds with status 200 within two seconds, without any proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, headers=dict(headers or {})), timeout=2) as response:
            return response.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError, OSError):
        return False


def _write(path: Path, text: str) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    os.replace(fresh, path)


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _start_time(pid: int) -> str:
    fields = _stat(pid)
    return fields[19] if fields else ""


def _is_alive(pid: int, began: str) -> bool:
    """Whether the process still runs; another process with the same id has another start time."""
    fields = _stat(pid) if pid else []
    if fields and fields[0] == "Z":
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)  # a child of this process
        return False
    return bool(fields) and fields[19] == began


def _wait_for_end(pid: int, began: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while _is_alive(pid, began) and time.monotonic() < deadline:
        time.sleep(0.05)


def _family(pids: set[int], marks: Mapping[str, str]) -> set[tuple[int, str]]:
    """(id, start time) of the given processes, of those with all `marks` in their environment, and of descendants."""
    wanted = {f"{name}={value}".encode() for name, value in marks.items()}
    children: dict[int, list[int]] = {}
    members = set(pids)
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        fields = _stat(int(entry))
        if not fields:
            continue
        children.setdefault(int(fields[1]), []).append(int(entry))
        with contextlib.suppress(OSError):  # a process of another user
            if wanted <= set(Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")):
                members.add(int(entry))
    pending = list(members)
    for pid in pending:  # grows during the loop
        pending += [child for child in children.get(pid, []) if child not in members]
        members.update(children.get(pid, []))
    return {(pid, _start_time(pid)) for pid in members - {os.getpid()}}


def _kill(members: set[tuple[int, str]]) -> None:
    """SIGTERM, and after five seconds SIGKILL, to the processes that still run."""
    for number, seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        alive = {(pid, began) for pid, began in members if _is_alive(pid, began)}
        for pid, _ in alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        deadline = time.monotonic() + seconds
        while any(_is_alive(pid, began) for pid, began in alive) and time.monotonic() < deadline:
            time.sleep(0.05)
