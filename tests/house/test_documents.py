"""What the documents promise: every command resolves, every path exists, every equation has a function and a test."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from flows.cli.app import parse
from trip_model.__main__ import parse as parse_model

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    path
    for path in [
        *REPOSITORY.glob("*.md"),
        *sorted((REPOSITORY / "docs").rglob("*.md")),
        REPOSITORY / "examples" / "README.md",
    ]
    if path.is_file()
]
PAPER_MAP = REPOSITORY / "docs" / "paper-map.md"
ROW = re.compile(r"^\|(.+)\|(.+)\|(.+)\|(.+)\|\s*$")


def commands() -> list[tuple[str, str]]:
    """(document, command) of every line in the shell blocks of the documents, continued lines joined."""
    found = []
    for path in DOCUMENTS:
        for block in re.findall(r"```(?:bash|sh|shell|console)\n(.*?)```", path.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.sub(r"\s+#.*$", "", line.removeprefix("$ ")).strip()
                if line and not line.startswith("#"):
                    found.append((path.relative_to(REPOSITORY).as_posix(), line))
    return found


@pytest.mark.parametrize(("document", "command"), commands())
def test_a_documented_command_resolves(document: str, command: str) -> None:
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=.*", word)]
    if not words or words[0] == "export":
        return
    program = Path(words[0]).name
    if program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
        assert {word for word in words[1:] if "=" not in word} <= targets
    elif program in ("python", "python3") and words[1:2] == ["-m"]:
        if words[2] == "flows":
            parse(words[3:])
        elif words[2] == "trip_model":
            parse_model(words[3:])
        else:
            assert words[2] in ("pytest", "pip", "venv", "mlflow", "prefect", "ruff", "pyright", "build"), command
    elif len(words) > 1 and (program == "bash" or (program in ("python", "python3") and words[1].endswith(".py"))):
        assert (REPOSITORY / words[1]).is_file(), f"{document}: {words[1]} does not exist"
    elif program == "kubectl" or program == "docker":
        for place, word in enumerate(words):
            if word == "-f":
                assert (REPOSITORY / words[place + 1]).is_file(), f"{document}: {words[place + 1]} does not exist"
    elif program == "prefect" and "--base-job-template" in words:
        assert (REPOSITORY / words[words.index("--base-job-template") + 1]).is_file()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.relative_to(REPOSITORY).as_posix())
def test_a_linked_file_exists(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        if "://" not in target and not target.startswith("mailto:"):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def rows() -> list[tuple[str, str, str]]:
    """(equation, function, test) of every row of the paper map; a cell may name several, each in backticks."""
    if not PAPER_MAP.is_file():
        return []
    found = []
    for line in PAPER_MAP.read_text().splitlines():
        match = ROW.match(line)
        if match and not set(line) <= set("|-: "):
            equation, _, functions, tests = (cell.strip() for cell in match.groups())
            if "`" in functions:
                found.append((equation, functions, tests))
    return found


def test_the_paper_map_has_every_equation() -> None:
    assert PAPER_MAP.is_file(), "docs/paper-map.md is missing"
    named: set[int] = set()
    for equation, _, _ in rows():
        for first, last in re.findall(r"(\d+)(?:\s*[-\u2013]\s*(\d+))?", equation):
            named |= set(range(int(first), int(last or first) + 1))
    assert set(range(1, 12)) <= named


@pytest.mark.parametrize(("equation", "functions", "tests"), rows())
def test_an_equation_names_a_function_and_a_test_that_exist(equation: str, functions: str, tests: str) -> None:
    names = re.findall(r"`([^`]+)`", functions)
    assert names
    for name in names:
        thing, rest = None, name.removesuffix("()").split(".")
        for cut in range(len(rest), 0, -1):
            try:
                thing = importlib.import_module(".".join(rest[:cut]))
            except ModuleNotFoundError:
                continue
            for attribute in rest[cut:]:
                thing = getattr(thing, attribute)
            break
        assert thing is not None, f"{equation}: {name} does not exist"
    named = re.findall(r"`([^`]+)`", tests)
    assert named, f"{equation}: no test"
    for test in named:
        file, _, function = test.partition("::")
        assert (REPOSITORY / file).is_file(), f"{equation}: {file} does not exist"
        assert re.search(
            rf"^def {re.escape(function.split('[')[0])}\(", (REPOSITORY / file).read_text(), re.MULTILINE
        ), test
