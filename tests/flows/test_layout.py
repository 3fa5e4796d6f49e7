"""Addresses follow from what goes in: resolving one draws nothing, opens no port and reads no model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flows import layout
from flows.cli.app import COMMANDS, FLOWS
from flows.cli.signature import signature_of, summary_of
from flows.source import DEFAULT
from tasks.encode.fingerprint import fingerprint_of
from tasks.ingest.demo import demo_table, write_demo_corpus
from tasks.ingest.sources import source_digest
from tasks.ingest.spec import SourceSpec
from tasks.records import UserError

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_demos_data_set_has_its_address_before_a_frame_is_drawn(tmp_path: Path, tiny_base: Path) -> None:
    run = layout.resolve("demo", None, str(tmp_path), str(tiny_base), DEFAULT)
    spec = run.prepare
    assert spec.output.startswith(f"{tmp_path}/data/") and not list(tmp_path.iterdir())
    assert spec.fingerprint == fingerprint_of(spec)
    assert run.prepare is spec  # resolved once


def test_the_table_of_the_demo_corpus_is_known_from_its_numbers(tmp_path: Path) -> None:
    address, sha256 = demo_table(str(tmp_path / "corpus"), 3, 32)
    assert not (tmp_path / "corpus").exists()
    assert write_demo_corpus(tmp_path / "corpus", 3, 32) == address
    assert source_digest(SourceSpec(address)) == sha256


def test_a_recipe_without_clips_of_its_own_needs_a_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no clips of its own; name a table or a folder"):
        _ = layout.resolve("paper", None, str(tmp_path), None, DEFAULT).prepare


@pytest.mark.parametrize("name", [*FLOWS, *COMMANDS])
def test_the_flags_of_a_command_are_read_without_its_module(name: str) -> None:
    module = COMMANDS.get(name, f"flows.{name.replace('-', '_')}")
    function = name.replace("-", "_")
    code = (
        "import sys\n"
        "from flows.cli.app import parse\n"
        f"from flows.cli.signature import signature_of\n"
        f"signature_of({module!r}, {function!r})\n"
        "print([m for m in ('torch', 'ray', 'prefect', 'mlflow', 'diffusers', 'av') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("name", [*FLOWS, *COMMANDS])
def test_a_signature_from_the_source_is_the_functions_own(name: str) -> None:
    import importlib
    import inspect

    module = COMMANDS.get(name, f"flows.{name.replace('-', '_')}")
    function = name.replace("-", "_")
    given = getattr(importlib.import_module(module), function)
    given = getattr(given, "fn", given)
    read = signature_of(module, function)
    parameters = inspect.signature(given).parameters.values()
    assert [(p.name, p.kind, p.default) for p in inspect.signature(read).parameters.values()] == [
        (p.name, p.kind, p.default) for p in parameters
    ]
    assert inspect.getdoc(read) == inspect.getdoc(given)
    assert summary_of(module, function) == (inspect.getdoc(given) or "").splitlines()[0]
