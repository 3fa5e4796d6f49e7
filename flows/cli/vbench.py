"""The commands `vbench-export` and `vbench-read`: clips to the tool of VBench-I2V, and its result back into a table."""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import Annotated

import cyclopts

from flows.console import log, results
from infra import storage
from tasks.records import UserError, to_json


def vbench_export(
    report: str, output: Annotated[str, cyclopts.Parameter(alias="-o")], full_info: str | None = None
) -> None:
    """Write the clips of an evaluation under the names and folders that VBench-I2V expects.

    Args:
        report: folder of a finished evaluation.
        output: new folder for `videos` and `images`.
        full_info: VBench's vbench2_i2v_full_info.json, to list what is missing of its standard suite.
    """
    from tasks.evaluate.vbench import IMAGES, VIDEOS, export, missing

    keys = export(storage.absolute(report), storage.absolute(output), log)
    if full_info is not None:
        for dimension, count in missing(storage.read_bytes(full_info), set(keys)).items():
            log(f"vbench      {dimension}: {count} videos of the standard suite are missing")
    folders = {"--videos_path": VIDEOS, "--custom_image_folder": IMAGES}
    results("vbench-export", {flag: storage.join(output, name) for flag, name in folders.items()})


def vbench_read(
    result: list[str], export: str | None = None, report: str | None = None, output: str | None = None
) -> None:
    """Read results of VBench-I2V as rows of a table, with intervals over clips.

    Args:
        result: NAME=FILE, a NAME_eval_results.json of its tool; the same NAME again adds dimensions to its row.
        export: folder of the export, which says which videos are of one source clip.
        report: folder of the evaluation, whose page gets the table.
        output: JSON file for the rows.
    """
    from tasks.evaluate.vbench import EXPORT_FILE, read_result, result_table
    from tasks.evaluation_record import PAGE_FILE
    from tasks.pages import render, with_section

    clips: dict[str, str] = {}
    if export is not None:
        content = storage.read_json(storage.join(export, EXPORT_FILE))
        clips = {file: content["clips"][key] for file, key in content["items"].items()}
    merged: dict[str, dict[str, object]] = {}
    for text in result:
        name, equals, file = text.partition("=")
        if not equals:
            name, file = PurePosixPath(text).name.removesuffix("_eval_results.json"), text
        try:
            merged.setdefault(name, {}).update(json.loads(storage.read_bytes(file)))
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read ({error}); give a NAME_eval_results.json of VBench-I2V") from error
    rows = [read_result(json.dumps(content).encode(), name, clips) for name, content in merged.items()]
    table = result_table(rows)
    print(table.markdown())
    if output is not None:
        storage.write_json(output, [to_json(row) for row in rows])
    if report is not None:
        address = storage.join(report, PAGE_FILE)
        section = render("vbench_section.html", content=table)
        page = with_section(storage.read_bytes(address).decode(), "VBench-I2V", section)
        if page is None:
            raise UserError(f"{address} has no place for VBench-I2V; run its evaluation again")
        storage.write_bytes(address, page.encode())
        log(f"vbench      {address}")
