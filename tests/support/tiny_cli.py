"""`python -m flows` with one recipe more, `tiny`: the demo's road in seconds. First argument: the folder of a base."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from flows import recipes
from flows.cli.app import main
from trip_model.config import FusionConfig


def tiny(base: str) -> recipes.Recipe:
    demo = recipes.demo()
    model = demo.train.model
    return replace(
        demo,
        name="tiny",
        prepare=replace(demo.prepare, base=base, size=32, clips_per_shard=4, workers=1),  # each one imports torch
        train=replace(
            demo.train,
            base=base,
            model=replace(
                model,
                size=32,
                fusion=FusionConfig(width=16, heads=2, prediction="shrinkage", residual="unit"),
                schedule=replace(model.schedule, sampling_steps=2),
            ),
            steps=int(os.environ.get("TINY_STEPS", "6")),
            global_batch=2,
            tick_every=2,
            checkpoint_every=2,
            held_out_fraction=0.4,
            cpus_per_worker=1,
        ),
        evaluate=replace(demo.evaluate, clips=4, batch=2, bootstrap=50, examples=2, steps=None, workers=0),
        demo_clips=12,
    )


if __name__ == "__main__":
    recipes.RECIPES["tiny"] = lambda: tiny(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
