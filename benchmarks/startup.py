"""Measures how long the command line takes to answer: `--help`, `recipes`, and `NAME --help` of every command.

    python -m benchmarks.startup

Each command runs `REPEATS` times as a process of its own after one run that warms the file cache; the table has the
median wall time and the heavy packages that were imported. The goal is below 1 s for each on two idle cores.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

from flows.cli.app import COMMANDS, FLOWS

REPEATS = 5
HEAVY = ("torch", "diffusers", "transformers", "ray", "prefect", "mlflow", "av", "open_clip")
PROBE = """
import sys
from flows.cli.app import main
try:
    code = main(sys.argv[1:])
except SystemExit as ended:
    code = ended.code
print(*(name for name in {heavy!r} if name in sys.modules), file=sys.stderr)
sys.exit(code)
"""


def measure(arguments: list[str]) -> tuple[float, str]:
    """Median wall seconds of `python -m flows ARGUMENTS`, and the heavy packages that it imports."""
    probe = [sys.executable, "-c", PROBE.format(heavy=HEAVY), *arguments]
    done = subprocess.run(probe, capture_output=True, text=True, check=True)
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "flows", *arguments], capture_output=True, check=True)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""


def main() -> None:
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {sys.version.split()[0]}")
    print(f"{'command':<28}{'median s':>9}  heavy imports")
    for arguments in [["--help"], ["recipes"], *([name, "--help"] for name in (*FLOWS, *COMMANDS))]:
        seconds, heavy = measure(arguments)
        print(f"{' '.join(arguments):<28}{seconds:>9.2f}  {heavy or 'none'}")


if __name__ == "__main__":
    main()
