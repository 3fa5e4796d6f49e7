"""One training on Ray as a command of its own, to be killed: `python -m tests.chaos.train_driver JOB.json`."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.cluster import ray_session
from tasks.json_records import parse_record
from tasks.records import UserError, to_json
from tasks.train.job import train
from tasks.train.spec import TrackingSpec, TrainSpec


@dataclass(frozen=True)
class TrainJob:
    """A training and where it is tracked."""

    spec: TrainSpec
    tracking: TrackingSpec


def main(words: str) -> int:
    """Prints ticks and report as JSON lines and returns 0; like the command line, a sentence and 2 for bad input."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    job = parse_record(TrainJob, Path(words).read_bytes())

    def tick(values: dict[str, Any]) -> None:
        print(json.dumps({"step": values["step"], "loss": values["loss"]}), flush=True)

    try:
        with ray_session(None, job.spec.workers * job.spec.cpus_per_worker):
            report = train(job.spec, tick, job.tracking)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(to_json(report)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
