"""Three nights as a schedule runs them: a first model, nothing new, and five new clips next to a champion."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from flows.nights import read_nights
from tasks.evaluation_record import read_evaluation
from tasks.ingest.demo import write_demo_corpus

TINY = Path(__file__).resolve().parents[1] / "support" / "tiny_cli.py"
# The command line, and then whether it imported torch or Ray.
COMMAND = """
import runpy, sys
file = sys.argv.pop(1)
try:
    sys.argv[0] = file
    runpy.run_path(file, run_name="__main__")
finally:
    print("imported", sorted({"torch", "ray", "prefect"} & sys.modules.keys()))
"""


def nightly(base: Path, root: Path, table: Path, *flags: str) -> str:
    """Runs the command `nightly` and returns what it printed."""
    left_out = ("PREFECT_", "RAY_", "MLFLOW_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(left_out)} | {"OMP_NUM_THREADS": "1"}
    command = ["nightly", "--recipe", "tiny", "--root", str(root), "--source", str(table), *flags]
    words = [sys.executable, "-c", COMMAND, str(TINY), str(base), *command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_three_nights(tiny_base: Path, tmp_path: Path) -> None:
    root, corpus = tmp_path / "run", tmp_path / "corpus"
    all_rows = Path(write_demo_corpus(str(corpus), 17, 32)).read_text().splitlines(keepends=True)
    table = corpus / "own.csv"
    table.write_text("".join(all_rows[:13]))
    nightly(tiny_base, root, table)
    (first,) = read_nights(str(root))
    assert (first.new_clips, first.version) == (12, "1") and Path(first.model).is_dir()

    began = time.monotonic()
    quiet = nightly(tiny_base, root, table)
    print(f"a night with nothing new: {time.monotonic() - began:.1f} s")
    assert f"nothing new since {first.time}" in quiet and "imported []" in quiet
    assert len(read_nights(str(root))) == 1

    # The tiny model passes no gate, so it is made champion by hand; its weights exist only in the registry.
    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    client.set_registered_model_alias("trip", "champion", "1")
    shutil.rmtree(Path(first.model).parent)
    table.write_text("".join(all_rows))
    few = nightly(tiny_base, root, table, "--least-new", "6")
    assert "5 new clips, fewer than 6: nothing to train" in few
    assert len(list((root / "evaluate").glob("*/report.json"))) == 1

    nightly(tiny_base, root, table, "--least-new", "5")
    last = read_nights(str(root))[-1]
    assert (last.new_clips, last.version, last.champion) == (5, "2", False)
    record = read_evaluation(last.report)
    assert record.champion is not None and read_evaluation(record.champion).model_sha256 != record.model_sha256
    assert "champion" in record.rows and any("champion" in rule.rule for rule in record.gate.rules)
    assert last.outcome.startswith("not promoted: ")
    assert str(client.get_model_version_by_alias("trip", "champion").version) == "1"
    assert "nothing new since" in nightly(tiny_base, root, table, "--least-new", "5")
