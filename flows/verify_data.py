"""Flow: every byte of the data sets below a root is checked."""

from __future__ import annotations

import os

from prefect import flow

from flows.console import log
from infra import storage
from infra.output import outlive_reader
from infra.redaction import redact
from infra.settings import DEFAULT_ROOT
from tasks.records import UserError


@flow(name="verify", on_running=[outlive_reader])
def verify_data(root: str = DEFAULT_ROOT, data: str | None = None) -> dict[str, int]:
    """Check every byte of the newest version of each data set below a root; fails if there is a problem.

    Args:
        root: folder or address that everything is written below.
        data: address of one data set, instead of all of the root.

    Raises:
        UserError: a data set has problems; the log of the run has a line for each.
    """
    from tasks.curate.verify import problems
    from tasks.shards import MANIFEST, names_of

    counts: dict[str, int] = {}
    below = [name for name in names_of(storage.absolute(root)) if storage.exists(storage.join(name, MANIFEST))]
    for address in below if data is None else [data]:
        counts[redact(address)] = 0
        for problem in problems(address, log, min(8, os.cpu_count() or 1)):
            counts[redact(address)] += 1
            log(f"verify      {redact(problem)}")
    damaged = [address for address, count in counts.items() if count]
    log(f"verify      {len(counts)} data sets, {len(damaged)} with problems")
    if damaged:
        raise UserError(
            f"{len(damaged)} of {len(counts)} data sets have problems, first {damaged[0]}; its lines in the log of the"
            " run say which shards: remove these, and repeat prepare"
        )
    return counts
