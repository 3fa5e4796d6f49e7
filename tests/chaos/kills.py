"""Measures recovery of prepare: kills a run at random moments, repeats the command and compares every byte.

    python -m tests.chaos.kills [--moments 20] [--seed 0] [--first 0] [--count N]

Each moment kills (SIGKILL) the driver, one of Ray's workers or the raylet, in turn. An undisturbed run comes first. The
moments are stratified over the lifetime of the process in that run, so that they cover start, encoding, writing,
publishing and the report. Then the same command is repeated until it succeeds, while processes of the killed run may
still be running, and every byte of the data set is compared. Prints one JSON. `--first` and `--count` select moments.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rig.files import make_file
from infra.settings import CHECKOUT
from tasks.curate.verify import problems
from tasks.encode.spec import PrepareSpec
from tasks.ingest.drawing import draw_scene
from tasks.ingest.spec import SourceSpec
from tasks.records import to_json
from tests.chaos.family import VICTIMS, Leftovers, adopt_orphans, end_family, role, victims

BASE = str(CHECKOUT / "examples" / "demo_base" / "weights")
_POLL_SECONDS = 0.2
_MOST_RERUNS = 3
_GRACE_SECONDS = 90.0  # a process that outlives the killed command by more is an orphan


@dataclass(frozen=True)
class Calm:
    """An undisturbed run: its duration, the lifetime of each victim (seconds from the start), and its files."""

    seconds: float
    spans: dict[str, tuple[float, float]]
    files: dict[str, bytes]
    manifest_sha: str


@dataclass(frozen=True)
class Ended:
    """The end of a command; `status` is None if it hung and was killed."""

    status: int | None
    last_line: str  # of stderr
    report: dict[str, Any] | None


def write_corpus(folder: Path, rows: int, size: int) -> str:
    """Writes drawn clips next to their table; every eighth row names a missing, broken or short file."""
    folder.mkdir(parents=True)
    lines = ["videoid,contentUrl,name"]
    for row in range(rows):
        kind = ("missing", "noise", "no-index", "short")[row // 8 % 4] if row % 8 == 5 else "clip"
        if kind != "missing":
            (folder / f"{row}.mp4").write_bytes(make_file(kind, row, size))
        lines.append(f"{row},{row}.mp4,{draw_scene(row).caption}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return str(folder / "table.csv")


class Run:
    """A run of a command with a spec file, in its own process group."""

    def __init__(self, spec: Any, folder: Path, command: str = "tests.chaos.driver") -> None:
        words = folder / "spec.json"
        words.write_text(json.dumps(to_json(spec)))
        self.began = time.monotonic()
        self._out, self._err = folder / "stdout", folder / "stderr"
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", command, str(words)],
                # Ray and unfinished shards use this folder too, so that nothing is shared with other sessions.
                env=os.environ | {"TMPDIR": str(folder)},
                cwd=CHECKOUT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                text=True,
                start_new_session=True,
            )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def over(self) -> bool:
        return self.process.poll() is not None

    def wait(self, limit: float, poll: Callable[[], Any] = lambda: None) -> Ended:
        """Waits for the end and calls `poll` meanwhile; after `limit` seconds the run counts as hung."""
        while not self.over() and self.seconds < limit:
            poll()
            time.sleep(_POLL_SECONDS)
        hung = not self.over()
        if hung:
            self.process.kill()
            self.process.wait()
        errors = self._err.read_text().strip().splitlines()
        output = self._out.read_text().strip().splitlines()
        report = json.loads(output[-1]) if self.process.returncode == 0 else None
        return Ended(None if hung else self.process.returncode, errors[-1] if errors else "", report)


def run_calmly(spec: PrepareSpec, folder: Path) -> Calm:
    seen: dict[str, list[float]] = {victim: [] for victim in VICTIMS}
    run = Run(spec, folder)

    def poll() -> None:
        for victim in victims(run.process.pid):
            seen[victim].append(run.seconds)

    ended = run.wait(600, poll)
    assert ended.report is not None, f"the undisturbed run failed: {ended.last_line}"
    spans = {victim: (times[0], times[-1]) for victim, times in seen.items()}
    return Calm(run.seconds, spans, contents(Path(spec.output)), ended.report["manifest_sha"])


def contents(dataset: Path) -> dict[str, bytes]:
    """Every file below the data set, unfinished and hidden ones too, by its path."""
    return {str(path.relative_to(dataset)): path.read_bytes() for path in dataset.rglob("*") if path.is_file()}


def stage_of(spec: PrepareSpec) -> str:
    """Describes how far a data set is."""
    output = Path(spec.output)
    names = os.listdir(output) if output.is_dir() else []
    shards = sum(name.startswith("shard-") and name.endswith(".json") for name in names)
    halves = sum(name.endswith(".part") for name in names) + sum(
        1 for name in names if name.endswith(".tar") and name.replace(".tar", ".json") not in names
    )
    if "manifest.json" in names:
        return "report" if not Path(f"{spec.output}.report.json").exists() else "report written"
    return f"{shards} shards" + (f", {halves} half" if halves else "") if names else "start"


def kill_and_repeat(spec: PrepareSpec, calm: Calm, victim: str, share: float, folder: Path) -> dict[str, Any] | None:
    """Kills at `share` (0 to 1) of the victim's lifetime; returns None if the run ended before."""
    run = Run(spec, folder)
    first, last = calm.spans[victim]
    wanted = first + share * (last - first)
    target = None
    while target is None and not run.over():
        early = wanted - run.seconds
        if early <= 0:
            target = victims(run.process.pid).get(victim)
        if target is None:
            time.sleep(min(early, _POLL_SECONDS) if early > 0 else _POLL_SECONDS)
    if target is None:
        run.wait(0)
        return None
    stage, second = stage_of(spec), run.seconds
    target.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    limit = 3 * calm.seconds + 60
    ended = run.wait(run.seconds + limit)
    leftovers = Leftovers()
    first_end = {
        "status": ended.status,
        "seconds_after_kill": round(time.monotonic() - killed, 1),
        "said": ended.last_line,
    }
    reruns = 0
    while ended.status != 0 and reruns < _MOST_RERUNS:
        reruns += 1
        ended = Run(spec, folder).wait(limit, leftovers.poll)
    recovered = time.monotonic() - killed
    while leftovers.poll() and leftovers.seconds < _GRACE_SECONDS:
        time.sleep(_POLL_SECONDS)
    orphans = sorted(role(process) for process in end_family())
    output = Path(spec.output)
    spools = list(folder.glob("trip-*"))
    spool_bytes = sum(path.stat().st_size for spool in spools for path in spool.rglob("*"))
    for spool in spools:
        shutil.rmtree(spool)
    return {
        "victim": victim,
        "second": round(second, 2),
        "stage": stage,
        "first": first_end,
        "reruns": reruns,
        "last": {"status": ended.status, "said": ended.last_line},
        "recovery_seconds": round(recovered, 1),
        "shards_reused": ended.report and ended.report["shards_reused"],
        "identical": contents(output) == calm.files,
        "problems": list(problems(str(output))),
        "report_is_of_it": _report_sha(spec) == calm.manifest_sha,
        "left_running_seconds": leftovers.stayed,
        "orphans": orphans,
        "temporary_folders_left": [len(spools), spool_bytes],
    }


def _report_sha(spec: PrepareSpec) -> str | None:
    try:
        return json.loads(Path(f"{spec.output}.report.json").read_text())["manifest_sha"]
    except FileNotFoundError:
        return None


def share_of(moment: int, moments: int, seed: int, attempt: int, kinds: tuple[str, ...] = VICTIMS) -> tuple[str, float]:
    """Returns the victim of a moment, and the share of its lifetime at the kill."""
    victim, number = kinds[moment % len(kinds)], moment // len(kinds)
    parts = len(range(moment % len(kinds), moments, len(kinds)))
    return victim, (number + float(np.random.default_rng([seed, moment, attempt]).random())) / parts


def measure(moments: int, seed: int, first: int, count: int, rows: int, size: int, base: str) -> dict[str, Any]:
    """Measures up to `count` of the `moments`, from `first` on, over a table of `rows` rows."""
    adopt_orphans()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends all processes then too
    done = []
    # A short name: a socket address of Ray has at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="kills-") as name, ExitStack() as stack:
        stack.callback(end_family)
        folder = Path(name)
        table = write_corpus(folder / "corpus", rows, size)
        spec = PrepareSpec(SourceSpec(table), "", base, size=size, clips_per_shard=4, workers=2)
        calm = run_calmly(replace(spec, output=str(folder / "calm")), folder)
        print(f"calm: {calm.seconds:.1f} s, {calm.spans}", file=sys.stderr)
        for moment in range(first, min(first + count, moments)):
            result = None
            for attempt in range(3):
                victim, share = share_of(moment, moments, seed, attempt)
                output = folder / f"{moment}-{attempt}"
                if result := kill_and_repeat(replace(spec, output=str(output)), calm, victim, share, folder):
                    break
                # The run ended before, as the machine became faster: measure the undisturbed run again.
                calm = run_calmly(replace(spec, output=f"{output}-calm"), folder)
            done.append({"moment": moment} | (result or {"victim": victim, "identical": False, "missed": True}))
            print(json.dumps(done[-1]), file=sys.stderr, flush=True)
    return {
        "calm_seconds": round(calm.seconds, 1),
        "spans": {victim: [round(t, 1) for t in span] for victim, span in calm.spans.items()},
        "manifest_sha": calm.manifest_sha,
        "moments": done,
        "identical": f"{sum(one['identical'] for one in done)} of {len(done)}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the first moment of this call")
    parser.add_argument("--count", type=int, default=1000, help="the number of moments of this call")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--base", default=BASE)
    print(json.dumps(measure(**vars(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
