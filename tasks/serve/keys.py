"""API keys by name, from a file of hashes that is read again when it changes, and from the environment."""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
from pathlib import Path

from tasks.records import UserError

NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
_LINE = re.compile(r"([\w.-]{1,64})\s+([0-9a-f]{64})", re.ASCII)
ENVIRONMENT_NAME = "environment"  # of the key in TRIP_API_KEY
_log = logging.getLogger(__name__)


def new_key() -> str:
    """Returns a key of 256 random bits. Its plain SHA-256 cannot be searched, so the file needs no slower hash."""
    return secrets.token_urlsafe(32)


def key_line(name: str, key: str) -> str:
    """Returns the line of the file for a key. Raises UserError: another character than letters, digits, `_.-`."""
    if not NAME.fullmatch(name):
        raise UserError(f"the key's name is {name[:80]!r}; use 1 to 64 letters, digits and '_.-'")
    return f"{name} {_digest(key)}\n"


class Keys:
    """The keys that are accepted now.

    A line of the file is a name, a space and the SHA-256 of the key in hexadecimal; `#` starts a comment. The file is
    read again after it changes; a file that cannot be read then leaves the keys as they were, and the log says so.

    Args:
        file: the file, if any.
        key: one more key, by the name `ENVIRONMENT_NAME`.
    Raises:
        UserError: the file cannot be read, or a line is not as above.
    """

    def __init__(self, file: Path | None = None, key: str | None = None) -> None:
        self._file = file
        self._fixed = {_digest(key): ENVIRONMENT_NAME} if key else {}
        self._stamp = None if file is None else _stamp(file)
        self._names = self._read()

    def name_of(self, key: str) -> str | None:
        """Returns the name of a key, or None for one that is not accepted."""
        self._refresh()
        return self._names.get(_digest(key))

    def _refresh(self) -> None:
        if self._file is None or (stamp := _stamp(self._file)) == self._stamp:
            return
        self._stamp = stamp
        try:
            self._names = self._read()
            _log.info("keys: read %d keys from %s", len(self._names), self._file)
        except UserError as error:
            _log.error("keys: %s; the keys stay as they were", error)

    def _read(self) -> dict[str, str]:
        names = dict(self._fixed)
        if self._file is None:
            return names
        try:
            lines = self._file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the key file {self._file} cannot be read ({error}); give a readable text file") from error
        for number, line in enumerate(lines, 1):
            text = line.partition("#")[0].strip()
            if not text:
                continue
            match = _LINE.fullmatch(text)
            if match is None:  # without the line, which may contain a key
                raise UserError(
                    f"{self._file}, line {number}: expected a name and a SHA-256; see the command serve-key"
                )
            names[match[2]] = match[1]
        if not names:
            raise UserError(f"{self._file} has no key; add one with the command serve-key")
        return names


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        about = file.stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_size, about.st_ino
