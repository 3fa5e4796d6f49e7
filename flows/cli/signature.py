"""Reads the signature and the docstring of a command from its source file, without running that file.

The flags of a command are the parameters of its function. Importing a flow to read them would import Prefect, and most
stages torch and Ray: seconds for a `--help`. Only the names that the signature itself uses are imported.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any


def signature_of(module: str, name: str) -> Callable[..., None]:
    """A function with the parameters, defaults, annotations and docstring of `module.name`; calling it does nothing."""
    tree = _parse(module)
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    used = {node.id for node in ast.walk(function.args) if isinstance(node, ast.Name)}
    future = ast.parse("from __future__ import annotations").body
    (stub,) = ast.parse(f"def {name}():\n    {ast.get_docstring(function)!r}").body
    assert isinstance(stub, ast.FunctionDef)
    stub.args = function.args
    body = [*future, *_definitions(tree, used), stub]
    namespace: dict[str, Any] = {"__name__": module}
    exec(compile(ast.fix_missing_locations(ast.Module(body, [])), str(_path(module)), "exec"), namespace)
    return namespace[name]


def summary_of(module: str, name: str) -> str:
    """The first line of the docstring of `module.name`."""
    (function,) = [node for node in _parse(module).body if isinstance(node, ast.FunctionDef) and node.name == name]
    return (ast.get_docstring(function) or "").partition("\n")[0]


@functools.cache
def _parse(module: str) -> ast.Module:
    return ast.parse(_path(module).read_text(encoding="utf-8"))


def _path(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, f"{module} has no source file"
    return Path(spec.origin)


def _definitions(tree: ast.Module, used: set[str]) -> list[ast.stmt]:
    """The imports and the module constants of the file that the names in `used` come from, in their order."""
    kept: list[ast.stmt] = []
    for node in reversed(tree.body):
        if isinstance(node, ast.ImportFrom) and node.module != "__future__":
            aliases = [alias for alias in node.names if (alias.asname or alias.name) in used]
            if aliases:
                kept.append(ast.ImportFrom(node.module, aliases, 0))
        elif isinstance(node, ast.Import):
            aliases = [alias for alias in node.names if (alias.asname or alias.name) in used]
            if aliases:
                kept.append(ast.Import(aliases))
        elif isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id in used for t in node.targets):
            used |= {part.id for part in ast.walk(node.value) if isinstance(part, ast.Name)}
            kept.append(node)
    return kept[::-1]
