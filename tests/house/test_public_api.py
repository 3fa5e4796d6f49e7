"""The front of the library: `from trip_model import ...` is lazy, complete and typed."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import trip_model

REPOSITORY = Path(__file__).resolve().parents[2]
PUBLIC = [name for name in trip_model.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_the_object_of_its_module(name: str) -> None:
    module = importlib.import_module(f"trip_model.{trip_model._MODULES[name]}")
    value = getattr(trip_model, name)
    assert value is getattr(module, name)
    assert value.__module__ == module.__name__ and value.__doc__


def test_type_checkers_see_the_same_names_in_the_same_modules() -> None:
    tree = ast.parse((REPOSITORY / "trip_model" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    typed = {alias.name: node.module for node in imports for alias in node.names}
    assert typed == {name: f"trip_model.{module}" for name, module in trip_model._MODULES.items()}
    assert sorted(typed) == sorted(PUBLIC)


def test_importing_the_library_is_cheap() -> None:
    code = "import sys, trip_model; dir(trip_model); print(sorted({n.split('.')[0] for n in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not set(ast.literal_eval(done.stdout)) & {"torch", "diffusers", "transformers", "numpy", "PIL", "av"}


def test_a_wrong_name_is_an_import_error_that_names_it() -> None:
    with pytest.raises(ImportError, match="TripPipelin"):
        exec("from trip_model import TripPipelin")
    with pytest.raises(AttributeError, match="'trip_model' has no attribute 'pipline'"):
        _ = trip_model.pipline  # type: ignore[attr-defined]
