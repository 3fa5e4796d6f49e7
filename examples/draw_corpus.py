"""Draws a corpus that is harder than the demo's, one factor at a time, as a table of links for any recipe.

    python examples/draw_corpus.py corpus/textured --clips 520 --ground-texture 0.1
    python -m flows reproduce --recipe demo --source corpus/textured/results_demo.csv --root runs/textured

Shapes and their motion are those of the demo's clips with the same number. The demo's base was trained on plain clips:
its results on others say how far it carries, not how hard they are.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tasks.ingest.demo import write_demo_corpus
from tasks.ingest.drawing import Style


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clips", type=int, default=520)
    parser.add_argument("--size", type=int, default=64, help="pixels")
    for setting in fields(Style):
        if isinstance(setting.default, float):
            parser.add_argument(f"--{setting.name.replace('_', '-')}", type=float, default=setting.default)
    parser.add_argument("--motion-in-caption", action=argparse.BooleanOptionalAction, default=True)
    given = parser.parse_args()
    style = Style(**{setting.name: getattr(given, setting.name) for setting in fields(Style)})
    print(write_demo_corpus(given.folder, given.clips, given.size, style=style))


if __name__ == "__main__":
    main()
