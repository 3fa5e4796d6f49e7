"""A process continues after the reader of its output has ended, and no line that was printed before is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY

PRINTS = """
import os, subprocess, sys
from pathlib import Path
from infra.output import outlive_reader
if sys.argv[1] == "outlives":
    outlive_reader()
    outlive_reader()  # a second flow of the process
print("first", flush=True)
sys.stdin.readline()
for line in range(5000):
    print("a line", line)
    print("a line", line, file=sys.stderr)
subprocess.run([sys.executable, "-c", "print('child', flush=True)"], check=True)
Path(sys.argv[2]).write_text("finished")
print("last")
"""


def start(how: str, mark: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PRINTS, how, str(mark)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "first\n"
    return process


def let_go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.close()


def test_a_process_outlives_the_reader_of_its_output(tmp_path: Path) -> None:
    for how in ("outlives", "plain"):
        process = start(how, tmp_path / how)
        assert process.stdout is not None
        process.stdout.close()
        let_go(process)
        assert process.wait(60) == (0 if how == "outlives" else 1)
        assert (tmp_path / how).exists() == (how == "outlives")


def test_every_line_reaches_a_reader_that_stays(tmp_path: Path) -> None:
    process = start("outlives", tmp_path / "mark")
    let_go(process)
    assert process.stdout is not None
    lines = process.stdout.read().splitlines()
    assert process.wait(60) == 0 and len(lines) == 10002
    assert {"child", "last"} <= set(lines)
    process.stdout.close()
