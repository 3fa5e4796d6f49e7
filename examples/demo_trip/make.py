"""Writes the small trained TRIP of this folder from a model folder that `train-trip` exported.

    python examples/demo_trip/make.py runs/pretrained/model

The README next to this file has the trainings before it. The weights are stored in fp16, and the provenance names the
base that the first of these trainings started from, examples/demo_base/weights, so that it can be continued with it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from trip_model.checkpoint import load_model, read_record, save_model
from trip_model.folders import folder_hash

HERE = Path(__file__).resolve().parent
BASE = HERE.parent / "demo_base" / "weights"
STEPS_BEFORE = "examples/demo_trip/README.md"


def make(model: Path, out: Path) -> None:
    """Writes `out` with the weights of `model` in fp16 and the frozen networks of the demo's base."""
    if folder_hash(model, "text_encoder") != folder_hash(BASE, "text_encoder"):
        raise SystemExit(
            f"{model} has another text encoder than {BASE}; copy it to that base, or train with --frozen-text"
        )
    trained = read_record(model)["provenance"]
    provenance = {"base_sha256": folder_hash(BASE), "steps": trained["steps"], "trainings": STEPS_BEFORE}
    save_model(out, load_model(model).half(), BASE, provenance)
    print(f"{out}: {sum(f.stat().st_size for f in out.rglob('*') if f.is_file()) / 1e6:.1f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--out", type=Path, default=HERE / "weights")
    given = parser.parse_args()
    make(given.model, given.out)
