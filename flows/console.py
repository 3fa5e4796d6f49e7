"""Console output of flows: one line per tick, and the addresses of the results at the end."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from infra.metrics import record_progress
from infra.redaction import redact

# highlight=False: coloured numbers would break the columns; soft_wrap: a line stays one line in a log file.
_console = Console(highlight=False, soft_wrap=True)


def log(message: str | Mapping[str, Any]) -> None:
    """The progress callback of every stage: prints a sentence, or the counts of a running stage."""
    if not isinstance(message, str):
        record_progress(message)
    text = redact(message if isinstance(message, str) else tick_line(message))
    _console.print(text, markup=False)
    if "prefect" in sys.modules:  # a command without a flow does not load it
        from prefect.exceptions import MissingContextError
        from prefect.logging import get_run_logger

        with contextlib.suppress(MissingContextError):
            get_run_logger().info(text)  # the same line in the run's log


def tick_line(counts: Mapping[str, Any]) -> str:
    """`stage done/total` in fixed columns, then the other counts of the stage, then the remaining time."""
    known = ("stage", "done", "total", "eta_seconds")
    total = str(counts.get("total", ""))
    columns = [f"{counts['stage']:<10}"]
    if "done" in counts:
        columns.append(f"{counts['done']:>{len(total)}}/{total}")
    for name, value in counts.items():
        if name not in known and value is not None:
            columns.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    eta_seconds = counts.get("eta_seconds")
    if eta_seconds is not None:
        columns.append(f"left {int(eta_seconds) // 60}:{int(eta_seconds) % 60:02d}")
    return "  ".join(columns)


def results(title: str, rows: Mapping[str, str]) -> None:
    """Prints the last lines: each result and its address, never wrapped, so that it can be copied."""
    _console.print(f"[bold]{title}[/bold]")
    width = max(map(len, rows))
    for name, address in rows.items():
        _console.print(f"  {name:<{width}}  {redact(address)}", markup=False)
