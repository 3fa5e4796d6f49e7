"""The command line: `python -m flows NAME --flags`."""

from __future__ import annotations

import sys

from flows.cli.app import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
