"""The command `plan`: memory, time, storage and cost of a recipe on given devices."""

from __future__ import annotations

import json as json_format
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Annotated

import cyclopts
from rich.console import Console
from rich.table import Table

from flows.planning.options import Option
from flows.planning.plan import Plan, Row, make_plan
from flows.planning.question import Question
from flows.planning.units import duration, size, work
from flows.recipe_values import Values
from flows.recipes import find_recipe
from infra import storage
from infra.redaction import redact
from tasks.records import UserError
from tasks.shards import ShardDataset
from tasks.train.preflight import preflight

COLUMNS = 120  # width of the table where the output is no terminal


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
    values: Values = None,
    options: Annotated[bool, cyclopts.Parameter(negative="")] = False,
    json: Annotated[bool, cyclopts.Parameter(negative="")] = False,
) -> int:
    """Print memory, batch, time, storage and cost of a recipe, each with its arithmetic; exit code 1 if it cannot fit.

    Args:
        recipe: the configuration of the run, a name or a file .toml; see the command `recipes`.
        gpus: how many GPUs (of a CPU recipe: workers), instead of the recipe's.
        gpu: h200, h100, a100-80, a100-40, l40s, 4090 or cpu; here measures this machine; h100 where the recipe asks for
            GPUs.
        clips: how many clips the table has, as 10.7M or 2k.
        price: USD for an hour of one GPU.
        mfu: the share of the data sheet's peak that training reaches, instead of the table's.
        gbit: speed of the download, Gbit/s.
        base: folder (or hub name) of the text-to-video model to start from, instead of the recipe's.
        data: address of a prepared data set; checks what would fail at step 1, and counts its clips.
        values: FIELD=VALUE, a number of your own instead of the recipe's, as train.steps=200; once for each.
        options: also compare micro-batches, recomputed activations and shards: which fit, which is the fastest.
        json: print one JSON instead.
    """
    numbers = find_recipe(recipe, base, values)
    train, prepare = numbers.train, numbers.prepare
    if gpus is not None:
        train = replace(train, workers=gpus)
    device = gpu or ("h100" if train.gpus_per_worker else "cpu")
    question = Question(device, price=price, mfu=mfu, gbit=gbit, options=options)
    if clips is not None:
        question = replace(question, clips=parse_count(clips))
    elif numbers.demo_clips is not None:
        question = replace(question, clips=numbers.demo_clips, clips_are="drawn")
    warnings: list[str] = []
    if data is not None:
        train = replace(train, dataset=storage.absolute(data))
        warnings = preflight(train)
        question = replace(question, clips=len(ShardDataset(data)), clips_are="prepared")
    result = make_plan(train, prepare, question)
    if json:
        spec = {"question": question, "train": train, "prepare": prepare}
        content = {"spec": {name: asdict(part) for name, part in spec.items()}, "warnings": warnings} | asdict(result)
        content["options"] = [asdict(option) | {"seconds": option.seconds} for option in result.options]
        print(redact(json_format.dumps(content, indent=2)))
    else:
        _print_plan(result, warnings, question.clips is None)
    return int(not result.fits)


def parse_count(text: str) -> int:
    """A count with an optional suffix: 520, 2k, 10.7M, 1,000. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM]?)", text.replace(",", "").replace("_", ""))
    count = round(float(match[1]) * {"": 1, "k": 10**3, "m": 10**6}[match[2].lower()]) if match else 0
    if count < 1:
        raise UserError(f"count {text!r}, expected a number above 0 such as 520, 2k or 10.7M")
    return count


def format_value(row: Row) -> str:
    """A row's value with its unit; bytes in decimal units."""
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


def _print_plan(plan: Plan, warnings: list[str], without_data: bool) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=COLUMNS)
    for line in plan.verdict:
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
    for row in plan.rows:
        if part and row.part != part:
            table.add_row()
        table.add_row(row.part if row.part != part else "", row.quantity, format_value(row), row.how)
        part = row.part
    console.print()
    console.print(table)
    if plan.options:
        console.print()
        console.print(_options_table(plan.options))


def _options_table(options: Sequence[Option]) -> Table:
    """The ways to run a step: those that fit first, the fastest of them first."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in (
        "a step, predicted",
        "micro_batch",
        "recompute_activations",
        "sharding",
        "memory",
        "between devices",
        "",
    ):
        table.add_column(name, justify="right" if name in ("a step, predicted", "memory") else "left", no_wrap=True)
    for option in options:
        notes = [*(["the recipe's"] if option.chosen else []), *([] if option.fits else ["does not fit"])]
        table.add_row(
            duration(option.seconds),
            str(option.micro_batch),
            "yes" if option.recompute else "no",
            option.sharding,
            size(option.size_bytes),
            duration(option.link_seconds) if option.link_seconds else "-",
            ", ".join(notes),
        )
    return table
