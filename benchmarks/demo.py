"""Times `make demo` in a fresh clone, then again, with the peak memory of the machine.

    python3 benchmarks/demo.py [FOLDER]

Standard library only, since the clone makes its own environment. Memory is the use of the complete machine beyond its
use before (MemTotal - MemAvailable), so nothing that Ray or a server started is missed; run it on a quiet machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]


def used_bytes() -> int:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return (int(fields["MemTotal"].split()[0]) - int(fields["MemAvailable"].split()[0])) * 1024


def timed(command: list[str], folder: Path, log: Path) -> dict[str, float]:
    """Runs a command to its end: seconds, and the peak of GB in use beyond the start."""
    before, peak, over = used_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.5):
            peak = max(peak, used_bytes() - before)

    watcher, start = threading.Thread(target=watch), time.monotonic()
    watcher.start()
    try:
        with open(log, "wb") as out:
            subprocess.run(command, cwd=folder, stdout=out, stderr=subprocess.STDOUT, check=True)
    finally:
        over.set()
        watcher.join()
    return {"seconds": round(time.monotonic() - start, 1), "peak_gb": round(peak / 1e9, 2)}


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="trip-demo-"))
    clone = folder / "clone"
    subprocess.run(["git", "clone", "--quiet", str(CHECKOUT), str(clone)], check=True)
    for name in ("first", "again"):
        log = folder / f"{name}.log"
        print(f"make demo, {name} time; the log is {log}", flush=True)
        print(json.dumps({name: timed(["make", "demo"], clone, log)}), flush=True)


if __name__ == "__main__":
    main()
