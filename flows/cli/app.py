"""Runs one command: reads its flags, locks its root, and turns an error into a sentence and an exit code."""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import inspect
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import cyclopts

from flows.cli.session import locked, prefect_home, prefect_server
from flows.cli.signature import signature_of, summary_of
from infra import storage
from infra.leases import LeaseHeld
from infra.redaction import redact
from infra.settings import DEFAULT_ROOT, apply_environment_defaults, move_credentials
from tasks.records import UserError
from trip_model.folders import BaseFolderError

FLOWS = ("reproduce", "prepare-latents", "train-trip", "evaluate-trip", "register-trip", "ablate", "nightly")
# A command whose module has a check that may end it before a server is started.
CHECKS = {"nightly": "flows.nights"}
# Every other command and the module of its function.
COMMANDS = {
    "up": "flows.cli.up",
    "down": "flows.cli.up",
    "status": "flows.cli.up",
    "recipes": "flows.cli.recipes",
    "plan": "flows.cli.plan",
    "selftest": "flows.cli.selftest",
    "serve": "flows.cli.serve",
    "serve-key": "flows.cli.serve",
    "animate": "flows.cli.animate",
    "promote": "flows.cli.promote",
    "rollback": "flows.cli.promote",
    "live": "flows.cli.promote",
    "deploy": "flows.cli.deploy",
    "gc": "flows.cli.gc",
    "check-source": "flows.cli.check_source",
    "sample": "flows.cli.curate",
    "verify": "flows.cli.curate",
    "show": "flows.cli.curate",
    "forget": "flows.cli.curate",
    "deduplicate": "flows.cli.curate",
    "compact": "flows.cli.curate",
    "upgrade": "flows.cli.curate",
    "generate-baseline": "flows.cli.baseline",
    "vbench-export": "flows.cli.vbench",
    "vbench-read": "flows.cli.vbench",
    "preference-study": "flows.cli.preference",
    "preference-serve": "flows.cli.preference",
    "preference-tally": "flows.cli.preference",
}
CHANGE_DATA = (
    "forget",
    "deduplicate",
    "compact",
    "upgrade",
)  # they take the lock of the root that the data set lies below

TERMINATED = 128 + signal.SIGTERM  # the exit code of a shell's child that SIGTERM ended
# Errors of the operating system that a user can fix, and how.
REMEDIES = {
    errno.ENOSPC: "free some space or give another --root",
    errno.EDQUOT: "free some space or give another --root",
    errno.EROFS: "give a --root that can be written",
    errno.EACCES: "give a --root that you may write, or change its permissions",
    errno.EPERM: "give a --root that you may write, or change its permissions",
    errno.ENOTDIR: "give a --root whose parents are folders",
    errno.ENAMETOOLONG: "give a shorter path; that of temporary files is TMPDIR",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOMEM: "free some memory",
}


def main(arguments: list[str]) -> int:
    """Runs one command.

    Returns:
        The command's own exit code, 0 by default; 2 for an error that the user can fix; 1 with a traceback for others.

    Raises:
        SystemExit: with `TERMINATED` after SIGTERM.
    """
    # Prefect stores the parameters of a run and shows them to everyone who can open its pages.
    arguments = _without_credentials(arguments)
    # Prefect prints the traceback of every failed state; the user gets a sentence, and the server keeps the rest.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    if "PREFECT_API_URL" not in os.environ:
        # Prefect reads its home when it is imported, before any flag is parsed.
        apply_environment_defaults(str(prefect_home(_root_in(arguments))))
    try:
        with _sigterm_exits():
            return _app(arguments)(arguments, result_action="return_value") or 0
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    except SystemExit as error:
        if error.code == TERMINATED:
            print("terminated; the same command continues", file=sys.stderr)
        raise
    except Exception as error:  # the last handler: it decides between a sentence and a traceback
        cause = user_error(error)
        if cause is None:
            print(redact(traceback.format_exc()), end="", file=sys.stderr)
            print(f"error: {type(error).__name__} ended a stage; the same command continues", file=sys.stderr)
            return 1
        print(f"error: {sentence(cause)}", file=sys.stderr)
        return 2


@contextlib.contextmanager
def _sigterm_exits() -> Iterator[None]:
    """SIGTERM raises SystemExit in the block, so that servers, Ray and MLflow runs end in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def parse(arguments: list[str]) -> dict[str, Any]:
    """The flags of a command line by name, as its function receives them. Raises `cyclopts.CycloptsError`."""
    _, given, _ = _app(arguments).parse_args(arguments, print_error=False, exit_on_error=False)
    given.apply_defaults()
    return dict(given.arguments)


def user_error(error: BaseException) -> Exception | None:
    """The error inside `error` that the user can fix, however frameworks have wrapped it; None if there is none."""
    pending: list[Any] = [error]
    for candidate in pending:  # grows during the loop
        # Ray raises a copy that is of the error's class as well, but its text is the worker's complete traceback.
        ray_cause = getattr(candidate, "cause", None)
        if not isinstance(ray_cause, BaseException):
            if isinstance(candidate, UserError | BaseFolderError | storage.StorageError | LeaseHeld):
                return candidate
            if isinstance(candidate, OSError) and candidate.errno in REMEDIES:
                return candidate
        workers = getattr(candidate, "worker_failures", None)
        inner = [ray_cause, candidate.__cause__, *(workers.values() if isinstance(workers, dict) else ())]
        pending += [item for item in inner if isinstance(item, BaseException) and item not in pending]
    return None


def sentence(error: Exception) -> str:
    """The text of an error in one line, with the remedy of an error of the operating system."""
    if isinstance(error, OSError) and error.errno in REMEDIES:
        path = f"{error.filename}: " if error.filename else ""
        return f"{path}{error.strerror}; {REMEDIES[error.errno]}"
    return redact(" ".join(str(error).split()))


def _app(arguments: list[str]) -> cyclopts.App:
    """The application with the commands that `arguments` name, or with all of them for the list of commands."""
    about = "TRIP: from a table of video links to a registered image-to-video model."
    app = cyclopts.App(name="python -m flows", help=about, version_flags=[])
    for name in FLOWS:
        _add(app, name, f"flows.{name.replace('-', '_')}", _run_flow, name in arguments)
    for name, module in COMMANDS.items():
        _add(app, name, module, _run_command, name in arguments)
    return app


def _add(app: cyclopts.App, name: str, module: str, run: Callable[..., Any], in_use: bool) -> None:
    function = name.replace("-", "_")
    if not in_use:  # listed by its summary; its signature is not read
        app.command(cyclopts.App(name=name, help=summary_of(module, function)))
        return
    signature = signature_of(module, function)

    @functools.wraps(signature)
    def command(*args: Any, **flags: Any) -> Any:
        given = inspect.signature(signature).bind(*args, **flags)
        given.apply_defaults()
        return run(name, module, function, given.arguments)

    app.command(command, name=name)


def _run_flow(name: str, module: str, function: str, given: dict[str, Any]) -> None:
    """Runs a flow with a Prefect server, alone on its root."""
    from flows.recipes import find_recipe

    # Rejects a misspelt name, and a value, before a server is started for it.
    find_recipe(given["recipe"], None, given["values"])

    def load() -> None:
        with warnings.catch_warnings():
            # Prefect looks for its home on import; the folder is made when a server needs it.
            warnings.filterwarnings("ignore", message="Failed to create the Prefect home")
            for stage in getattr(importlib.import_module(module), "STAGES", ()):
                importlib.import_module(stage)

    if name in CHECKS:
        finished = importlib.import_module(CHECKS[name]).check(**given)
        if finished is not None:
            print(f"{name:<11} {finished}")
            return
    with locked(given["root"]), prefect_server(given["root"], load):
        getattr(importlib.import_module(module), function)(**given)


def _run_command(name: str, module: str, function: str, given: dict[str, Any]) -> Any:
    lock: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if name in CHANGE_DATA:
        from tasks.shards import named

        root = storage.parent(storage.parent(named(storage.absolute(given["data"]))))
        if storage.exists(storage.join(root, ".lock")):
            lock = locked(root)
    flags = dict(given)
    passed_on = flags.pop("arguments", ())  # of `animate`, for another command line
    with lock:
        return getattr(importlib.import_module(module), function)(*passed_on, **flags)


def _without_credentials(arguments: list[str]) -> list[str]:
    """The arguments with no password in the value of --tracking-uri: it moves into the environment."""
    flag = "--tracking-uri"
    plain = list(arguments)
    for position, word in enumerate(arguments):
        if position and arguments[position - 1] == flag:
            plain[position] = move_credentials(word)
        elif word.startswith(f"{flag}="):
            plain[position] = f"{flag}={move_credentials(word.removeprefix(f'{flag}='))}"
    return plain


def _root_in(arguments: list[str]) -> str:
    """The value of --root in a command line that is not parsed yet."""
    for position, word in enumerate(arguments):
        if word == "--root" and position + 1 < len(arguments):
            return arguments[position + 1]
        if word.startswith("--root="):
            return word.removeprefix("--root=")
    return DEFAULT_ROOT
