"""The values of a recipe by their dotted names: set, compared, written as TOML and described by a JSON Schema.

Every field of the recipe's dataclasses has a name such as `train.model.fusion.width`. A value is checked against the
field's type, and against the bounds of its class. Addresses are no values: commands take them as flags.
"""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from cyclopts import Parameter

from infra import storage
from tasks.json_records import parse_record
from tasks.records import UserError

Values = Annotated[list[str] | None, Parameter(name="--set", negative="")]
Record = TypeVar("Record")
NONE = "none"  # TOML has no null
MAX_BYTES = 1 << 20  # of a recipe's file

# Fields that are no values of a recipe, and what to do instead.
_ADDRESS = "it follows from --root"
_BASE = "give --base"
_READ = "it is read from the base"
_RAY = "set RAY_ADDRESS in the environment"
REFUSED = {
    "prepare.source": "give --source and its options",
    "prepare.output": _ADDRESS,
    "prepare.base": _BASE,
    "prepare.ray_address": _RAY,
    "prepare.fingerprint": "it is computed from the other values",
    "prepare.retry": "give --retry",
    "train.dataset": "give --dataset",
    "train.dataset_sha256": "it is computed from the data set",
    "train.base_sha256": "it is computed from the base",
    "train.output": _ADDRESS,
    "train.base": _BASE,
    "train.start": "give --from",
    "train.model.residual_std": "it is measured on the data set",
    "train.model.unet_output": _READ,
    "train.model.schedule.base": _READ,
    "evaluate.model": "give --model",
    "evaluate.model_sha256": "it is computed from the model",
    "evaluate.dataset": "give --dataset",
    "evaluate.output": _ADDRESS,
    "evaluate.held_out_fraction": "set train.held_out_fraction, which splits the data for both",
    "evaluate.methods": "give --method",
    "evaluate.champion": "give --champion",
    "evaluate.base": _BASE,
    "evaluate.base_clips": _ADDRESS,
    "evaluate.judges": "give --extractors",
    "evaluate.ray_address": _RAY,
}


def parse_assignments(texts: Sequence[str], flag: str = "--set", example: str = "train.steps=200") -> dict[str, Any]:
    """Values by dotted name from FIELD=VALUE texts; VALUE is TOML, and anything else is a string. The last one counts.

    Raises:
        UserError: a text without a name or an equals sign.
    """
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not name or not equals:
            raise UserError(f"{flag} {text!r}, expected FIELD=VALUE such as {example}")
        values |= flatten({name: _toml_value(value)})
    return values


def _toml_value(text: str) -> Any:
    try:
        table = tomllib.loads(f"value = {text}")
        json.dumps(table)
    except (tomllib.TOMLDecodeError, TypeError):  # a bare word, or a date
        return text
    return table["value"] if len(table) == 1 else text


def read_toml(address: str) -> dict[str, Any]:
    """The content of a recipe's file. Raises UserError if it cannot be read."""
    try:
        content = storage.read_range(address, 0, MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(f"recipe {address!r} has more than {MAX_BYTES} bytes; give a file of a recipe's values")
        return tomllib.loads(content.decode())
    except FileNotFoundError:
        raise UserError(f"no recipe file {address!r}; write one with: recipes export demo -o {address}") from None
    except (ValueError, IsADirectoryError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"recipe {address!r} is no TOML ({error}); correct it, see: recipes show demo") from None


def flatten(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Values by dotted name from the tables of a TOML file."""
    values: dict[str, Any] = {}
    for name, value in tree.items():
        values |= flatten(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}": value}
    return values


def with_values(record: Record, values: Mapping[str, Any], path: str = "", whole: Any = None) -> Record:
    """A copy of a record, and of the records in it, with other values; every class checks its bounds.

    Raises:
        UserError: an unknown or refused field, a value of another type, or a value out of bounds.
    """
    types, changes, nested = _types(type(record)), {}, {}
    whole = record if whole is None else whole  # whose fields an unknown name is compared with
    for name, value in values.items():
        first, _, rest = name.partition(".")
        full = path + name
        if path + first in REFUSED:
            raise UserError(f"{path + first} is no value of a recipe; {REFUSED[path + first]}")
        if first not in types:
            raise UserError(f"no field {full!r}{_suggestion(path + first, rest, list(settable(whole)))}")
        if is_dataclass(getattr(record, first)):
            if rest:
                nested.setdefault(first, {})[rest] = value
            else:
                inside = next(iter(settable(getattr(record, first), f"{path + first}.")))
                raise UserError(f"{full} is a group of values; set one of them, such as {inside}")
        elif rest:
            raise UserError(f"{path + first} is a single value and has no {rest!r}; set {path + first} itself")
        else:
            changes[first] = _checked(full, types[first], value)
    for name, inner in nested.items():
        changes[name] = with_values(getattr(record, name), inner, f"{path}{name}.", whole)
    try:
        return replace(record, **changes)  # pyright: ignore[reportArgumentType] - a dataclass, as is_dataclass says
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}{error}" if path else str(error)) from None


def _checked(name: str, kind: Any, value: Any) -> Any:
    """The value as the field's type has it; "none" is None where the type has it."""
    if value == NONE and type(None) in get_args(kind):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} {value}, expected a finite number")
    try:
        return parse_record(kind, json.dumps(value))
    except (ValueError, TypeError) as error:
        expected = str(error).rpartition(": ")[2].replace("Input should be", "expected", 1)
        kinds = " or none" if type(None) in get_args(kind) else ""
        raise UserError(f"{name} {value!r}, {expected}{kinds}; see: recipes show demo") from None


def _suggestion(name: str, rest: str, names: Sequence[str]) -> str:
    """The nearest of all names, for an unknown one."""
    full = f"{name}.{rest}" if rest else name
    last = full.rpartition(".")[2]
    close = difflib.get_close_matches(full, names, n=1, cutoff=0.6) or [n for n in names if n.endswith(f".{last}")][:1]
    return f", did you mean {close[0]!r}?" if close else "; see: recipes show demo"


@cache
def _types(kind: type[Any]) -> dict[str, Any]:
    return get_type_hints(kind)


def settable(record: Any, path: str = "") -> dict[str, Any]:
    """All values of a record and of the records in it that can be set, by dotted name."""
    return dict(_walk(record, path))


def _walk(record: Any, path: str) -> Iterator[tuple[str, Any]]:
    groups = []
    for field in fields(record):
        name, value = path + field.name, getattr(record, field.name)
        if name in REFUSED:
            continue
        if is_dataclass(value):
            groups.append((value, f"{name}."))
        else:
            yield name, value
    for value, inside in groups:  # after the plain values, as TOML wants it
        yield from _walk(value, inside)


def differences(one: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    """Both values of every field in which two records differ."""
    first, second = settable(one), settable(other)
    return {name: (first[name], second[name]) for name in first if first[name] != second[name]}


def format_toml(value: Any) -> str:
    """A value in TOML, on one line."""
    if value is None:
        return json.dumps(NONE)
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(format_toml, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def to_toml(values: Mapping[str, Any]) -> str:
    """A TOML document with a table for every group of dotted names, in their order."""
    lines: list[str] = []
    table = ""
    for name, value in values.items():
        group, _, last = name.rpartition(".")
        if group != table:
            lines += ["", f"[{group}]"]
            table = group
        lines.append(f"{last} = {format_toml(value)}")
    return "\n".join(lines).lstrip("\n") + "\n"


def schema(record: Any) -> dict[str, Any]:
    """The JSON Schema of a recipe's file; the defaults are the values of `record`."""
    parent = {"type": "string", "description": "the recipe that gives all other values: a name, or another file"}
    description = _object_schema(record, "")
    description["properties"] = {"from": parent} | description["properties"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe of TRIP",
        **description,
        "required": ["from"],
    }


def _object_schema(record: Any, path: str) -> dict[str, Any]:
    from pydantic import TypeAdapter

    properties: dict[str, Any] = {}
    for field in fields(record):
        name, value = path + field.name, getattr(record, field.name)
        if name in REFUSED:
            continue
        if is_dataclass(value):
            properties[field.name] = _object_schema(value, f"{name}.")
            continue
        kind = TypeAdapter(_types(type(record))[field.name]).json_schema()
        if "anyOf" in kind:
            kind["anyOf"] = [{"const": NONE} if option == {"type": "null"} else option for option in kind["anyOf"]]
        properties[field.name] = kind | {"default": NONE if value is None else value}
    return {"type": "object", "properties": properties, "additionalProperties": False}
