"""Runs prepare as a separate command that can be killed: `python -m tests.chaos.driver SPEC.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tasks.encode.job import prepare
from tasks.encode.spec import PrepareSpec
from tasks.json_records import parse_record
from tasks.records import UserError, to_json


def main(spec: str) -> int:
    """Prints the report as JSON and returns 0; for an error the user can fix, prints one sentence and returns 2."""
    try:
        report = prepare(parse_record(PrepareSpec, Path(spec).read_bytes()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(to_json(report)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
