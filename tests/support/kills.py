"""Kills a command between two of its writes, for tests of what the same command makes of it afterwards."""

from __future__ import annotations

from typing import Any

import pytest

from infra import storage


def contents(uri: str) -> dict[str, bytes]:
    """Every file of a data set by name: what must be equal in the end."""
    return {name: storage.read_bytes(storage.join(uri, name)) for name in storage.list_dir(uri)}


class Killed(BaseException):
    """What a kill looks like from inside: no handler of errors runs."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> list[str]:
    """Ends the process's work at its write or delete number `step`; the list grows with those that happened."""
    happened: list[str] = []

    def counted(name: str) -> None:
        original = getattr(storage, name)

        def run(*args: Any) -> Any:
            if ".lease-" in str(args[0]):  # the lease of a process that was really killed ends with it
                return original(*args)
            if len(happened) == step:
                raise Killed
            happened.append(f"{name} {args[-1] if name == 'upload_file' else args[0]}")
            return original(*args)

        monkeypatch.setattr(storage, name, run)

    for name in ("write_bytes", "upload_file", "delete"):
        counted(name)
    return happened
