"""Do the scripts of the benchmarks run on a CPU at a small size, and does the report show what they leave?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.machine import machine, write_json
from benchmarks.report import readme, scripts


def test_the_script_for_gpus_runs_with_a_tiny_network_on_the_cpu() -> None:
    result = gpu.main(tiny=True)
    assert [(row["batch"], row["recompute"]) for row in result["train"]] == [
        (1, False),
        (2, False),
        (1, True),
        (2, True),
    ]
    for row in result["train"]:
        assert row["seconds"] > 0 and 0 < row["mfu"] < 1
        assert row["clips_per_second"] == pytest.approx(row["batch"] / row["seconds"])
    assert set(result["clip"]["seconds"]) == {"guidance", "no_guidance"} and result["clip"]["steps"] == 2
    assert result["vae"][0]["frames_per_second"] > 0


def test_the_report_names_every_script_and_shows_each_result(tmp_path: Path) -> None:
    results = tmp_path / "results"
    row = {"batch": 1, "recompute": False, "seconds": 0.5, "clips_per_second": 2.0, "mfu": 0.25}
    content = {
        "device": "a GPU",
        "precision": "bfloat16",
        "matmul_peak_flops_per_second": 7e14,
        "train": [
            row,
            row | {"batch": 2, "clips_per_second": 3.0},
            {"batch": 4, "recompute": False, "out_of_memory": True},
        ],
        "clip": {"steps": 50, "seconds": {"guidance": 3.0}},
        "vae": [{"frames": 16, "seconds": 1.0, "frames_per_second": 16.0}],
    }
    write_json("gpu", content, results / "gpu.json")
    write_json("new", {"seconds": {"ours": 1.5}, "left_out": list(range(20))}, results / "new.json")
    page = readme(results, tmp_path / "README.md")
    assert "| 1 | False | 0.5 | 2 | 0.25 |" in page and "| seconds.ours | 1.5 |" in page and "left_out" not in page
    assert f"torch {machine()['versions']['torch']}" in page
    picture = results / "gpu.svg"
    first = picture.read_bytes()
    assert len(first) > 1000 and "(results/gpu.svg)" in page
    readme(results, tmp_path / "README.md")
    assert picture.read_bytes() == first


def test_the_page_in_the_repository_names_scripts_that_exist_and_their_results() -> None:
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    page = (folder / "README.md").read_text()
    known = {module for module, _ in scripts()}
    named = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `benchmarks.")}
    assert named and named <= known
    for file in (folder / "results").glob("*.json"):
        assert json.loads(file.read_text())["machine"]["versions"]["torch"] in page
