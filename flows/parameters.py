"""JSON schemas of flow parameters: what the form of Prefect's UI offers, and what its server rejects.

Prefect derives a schema from a flow's signature; `Schema` adds to it what a Python type cannot express.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

import docstring_parser
from cyclopts import Parameter

from tasks.records import RETRY_CLASSES


class Schema:
    """Keywords of JSON schema for an annotated parameter; `keywords` is called when a schema is made."""

    def __init__(self, keywords: Callable[[], dict[str, Any]]) -> None:
        self._keywords = keywords

    def __get_pydantic_json_schema__(
        self, core_schema: Any, handler: Callable[[Any], dict[str, Any]]
    ) -> dict[str, Any]:
        return handler(core_schema) | self._keywords()


def _recipes() -> dict[str, Any]:
    from flows.recipes import RECIPES

    file = {"title": "File", "type": "string", "pattern": r"\.toml$"}
    return {"anyOf": [{"title": "Recipe", "type": "string", "enum": list(RECIPES)}, file]}


def _protocols() -> dict[str, Any]:
    from tasks.evaluate.protocol.presets import preset_names

    file = {"title": "File", "type": "string", "pattern": r"\.(toml|json)$"}
    return {"anyOf": [{"title": "Preset", "type": "string", "enum": preset_names()}, file, {"type": "null"}]}


def _formats() -> dict[str, Any]:
    from tasks.ingest.sources import FORMATS

    return {"enum": ["auto", *FORMATS]}


def _retry_classes() -> dict[str, Any]:
    name = "|".join(map(re.escape, RETRY_CLASSES))
    return {"anyOf": [{"type": "string", "pattern": rf"^\s*({name})\s*(,\s*({name})\s*)*$"}, {"type": "null"}]}


# What a training starts from.
From = Annotated[str, Parameter(name="--from")]
BASE, LAST, CHAMPION = "base", "last", "champion"
# What `gc` keeps by default: results of the last nights and hours, and the last versions and champions of a model.
NIGHTS, HOURS, VERSIONS = 7, 24.0, 10

RECIPE = Schema(_recipes)
PROTOCOL = Schema(_protocols)
FORMAT = Schema(_formats)
RETRY = Schema(_retry_classes)
POSITIVE = Schema(lambda: {"minimum": 1})
NOT_NEGATIVE = Schema(lambda: {"minimum": 0})
SHARE = Schema(lambda: {"minimum": 0, "maximum": 0.5})
CAPTIONS = Schema(lambda: {"anyOf": [{"type": "string", "enum": ["first", "all"]}, {"type": "integer"}]})


def form_schema(schema: Any) -> Any:
    """A schema whose objects reject names that they do not list, with the docstring's text at each attribute."""
    if isinstance(schema, list):
        return [form_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {name: form_schema(value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        schema.setdefault("additionalProperties", False)
        for attribute in docstring_parser.parse(schema.get("description", "")).params:
            if attribute.arg_name in schema["properties"]:
                schema["properties"][attribute.arg_name].setdefault("description", attribute.description)
    return schema
