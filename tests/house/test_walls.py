"""The walls of the house: which room imports which, and where each framework lives."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
ROOMS = ("trip_model", "infra", "tasks", "flows")
MAY_IMPORT = {
    "trip_model": set(),
    "infra": set(),
    "tasks": {"infra", "trip_model"},
    "flows": {"tasks", "infra", "trip_model"},
}
FILES = sorted(path for room in ROOMS for path in (REPOSITORY / room).rglob("*.py"))
SCRIPTS = sorted(path for folder in ("examples", "benchmarks") for path in (REPOSITORY / folder).rglob("*.py"))
TESTS = sorted((REPOSITORY / "tests").rglob("*.py"))
# The stage "prepare" is two rooms: encode drives the ingest library on its workers.
ONE_STAGE = {("encode", "ingest")}
# Libraries below the stages.
SHARED = {"records", "json_records", "evaluation_record", "model_folder", "shards", "video", "metrics", "pages"}
# Flows that run other flows' stages.
PARENTS = {"reproduce", "ablate", "nightly"}


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, lazily or not; `from a import b` counts as `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; the house uses absolute ones"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def inside(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


@pytest.mark.parametrize("path", FILES, ids=inside)
def test_imports_only_fall(path: Path) -> None:
    room = path.relative_to(REPOSITORY).parts[0]
    above = (tops(path) & set(ROOMS)) - {room} - MAY_IMPORT[room]
    assert not above, f"{inside(path)} of {room} imports {sorted(above)}"


@pytest.mark.parametrize("path", [p for p in FILES if inside(p).startswith("tasks/")], ids=inside)
def test_a_stage_imports_no_other_stage(path: Path) -> None:
    parts = path.relative_to(REPOSITORY).parts
    own = parts[1].removesuffix(".py")
    others = {name.split(".")[1] for name in imports(path) if name.startswith("tasks.")} - SHARED - {own}
    assert all((own, other) in ONE_STAGE for other in others), f"{inside(path)} imports {sorted(others)}"


def test_flows_are_siblings() -> None:
    stems = {path.stem for path in (REPOSITORY / "flows").glob("*_*.py") if "@flow" in path.read_text()} | PARENTS
    for stem in sorted(stems - PARENTS):
        imported = {
            name.split(".")[1] for name in imports(REPOSITORY / "flows" / f"{stem}.py") if name.startswith("flows.")
        }
        assert not imported & stems, f"flow {stem} imports {sorted(imported & stems)}"


def test_commands_are_imported_by_no_flow() -> None:
    for path in (REPOSITORY / "flows").glob("*.py"):
        if path.stem != "__main__":
            assert not [name for name in imports(path) if name.startswith("flows.cli")], (
                f"{inside(path)} imports a command"
            )


@pytest.mark.parametrize("path", FILES, ids=inside)
def test_frameworks_are_at_home(path: Path) -> None:
    name, used = inside(path), tops(path)
    if "prefect" in used:
        assert name.startswith("flows/")
    if "ray" in used:
        assert re.fullmatch(r"tasks/\w+/(\w+_)?job\.py|infra/(cluster|workers)\.py", name)
    if "mlflow" in used:
        assert name.startswith("tasks/register/") or name in (
            "infra/tracking.py",
            "infra/telemetry.py",
            "tasks/serve/versions.py",
        )


def test_the_library_imports_what_its_wheel_asks_for_and_nothing_else() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["heif"]]
    asked = {re.split(r"[<>=!~ \[]", line)[0].lower() for line in lines}
    distribution = {"PIL": "pillow", "open_clip": "open_clip_torch", "pillow_heif": "pillow-heif"}
    used = {top for path in FILES if inside(path).startswith("trip_model/") for top in tops(path)}
    third_party = used - set(sys.stdlib_module_names) - {"trip_model"}
    # huggingface_hub, tokenizers and einops-like helpers come with diffusers and transformers.
    missing = {name for name in third_party if distribution.get(name, name).lower() not in asked | {"huggingface_hub"}}
    assert not missing


def test_the_library_loads_no_framework_of_the_floors_above() -> None:
    modules = [
        ".".join(p.relative_to(REPOSITORY).with_suffix("").parts)
        for p in FILES
        if inside(p).startswith("trip_model/") and p.name not in ("__init__.py", "__main__.py")
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "above = {'ray', 'prefect', 'mlflow', 'tasks', 'infra', 'flows'}\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & above))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize("module", ["tasks.encode.job", "tasks.evaluate.job", "flows.layout", "flows.recipes"])
def test_a_driver_is_imported_without_torch(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "False"


@pytest.mark.parametrize("path", FILES + SCRIPTS + TESTS, ids=inside)
def test_a_file_opens_with_one_sentence(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, f"{inside(path)} has no docstring"
    first = docstring.split("\n\n")[0].strip()
    assert "\n" not in first or len(first) < 400, f"{inside(path)} opens with more than a sentence"
    assert len(first) > 20


def test_no_drawer_for_odds_and_ends() -> None:
    assert not [inside(path) for path in FILES if path.stem in ("utils", "util", "common", "helpers", "misc")]


def test_no_flow_file_hides_a_package() -> None:
    # Prefect puts the folder of a flow file first on the path, and loads the file under its bare stem.
    stems = {path.stem for path in (REPOSITORY / "flows").glob("*.py")}
    assert not stems & {*ROOMS, *sys.stdlib_module_names, "ray", "torch", "prefect", "mlflow", "records", "shards"}
