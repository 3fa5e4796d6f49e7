"""Reads the records of tasks from JSON, with every field and type checked."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

Record = TypeVar("Record")


def parse_record(kind: type[Record], content: bytes | str) -> Record:
    """Parses a record from its JSON and checks every type. Raises ValueError that names the field."""
    try:
        return _adapter(kind).validate_json(content, strict=True, extra="forbid")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field_path = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{field_path + ': ' if field_path else ''}{first['msg']}") from None


@functools.cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
