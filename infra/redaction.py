"""Removes passwords, keys and signed tokens from addresses before they are printed, logged or stored."""

from __future__ import annotations

import hashlib
import logging
import re
import traceback

HIDDEN = "***"

# An address ends at white space, at < or >, at a quote that closes a string, or where the next address begins.
_SLASHES = r":(?:\\{0,2}/){2}"  # also as JSON may write them
_QUOTE = r"""\\{0,2}["'](?:[\s,:;.)\]}]|$)"""
_ADDRESS = re.compile(rf"({_SLASHES})((?:(?!{_SLASHES}|{_QUOTE})[^\s<>])*)")
_AUTHORITY = re.compile(r"[^/?#]*")
# An address in the query of another one.
_ENCODED_USERINFO = re.compile(r"(%3A%2F%2F)(?:(?!%2F)[^\s&<>\"])*(?:%40|@)", re.IGNORECASE)
_PARAMETER = re.compile(rf"([?&;#])([\w.%+-]{{1,64}})=((?:(?!{_QUOTE})[^\s&<>])*)")
_SENTENCE_END = ".,:;!?)]}\\"
_SECRET_NAME = re.compile(
    r".*(token|signature|secret|password|passwd|credentials?|api[-_]?key|(access|secret|private)[-_]?key([-_]?id)?)"
    r"|googleaccessid|l?sig|key|pwd|pass|passphrase|auth|authkey|jwt|hdnea|hdnts|hdntl|odbc_connect",
    re.IGNORECASE,
)
# Schemes whose user names without a password are not secret: a user of a database or host, a container of a store.
_PLAIN_NAMES = frozenset(
    {"postgres", "postgresql", "mysql", "mariadb", "mssql", "oracle", "ssh", "sftp"}
    | {"hdfs", "abfs", "abfss", "wasb", "wasbs"}
)
_SCHEME = re.compile(r"[a-z0-9+.-]*$", re.IGNORECASE)


def redact(text: str) -> str:
    """`text` with `***` in place of the user and password of every address, and of the values of secret parameters.

    `text` is an address, or any text that contains some: a sentence, an error of a library, JSON, several lines. Text
    without a secret is returned unchanged. Takes time linear in the length of `text`.
    """
    if "=" in text:
        text = _PARAMETER.sub(_hide_value, text)
    if "://" in text or ":\\" in text:
        text = _ADDRESS.sub(_hide_userinfo, text)
    if "%" in text:
        text = _ENCODED_USERINFO.sub(rf"\1{HIDDEN}%40", text)
    return text


def name_of(url: str) -> str:
    """The name of a URL in records: the URL, or without its secrets and with a hash that still identifies it."""
    redacted = redact(url)
    return url if redacted == url else f"{redacted} (sha256 {hashlib.sha256(url.encode()).hexdigest()[:16]})"


def without_userinfo(address: str) -> str:
    """An address without the user and password before its host."""
    return re.sub(r"(?<=://)[^/?#]*@", "", address, count=1)


class RedactingFilter(logging.Filter):
    """Redacts the message and the traceback of log records."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        redacted = redact(message)
        if redacted != message:
            record.msg, record.args = redacted, ()
        if record.exc_info and record.exc_info[1] is not None and not record.exc_text:
            record.exc_text = redact("".join(traceback.format_exception(record.exc_info[1]))).rstrip("\n")
        return True


def _hide_value(found: re.Match[str]) -> str:
    separator, name, value = found.groups()
    if not value or not _SECRET_NAME.fullmatch(name):
        return found[0]
    return f"{separator}{name}={HIDDEN}{value[len(value.rstrip(_SENTENCE_END)) :]}"


def _hide_userinfo(found: re.Match[str]) -> str:
    mark, rest = found.groups()
    authority = _AUTHORITY.match(rest)
    assert authority is not None
    userinfo, at, host = authority[0].rpartition("@")
    after = rest[authority.end() :]
    if not at:
        # A password with / ? or # makes an invalid address, which some libraries still accept.
        user, colon, port = authority[0].partition(":")
        if not colon or user.startswith("[") or (not port or port.isdecimal()) or "@" not in after:
            return found[0]
        return f"{mark}{HIDDEN}@{after.rpartition('@')[2]}"
    scheme = _SCHEME.search(found.string[max(0, found.start() - 24) : found.start()])
    kinds = set(scheme[0].lower().split("+")) if scheme is not None else set()
    # `github://organization:repository@branch` is fsspec's, and names no password.
    if "github" in kinds or (":" not in userinfo and kinds & _PLAIN_NAMES):
        return found[0]
    return f"{mark}{HIDDEN}@{host}{after}"
