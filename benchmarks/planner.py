"""Holds the planner's steps against real ones: seconds of a training step by clips at once and recomputed activations.

    python -m benchmarks.planner [--base examples/demo_base/weights] [--batches 1 2 4 8] [--threads 1] [--repeats 5]

Predictions use this machine's measured rates of matrix products and of copies, as `flows plan --options --gpu here`
does. Networks: that of the base at the demo's size, and one of middle size at 16 x 16 latents (on a GPU also the full
size). Real steps take turns over all rows of a network, and a row has the least of them. The machine must be idle.
Prints one JSON; `ratio` is measured / predicted, and `order` the share of all pairs of rows of a network whose order
the prediction has right.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu import TINY, Sizes, Training
from benchmarks.machine import add_json, write_json
from benchmarks.mid_size import mid_size
from flows.planning.base import PUBLISHED, BaseConfig, read_base
from flows.planning.counting import count_model
from flows.planning.measuring import measured_device
from flows.planning.options import compute_seconds
from flows.recipes import demo
from tasks.train.spec import TrainSpec
from trip_model.config import FusionConfig, TripConfig
from trip_model.unet import UNetConfig

MIDDLE = TripConfig(size=128, fusion=FusionConfig(width=64, heads=4))


def networks(base: str, gpu: bool) -> dict[str, tuple[BaseConfig, TripConfig]]:
    """Sizes of the networks to measure, by name."""
    middle = replace(PUBLISHED, unet=json.loads(mid_size().to_json()), text=PUBLISHED.text | {"hidden_size": 256})
    found = {"the base": (read_base(base), demo().train.model), "middle size": (middle, MIDDLE)}
    return found | ({"full size": (PUBLISHED, TripConfig())} if gpu else {})


def compare(base: BaseConfig, model: TripConfig, batches: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """A row for each number of clips at once, with activations kept and recomputed."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    spec = TrainSpec("", "", "", model=model, precision="bfloat16" if kind == "cuda" else "float32", average_decay=0.99)
    device = measured_device(1, torch.get_num_threads())
    counts = count_model(base, spec, gpu=kind == "cuda")
    unet = UNetConfig.from_json(base.unet)
    sizes: Sizes = replace(TINY, unet=unet, model=model, text_length=base.text_shape()[0])
    training = Training(sizes, spec, kind)
    cases = list(itertools.product((False, True), batches))
    least: dict[tuple[bool, int], float] = dict.fromkeys(cases, float("inf"))
    for turn in range(repeats + 1):
        for recompute, clips in cases:
            seconds = _step_seconds(training, clips, recompute, kind)
            if turn:  # the first warms up
                least[recompute, clips] = min(least[recompute, clips], seconds)
    rows = []
    for (recompute, clips), seconds in least.items():
        step = replace(spec, global_batch=clips, recompute_activations=recompute)
        predicted = compute_seconds(step, counts, device)
        rows.append(
            {
                "clips": clips,
                "recompute": recompute,
                "measured": round(seconds, 4),
                "predicted": round(predicted, 4),
                "ratio": round(seconds / predicted, 3),
            }
        )
    return rows


def _step_seconds(training: Training, clips: int, recompute: bool, kind: str) -> float:
    begin = time.perf_counter()
    training.step(clips, recompute)
    if kind == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def right_order(rows: Sequence[dict[str, Any]]) -> float:
    """The share of the pairs of rows whose order by seconds for a clip is predicted right."""
    pairs = list(itertools.combinations(rows, 2))

    def faster(name: str, one: dict[str, Any], other: dict[str, Any]) -> bool:
        return one[name] / one["clips"] < other[name] / other["clips"]

    return sum(faster("measured", *pair) == faster("predicted", *pair) for pair in pairs) / len(pairs)


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Rows and order of every network."""
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {}
    for name, (base, model) in networks(arguments.base, torch.cuda.is_available()).items():
        rows = compare(base, model, arguments.batches, arguments.repeats)
        result[name] = {"rows": rows, "order": round(right_order(rows), 3)}
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=demo().train.base)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    add_json(parser)
    chosen = parser.parse_args()
    write_json("planner", main(chosen), chosen.json)
