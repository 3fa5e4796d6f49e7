"""What gets installed: the wheel holds the library alone, and the pins are names and versions."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_wheel_holds_the_library_alone(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"  # a build leaves folders behind, so not in the checkout
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        if (REPOSITORY / name).exists():
            source.mkdir(exist_ok=True)
            shutil.copy(REPOSITORY / name, source / name)
    for room in ("trip_model", "tasks", "infra", "flows"):
        shutil.copytree(REPOSITORY / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("trip_i2v-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "trip_model",
        wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info",
    }
    expected = {p.relative_to(REPOSITORY).as_posix() for p in (REPOSITORY / "trip_model").rglob("*.py")}
    assert expected | {"trip_model/py.typed"} <= set(names)
    assert any(name.endswith("LICENSE") for name in names) and any(name.endswith("NOTICE") for name in names)


def test_constraints_are_names_and_versions() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line.strip() and not line.startswith("#")]
    assert len(pins) > 100
    assert not [line for line in pins if not re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.!+-]+", line)]


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    asked = [*project["dependencies"], *(line for extra in extras for line in extra)]
    names = {re.split(r"[<>=!~ \[]", line)[0] for line in asked} - {"trip-i2v"}
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    assert not {name for name in names if name.lower().replace("_", "-") not in pinned}


def test_the_caps_that_break_silently_are_kept() -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]["pipeline"]
    assert any(re.match(r"fastapi.*<0\.151", line) for line in extras)
    assert any(re.match(r"sqlalchemy.*<2\.1", line) for line in extras)
