"""Writes `benchmarks/README.md`: the scripts that exist, and tables and plots of the results that they left.

    python -m benchmarks.report [--results benchmarks/results] [--readme benchmarks/README.md]

A script leaves its result with `--json benchmarks/results/NAME.json`; every result has its machine and its versions.
Results without a table of their own are shown value by value.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS

HERE = Path(__file__).parent
TITLES = {
    "first_step": "From the start of the flow to the first training step",
    "gpu": "The full size on a GPU",
    "loader_wait": "Waiting for data",
    "roofline": "Kernels against the machine's peaks",
    "sampling": "Sampling, ours against diffusers",
    "train_step": "A training step, ours against diffusers",
}


def scripts() -> list[tuple[str, str]]:
    """(module, first sentence of its docstring) of every script that can be run."""
    found = []
    for path in sorted(HERE.glob("*.py")):
        text = path.read_text()
        about = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
        if 'if __name__ == "__main__"' in text:
            found.append((f"benchmarks.{path.stem}", " ".join(about.split())))
    return found


def readme(results: Path, readme_file: Path) -> str:
    """The text of the page; plots are written next to the results."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `python -m benchmarks.report` from the scripts of this folder and their results; do not edit it.",
        "`python -m benchmarks.NAME --help` describes a script; most of them print one JSON.",
        "",
        "| script | what it measures |",
        "|---|---|",
        *(f"| `{module}` | {about} |" for module, about in scripts()),
    ]
    for file in sorted(results.glob("*.json")):
        content = json.loads(file.read_text())
        name = content["script"]
        lines += ["", f"## {TITLES.get(name, name)}", "", machine_line(content["machine"]), ""]
        lines += TABLES.get(name, values_table)(content["result"])
        plot = PLOTS.get(name)
        if plot is not None:
            picture = file.with_suffix(".svg")
            plot(content["result"], picture)
            lines += ["", f"![{TITLES[name]}]({os.path.relpath(picture, readme_file.parent)})"]
    return "\n".join(lines) + "\n"


def machine_line(machine: dict[str, Any]) -> str:
    """One sentence about where and with what a result was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    device = machine["gpu"] or f"{machine['processor']}, {machine['cores']} cores"
    return f"{device}; load {machine['load']}; {machine['date']}; Python {machine['python']}, {versions}."


def table(columns: list[str], rows: list[list[Any]]) -> list[str]:
    """The lines of a markdown table."""
    cells = [[format_cell(value) for value in row] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *cells)]


def format_cell(value: Any) -> str:
    """A number with four digits, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def values_table(result: dict[str, Any]) -> list[str]:
    """Every value of a result by its dotted name; long lists are left out."""

    def flat(value: Any, name: str) -> list[list[Any]]:
        if isinstance(value, dict):
            return [row for key, part in value.items() for row in flat(part, f"{name}.{key}" if name else str(key))]
        if isinstance(value, list):
            return [[name, ", ".join(map(format_cell, value))]] if len(value) <= 8 else []
        return [[name, value]]

    return table(["value", ""], [row for row in flat(result, "") if "kernels" not in row[0]])


def records_table(records: list[dict[str, Any]]) -> list[str]:
    """A table of records, a column for each of their names."""
    columns = list(dict.fromkeys(name for record in records for name in record))
    return table([name.replace("_", " ") for name in columns], [[r.get(n, "") for n in columns] for r in records])


def gpu_table(result: dict[str, Any]) -> list[str]:
    peak = f"{result['device']}, {result['precision']}, matmul peak {result['matmul_peak_flops_per_second'] / 1e12:.3g}"
    clip = ", ".join(f"{seconds:.3g} s ({name})" for name, seconds in result["clip"]["seconds"].items())
    lines = [f"{peak} TFLOP/s. A clip of {result['clip']['steps']} steps: {clip}.", "", "Training steps:", ""]
    return [*lines, *records_table(result["train"]), "", "The VAE's encoder:", "", *records_table(result["vae"])]


def plot_gpu(result: dict[str, Any], file: Path) -> None:
    rows = [row for row in result["train"] if "seconds" in row]
    curves = {
        what: {
            "recomputed" if recompute else "kept": (
                [row["batch"] for row in rows if row["recompute"] == recompute],
                [row[key] for row in rows if row["recompute"] == recompute],
            )
            for recompute in (False, True)
        }
        for what, key in (("batch: clips a second", "clips_per_second"), ("batch: share of the peak", "mfu"))
    }
    lines(file, curves, "")


def lines(file: Path, curves: dict[str, dict[str, tuple[list[float], list[float]]]], unit: str) -> None:
    """Draws a panel for each axis with its curves."""
    figure, axes = _figure(len(curves))
    for panel, (name, named) in zip(axes, curves.items(), strict=True):
        for label, (x, y) in named.items():
            panel.plot(x, y, marker="o", label=label)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_xlabel(name)
        panel.set_ylabel(unit)
        panel.legend()
    _save(figure, file)


def _figure(panels: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "trip"  # equal numbers give an equal file
    figure, axes = plt.subplots(1, panels, figsize=(4 * panels + 1, 3.5), squeeze=False)
    return figure, axes[0]


def _save(figure: Any, file: Path) -> None:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "gpu": gpu_table,
}
PLOTS: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "gpu": plot_gpu,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=HERE / "README.md")
    chosen = parser.parse_args()
    chosen.readme.write_text(readme(chosen.results, chosen.readme))
