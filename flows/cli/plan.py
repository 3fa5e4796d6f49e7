"""The command `plan`: what a recipe will take on given devices, printed before anything starts."""

from __future__ import annotations

import json as json_format
import re
from dataclasses import asdict, replace
from functools import partial
from typing import Annotated

import cyclopts
from rich.console import Console
from rich.table import Table

from flows.planning.plan import Plan, Row, make_plan
from flows.planning.preflight import plan_spec
from flows.planning.units import duration, size, work
from flows.recipes import find_recipe
from infra import storage
from infra.redaction import redact
from tasks.records import UserError
from tasks.shards import ShardDataset
from tasks.train.optimizer import choose_trained
from tasks.train.preflight import check_before_start

COLUMNS = 120  # of the table where there is no terminal to ask


def plan(
    recipe: str = "demo",
    gpus: int | None = None,
    gpu: str | None = None,
    clips: str | None = None,
    price: float | None = None,
    mfu: float | None = None,
    gbit: float = 1.0,
    base: str | None = None,
    data: str | None = None,
    json: Annotated[bool, cyclopts.Parameter(negative="")] = False,
) -> int:
    """Print memory, batch, time, storage and cost of a recipe, each with its arithmetic; exit code 1 if it cannot fit.

    Args:
        recipe: which numbers to use; see the command `recipes`.
        gpus: how many GPUs (of a CPU recipe: workers), instead of the recipe's.
        gpu: h200, h100, a100-80, a100-40, l40s, 4090 or cpu; h100 where the recipe asks for GPUs.
        clips: how many clips the table has, as 10.7M or 2k.
        price: USD for an hour of one GPU.
        mfu: the share of the data sheet's peak that training reaches, instead of the table's.
        gbit: speed of the download, Gbit/s.
        base: folder (or hub name) of the text-to-video model to start from, instead of the recipe's.
        data: address of a prepared data set; checks what would fail at step 1, and counts its clips.
        json: print one JSON instead.
    """
    chosen = find_recipe(recipe, base)
    spec = plan_spec(chosen, gpus, gpu, price, mfu, gbit)
    if clips is not None:
        spec = replace(spec, clips=parse_count(clips))
    elif chosen.demo_clips is not None:
        spec = replace(spec, clips=chosen.demo_clips, clips_are="drawn", windows_per_clip=1)  # they are short
    warnings: list[str] = []
    if data is not None:
        train = replace(chosen.train, dataset=storage.absolute(data), workers=spec.workers)
        warnings = check_before_start(train)
        spec = replace(spec, clips=len(ShardDataset(data)), clips_are="prepared", windows_per_clip=1)
    made = make_plan(spec, partial(choose_trained, spec=chosen.train))
    if json:
        print(redact(json_format.dumps({"spec": asdict(spec), "warnings": warnings} | asdict(made), indent=2)))
    else:
        _show(made, warnings, spec.clips is None)
    return int(not made.fits)


def parse_count(text: str) -> int:
    """A count as people write it: 520, 2k, 10.7M, 1,000. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM]?)", text.replace(",", "").replace("_", ""))
    count = round(float(match[1]) * {"": 1, "k": 10**3, "m": 10**6}[match[2].lower()]) if match else 0
    if count < 1:
        raise UserError(f"count {text!r}, expected a number above 0 such as 520, 2k or 10.7M")
    return count


def said(row: Row) -> str:
    """A row's value for a person; bytes in decimal units."""
    value = row.value
    if value is None:
        return "-"
    if row.unit == "s":
        return duration(value)
    if row.unit == "B":
        return size(value)
    if row.unit in ("FLOP", "FLOP/s"):
        return work(value) + row.unit.removeprefix("FLOP")
    if row.unit == "parameters":
        return f"{value / 1e6:,.1f} M"
    number = f"{value:,.0f}" if value == int(value) or value > 100 else f"{value:.3g}"
    return f"{number} {row.unit}".rstrip()


def _show(made: Plan, warnings: list[str], without_data: bool) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=COLUMNS)
    for line in made.verdict:
        console.print(line, style="bold", markup=False)
    for line in warnings:
        console.print(f"warning: {line}", markup=False)
    if without_data:
        console.print("for download, storage and epochs give --clips, as 10.7M")
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("", style="dim", no_wrap=True)
    table.add_column("quantity", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("from")
    part = ""
    for row in made.rows:
        if part and row.part != part:
            table.add_row()
        table.add_row(row.part if row.part != part else "", row.quantity, said(row), row.how)
        part = row.part
    console.print()
    console.print(table)
