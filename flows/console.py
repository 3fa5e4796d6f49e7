"""What a person sees while flows run: one line per tick, and where the results lie at the end."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from infra.redaction import redact

# highlight=False: colour of its own on numbers would make columns jump; soft_wrap: a line stays one line in a log file.
_console = Console(highlight=False, soft_wrap=True)


def log(news: str | Mapping[str, Any]) -> None:
    """The progress callback that flows hand to every stage: a sentence, or counts of a stage under way."""
    text = redact(news if isinstance(news, str) else tick_line(news))
    _console.print(text, markup=False)
    if "prefect" in sys.modules:  # a command that is no flow need not wait until it is loaded
        from prefect.exceptions import MissingContextError
        from prefect.logging import get_run_logger

        with contextlib.suppress(MissingContextError):
            get_run_logger().info(text)  # the same line on the page of the run


def tick_line(news: Mapping[str, Any]) -> str:
    """`stage done/total` in fixed columns, then what else the stage counts, then the estimate of what is left."""
    known = ("stage", "done", "total", "eta_seconds")
    total = str(news.get("total", ""))
    columns = [f"{news['stage']:<10}"]
    if "done" in news:
        columns.append(f"{news['done']:>{len(total)}}/{total}")
    for name, value in news.items():
        if name not in known and value is not None:
            columns.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    left = news.get("eta_seconds")
    if left is not None:
        columns.append(f"left {int(left) // 60}:{int(left) % 60:02d}")
    return "  ".join(columns)


def results(title: str, rows: Mapping[str, str]) -> None:
    """The last lines: what was made and where it is, an address never broken, so that it survives copying."""
    _console.print(f"[bold]{title}[/bold]")
    width = max(map(len, rows))
    for name, place in rows.items():
        _console.print(f"  {name:<{width}}  {redact(place)}", markup=False)
