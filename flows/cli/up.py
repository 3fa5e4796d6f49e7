"""The commands `up`, `down` and `status`: all services on one machine, without containers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

from flows.cli import stack as stacks
from flows.cli.stack_page import text_page, write_page
from flows.console import log
from infra import storage
from infra.supervisor import ServiceFailed, Supervisor
from tasks.records import UserError

DEFAULT_FOLDER = "runs/up"


def up(
    folder: str = DEFAULT_FOLDER,
    database: Literal["auto", "postgresql", "sqlite"] = "auto",
    s3: str | None = None,
    bucket: str = "",
    cpus: int | None = None,
) -> None:
    """Start PostgreSQL, Prefect, MLflow, Ray, a worker and the model service; start again what does not run.

    All services listen on loopback and ask for a password. `source FOLDER/client.env` lets a shell use them.

    Args:
        folder: the folder of data, logs, secrets and process ids.
        database: PostgreSQL, or SQLite files; auto takes PostgreSQL where it is installed. It stays as first chosen.
        s3: the endpoint of an object store for MLflow's artifacts, with its keys in AWS_ACCESS_KEY_ID and
            AWS_SECRET_ACCESS_KEY; `moto` starts a stand-in that loses everything when it stops; by default the
            artifacts are files in the folder.
        bucket: the bucket of the artifacts, which must exist; by default `trip`.
        cpus: processors of the Ray head; by default all.
    """
    began = time.monotonic()
    stack = stacks.prepare(_path(folder), database, s3, bucket, cpus)
    supervisor = Supervisor(stack.folder)
    with supervisor.locked():
        supervisor.end_leftovers(stacks.ADOPTING)
        stacks.choose_ports(stack, supervisor.running())
        stack.write_files()
        try:
            supervisor.up(stack.services, log)
        except ServiceFailed as error:
            raise UserError(str(error)) from error
        states = supervisor.states(stack.services)
        log(f"up          {time.monotonic() - began:.0f} s")
        write_page(stack, states)
        print(text_page(stack, states))


def down(folder: str = DEFAULT_FOLDER) -> None:
    """Stop all services of a stack; its data, logs and secrets stay.

    Args:
        folder: the folder of the stack.
    """
    stack = stacks.load(_path(folder))
    supervisor = Supervisor(stack.folder)
    with supervisor.locked():
        supervisor.down(stack.services, log)
        write_page(stack, supervisor.states(stack.services))


def status(folder: str = DEFAULT_FOLDER) -> int:
    """Print the state and the address of each service; exit code 1 if one does not respond.

    Args:
        folder: the folder of the stack.
    """
    stack = stacks.load(_path(folder))
    states = Supervisor(stack.folder).states(stack.services)
    write_page(stack, states)
    print(text_page(stack, states))
    return int(any(state.status in ("stopped", "unhealthy") for state in states))


def _path(folder: str) -> Path:
    return Path(storage.absolute(folder))
