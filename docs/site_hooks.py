"""Hooks of mkdocs.yml: generates the reference from the sources and the pages of top-level files, and fits their links.

The sources are parsed and not imported, so the site needs neither torch nor the project installed.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# Files of the repository that are pages of the site, too.
TOP_LEVEL = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}
# The dataclasses that a stage takes and returns, by the end of their name.
SPECS = re.compile(r"(Spec|Report|Rule|Files|Preset)$")
LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]+)(#[^)]*)?\)")


class FieldComments(griffe.Extension):
    """Gives a field of a dataclass without a docstring the comment on its line, or the comment lines above it."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        is_dataclass = any(str(decorator.value).startswith("dataclass") for decorator in cls.decorators)
        if not is_dataclass or isinstance(cls.filepath, list):
            return
        lines = cls.filepath.read_text().splitlines()
        for field in cls.attributes.values():
            if field.docstring is None and field.lineno and (comment := _comment(lines, field.lineno - 1)):
                field.docstring = griffe.Docstring(comment, lineno=field.lineno, parent=field)


def _comment(lines: list[str], place: int) -> str:
    if own := re.search(r"  # (.+)$", lines[place]):
        return own[1]
    above = place
    while lines[above - 1].strip().startswith("# "):
        above -= 1
    return " ".join(line.strip().removeprefix("# ") for line in lines[above:place])


class PlainText(griffe.Extension):
    """Shows docstrings as they are written: in `lambda* prior = sqrt(lambda*)` the asterisks are no emphasis."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            parts = re.split(r"(`+[^`]*`+)", obj.docstring.value)
            parts[::2] = [part.replace("*", r"\*") for part in parts[::2]]
            obj.docstring.value = "".join(parts)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fills the sections of the navigation that mkdocs.yml leaves to the folders' content."""
    decisions = [{_title(path): f"decisions/{path.name}"} for path in sorted((DOCS / "decisions").glob("*.md"))]
    sections = {"reference/": _reference_nav(), "decisions/": decisions}

    def filled(item: Any) -> Any:
        if isinstance(item, list):
            return [filled(part) for part in item]
        if isinstance(item, dict):
            return {name: filled(part) for name, part in item.items()}
        return sections.get(item, item)

    config.nav = filled(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    for target, _, content in _reference():
        files.append(File.generated(config, target, content=content))
    for name, target in TOP_LEVEL.items():
        files.append(File.generated(config, target, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they work in the repository become links of the site; of a file that is no page the text is left."""
    names = {target: name for name, target in TOP_LEVEL.items()}
    source = ROOT / names[page.file.src_uri] if page.file.src_uri in names else DOCS / page.file.src_uri

    def fitted(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        if "://" in target or target.startswith("mailto:"):
            return link[0]
        path = Path(os.path.normpath(source.parent / target))
        if path.is_relative_to(DOCS):
            uri = path.relative_to(DOCS).as_posix()
        elif path.parent == ROOT and path.name in TOP_LEVEL:
            uri = TOP_LEVEL[path.name]
        else:
            return text
        return f"[{text}]({os.path.relpath(uri, os.path.dirname(page.file.src_uri) or '.')}{anchor})"

    return LINK.sub(fitted, markdown)


def _reference() -> Iterator[tuple[str, tuple[str, str], str]]:
    """(address, (section, title), content) of each generated page."""
    for path in sorted((ROOT / "trip_model").glob("*.py")):
        if not path.stem.startswith("_"):
            yield _page("trip_model", path.stem, [f"trip_model.{path.stem}"])
    for room in sorted(path for path in (ROOT / "tasks").iterdir() if path.is_dir()):
        names = [name for path in sorted(room.rglob("*.py")) for name in _specs(path)]
        if names:
            yield _page("tasks", room.name, names)
    for path in sorted((ROOT / "flows").glob("*.py")):
        names = [f"{_module(path)}.{name}" for name in _flows(path)]
        if names:
            yield _page("flows", path.stem, names)
    (recipes,) = (ROOT / "flows").glob("recipes.py")
    yield _page("flows", "recipes", [_module(recipes)])


def _page(section: str, name: str, objects: list[str]) -> tuple[str, tuple[str, str], str]:
    blocks = "\n\n".join(f"::: {item}" for item in objects)
    if objects == [f"{section}.{name}"]:  # a module, whose docstring opens the page
        content = f"{blocks}\n    options:\n      heading_level: 1\n      show_root_full_path: true\n"
    else:
        content = f"# `{section}.{name}`\n\n{blocks}\n"
    return f"reference/{section}/{name}.md", (section, name), content


def _reference_nav() -> list[Any]:
    sections: dict[str, list[Any]] = {}
    for target, (section, title), _ in _reference():
        sections.setdefault(section, []).append({title: target})
    return ["reference/index.md", *({name: pages} for name, pages in sections.items())]


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def _specs(path: Path) -> list[str]:
    classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    return [f"{_module(path)}.{node.name}" for node in classes if SPECS.search(node.name)]


def _flows(path: Path) -> list[str]:
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    return [f.name for f in functions if any(ast.unparse(d).startswith("flow(") for d in f.decorator_list)]


def _title(path: Path) -> str:
    """The first heading of a page, up to its colon."""
    heading = path.read_text().splitlines()[0].removeprefix("# ")
    return heading.split(":")[0]
