"""The command line: `python -m flows NAME --flags`; each flow is a command and its signature is the flags."""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import inspect
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cyclopts

from flows import curation, planning, promotion, serve
from flows.recipes import RECIPES, find_recipe
from flows.selftest import selftest
from infra import storage
from infra.redaction import redact
from infra.settings import apply_environment_defaults, move_credentials
from tasks.records import UserError
from trip_model.encoders import BaseFolderError

# No flows, and need none.
OWN = [[name] for name in ("recipes", "sample", "verify", "forget", "deduplicate", "plan", "selftest", "serve")]
OWN += [["promote"], ["rollback"], ["live"]]
FLOWS = ("reproduce", "prepare-latents", "train-trip", "evaluate-trip", "register-trip", "ablate")

# What a person can cure of what the operating system says, and how.
REMEDIES = {
    errno.ENOSPC: "free some space or give another --root",
    errno.EDQUOT: "free some space or give another --root",
    errno.EROFS: "give a --root that can be written",
    errno.EACCES: "give a --root that you may write, or change its permissions",
    errno.EPERM: "give a --root that you may write, or change its permissions",
    errno.ENOTDIR: "give a --root whose parents are folders",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOMEM: "free some memory",
}


def main(arguments: list[str]) -> int:
    """Runs one command. Returns 0 or what it returns; 2 when a person can cure the error; 1 with a traceback if not."""
    # What a flow is given is stored by Prefect's server, which shows it to everybody who may look at it.
    arguments = _without_credentials(arguments)
    # Prefect reads its settings when it is imported. Its console handler would print the traceback of every failed
    # state; people get a sentence instead, and the server of the run keeps the rest.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    if "PREFECT_API_URL" not in os.environ:
        apply_environment_defaults(str(_prefect_home(_root_of(arguments))))
    try:
        return _app(arguments)(arguments, result_action="return_value") or 0
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    except Exception as error:  # the last stop: it decides between a sentence and a traceback
        cause = curable(error)
        if cause is None:
            print(redact(traceback.format_exc()), end="", file=sys.stderr)
            print(f"error: {type(error).__name__} ended a stage; the same command continues", file=sys.stderr)
            return 1
        print(f"error: {sentence(cause)}", file=sys.stderr)
        return 2


def parse(arguments: list[str]) -> dict[str, Any]:
    """The flags of a command line by name, as its command would get them. Raises `cyclopts.CycloptsError`."""
    _, given, _ = _app(arguments).parse_args(arguments, print_error=False, exit_on_error=False)
    given.apply_defaults()
    return dict(given.arguments)


def curable(error: BaseException) -> Exception | None:
    """The error in `error` that a person can cure, however frameworks have wrapped it; None when there is none."""
    waiting: list[Any] = [error]
    for found in waiting:  # grows while it is walked
        # Ray raises a copy that is of the error's class as well, but says the worker's whole traceback.
        ray_cause = getattr(found, "cause", None)
        if not isinstance(ray_cause, BaseException):
            if isinstance(found, UserError | BaseFolderError | storage.StorageError):
                return found
            if isinstance(found, OSError) and found.errno in REMEDIES:
                return found
        workers = getattr(found, "worker_failures", None)
        inner = [ray_cause, found.__cause__, *(workers.values() if isinstance(workers, dict) else ())]
        waiting += [item for item in inner if isinstance(item, BaseException) and item not in waiting]
    return None


def sentence(error: Exception) -> str:
    """What to tell a person, in one line."""
    if isinstance(error, OSError) and error.errno in REMEDIES:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}; {REMEDIES[error.errno]}"
    return redact(" ".join(str(error).split()))


def _app(arguments: list[str]) -> cyclopts.App:
    about = "TRIP, from a table of links to a registered model."
    app = cyclopts.App(name="python -m flows", help=about, version_flags=[])

    @app.command
    def recipes() -> None:
        """List the recipes."""
        for name, recipe in RECIPES.items():
            print(f"{name:<16} {recipe().about}")

    app.command(planning.plan)
    app.command(selftest)
    app.command(serve.serve)
    app.command(promotion.promote)
    app.command(promotion.rollback)
    app.command(promotion.live)
    app.command(curation.sample)
    app.command(curation.verify)
    app.command(_alone(curation.forget))
    app.command(_alone(curation.deduplicate))
    named = [name for name in FLOWS if name in arguments] or (() if arguments[:1] in OWN else FLOWS)
    for name in named:
        app.command(_command(name), name=name)
    return app


def _command(name: str) -> Callable[..., None]:
    """A command with the signature and the description of a flow, which runs it with a Prefect server."""
    attribute = name.replace("-", "_")
    with warnings.catch_warnings():
        # Prefect wants its home on import; the folder is made when a server needs it, not for a --help.
        warnings.filterwarnings("ignore", message="Failed to create the Prefect home")
        flow = getattr(importlib.import_module(f"flows.{attribute}"), attribute)

    @functools.wraps(flow.fn)
    def run(*args: Any, **flags: Any) -> None:
        given = inspect.signature(flow.fn).bind(*args, **flags)
        given.apply_defaults()
        find_recipe(given.arguments["recipe"])  # a misspelt name is told before a server is started for it
        with _only_one(given.arguments["root"]), _prefect_server(given.arguments["root"]):
            flow(**given.arguments)

    return run


def _alone(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command that changes a data set, refused while another is at work on the root that the data set lies below."""

    @functools.wraps(command)
    def run(*args: Any, **flags: Any) -> Any:
        data = inspect.signature(command).bind(*args, **flags).arguments["data"]
        root = storage.parent(storage.parent(storage.absolute(data)))
        with _only_one(root) if storage.exists(storage.join(root, ".lock")) else contextlib.nullcontext():
            return command(*args, **flags)

    return run


def _without_credentials(arguments: list[str]) -> list[str]:
    """The arguments with no password in the value of --tracking-uri: it moves into the environment."""
    flag = "--tracking-uri"
    moved = list(arguments)
    for place, word in enumerate(arguments):
        if place and arguments[place - 1] == flag:
            moved[place] = move_credentials(word)
        elif word.startswith(f"{flag}="):
            moved[place] = f"{flag}={move_credentials(word.removeprefix(f'{flag}='))}"
    return moved


def _root_of(arguments: list[str]) -> str:
    """The value of --root before anything is parsed: it must be known before Prefect is imported."""
    for place, word in enumerate(arguments):
        if word == "--root" and place + 1 < len(arguments):
            return arguments[place + 1]
        if word.startswith("--root="):
            return word.removeprefix("--root=")
    return "runs/demo"


@functools.cache
def _prefect_home(root: str) -> Path:
    """Prefect's own state lies with the results, not in the user's home; for a remote root it is not kept."""
    if storage.local_path(root) is None:
        return Path(tempfile.mkdtemp(prefix="trip-prefect-"))
    return Path(storage.absolute(root)) / ".prefect"


@contextlib.contextmanager
def _only_one(root: str) -> Iterator[None]:
    """Two commands on one local root would write over each other; the lock goes with the process, however it ends."""
    if storage.local_path(root) is None:
        yield
        return
    import fcntl

    folder = Path(storage.absolute(root))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another command is at work in {folder}; wait for it, or give another --root") from None
        yield


@contextlib.contextmanager
def _prefect_server(root: str) -> Iterator[None]:
    """The server at PREFECT_API_URL where one is named, else one for the length of this command."""
    if "PREFECT_API_URL" in os.environ:
        yield
        return
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.local_server import local_server

    with local_server(_prefect_home(root)) as url, temporary_settings({PREFECT_API_URL: url}):
        try:
            yield
        finally:
            # What is still queued would find no server when Prefect sends it at exit.
            EventsWorker.drain_all(timeout=5)
            APILogWorker.drain_all(timeout=5)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
