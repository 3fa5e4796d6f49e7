"""The command `generate-baseline`: another method's clips of a protocol's items, by a pipeline of diffusers."""

from __future__ import annotations

from typing import Annotated

import cyclopts

from flows.console import log, results
from flows.layout import data_set, items_of
from flows.parameters import PROTOCOL
from flows.recipe_values import Values, parse_assignments
from flows.recipes import find_recipe
from infra import storage
from tasks.records import UserError


def generate_baseline(
    method: str,
    model: str,
    output: Annotated[str, cyclopts.Parameter(alias="-o")],
    held_out: str | None = None,
    dataset: str | None = None,
    protocol: Annotated[str | None, PROTOCOL] = None,
    recipe: str = "paper",
    values: Values = None,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    argument: list[str] | None = None,
    dtype: str | None = None,
    device: str = "auto",
    offload: bool = False,
    part: str = "1/1",
) -> None:
    """Make another method's clips of a protocol's items, for `evaluate-trip --method NAME=FOLDER`.

    The same command continues. With the recipe, the data set and the protocol of an evaluation the items are its own.

    Args:
        method: svd, i2vgen-xl, cogvideox-i2v, wan-i2v, ltx-i2v, modelscope or text-to-video-zero; the last two get the
            prompt only.
        model: folder of the pipeline, or its name on the hub.
        output: folder for the clips.
        held_out: address of a prepared data set, none of which was trained on.
        dataset: address of the prepared data set that was trained on; its held-out clips are the items.
        protocol: a preset, a preset's file .toml of your own, or the protocol.json of a report.
        recipe: the configuration of the evaluation.
        values: FIELD=VALUE, a number of your own instead of the recipe's; once for each.
        height: of the frames that the method makes, in pixels; by default the one that it was trained on.
        width: likewise.
        frames: frames that the method makes, of which the first ones are kept; by default the least that it can.
        argument: NAME=VALUE, a further argument of the pipeline's call, as num_inference_steps=25; once for each.
        dtype: of the weights: float32, float16 or bfloat16; by default float32 on the CPU, else the method's own.
        device: cpu, cuda, cuda:1 ..; auto takes a GPU where there is one.
        offload: keep the parts of the pipeline that are not in use in the memory of the CPU.
        part: K/N, only every N-th item from the K-th on; several parts may run at the same time.
    """
    import torch

    from tasks.evaluate.baseline_pipelines import BaselineSpec, make_baseline
    from tasks.evaluate.protocol.protocol import load_protocol
    from tasks.shards import ShardDataset

    if (held_out is None) == (dataset is None):
        raise UserError("give either --held-out or --dataset, the address of a prepared data set")
    k, _, n = part.partition("/")
    if not (k.isdecimal() and n.isdecimal()):
        raise UserError(f"--part {part}, expected K/N such as 1/4")
    data = data_set(held_out or dataset or "")
    items = items_of(find_recipe(recipe, None, values), data, protocol, foreign=held_out is not None)
    opened = ShardDataset(items.dataset)
    spec = BaselineSpec(
        method,
        model,
        storage.absolute(output),
        height,
        width,
        frames,
        parse_assignments(argument or [], "--argument", "num_inference_steps=25"),
        dtype,
        ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device,
        offload,
        (int(k), int(n)),
    )
    resolved = load_protocol(items.protocol, opened, items.held_out_fraction, items.clips, items.seed)
    made = make_baseline(spec, opened, resolved, log)
    results("generate-baseline", {"clips": f"{made} of {len(resolved.items)}", "method": f"NAME={spec.output}"})
