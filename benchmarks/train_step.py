"""Measures a train step of the 3D-UNet, ours against diffusers' eager class at equal numerics.

    python -m benchmarks.train_step [--head-width 8] [--layers 1] [--repeats 7]  a mid-size network, on the CPU
    python -m benchmarks.train_step --base examples/demo_base/weights --side 8 --batch 8 --compile    the demo's network
    python -m benchmarks.train_step --device cuda --full-size --batch 8          text-to-video-ms-1.7b's size, bfloat16

Forward and backward, same weights, same input, dropout off in both; the two take turns, and each reports its median.
With `--compile` a third one takes turns: ours, each level compiled by itself. Prints one JSON.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import add_json, write_json
from benchmarks.mid_size import both_networks, mid_size
from trip_model.unet import UNetConfig, load_unet


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both networks' seconds a step, their ratio, and how far output and gradients are from each other."""
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    if arguments.base:
        config = load_unet(arguments.base).config
    elif arguments.full_size:
        config = UNetConfig()
    else:
        config = mid_size(arguments.head_width, arguments.layers)
    ours, theirs = both_networks(config)
    unets = {"ours": ours, "diffusers": theirs}
    for unet in unets.values():
        unet.to(device).train()
    ours.recompute_activations = arguments.recompute
    if arguments.compile:
        unets["compiled"] = compiled = copy.deepcopy(ours)
        for level in (*compiled.down_blocks, compiled.mid_block, *compiled.up_blocks):
            level.compile(dynamic=False)

    x = torch.randn(arguments.batch, 4, 17, arguments.side, arguments.side, device=device)
    t = torch.randint(1000, (arguments.batch,), device=device)
    text = torch.randn(arguments.batch, 77, config.cross_attention_dim, device=device)

    def step(name: str) -> tuple[float, torch.Tensor]:
        unet = unets[name]
        unet.zero_grad(set_to_none=True)
        start = _now(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            output = unet(x, t, text)
        output = output.sample if name == "diffusers" else output
        output.float().square().mean().backward()
        return _now(device) - start, output.detach().float()

    first = {name: step(name) for name in unets}  # also the warm-up
    outputs = {name: output for name, (_, output) in first.items()}
    gradients = zip(ours.parameters(), theirs.parameters(), strict=True)
    apart = max(_apart(a.grad, b.grad) for a, b in gradients if a.grad is not None and b.grad is not None)
    seconds: dict[str, list[float]] = {name: [] for name in unets}
    for _ in range(arguments.repeats):
        for name in unets:
            seconds[name].append(step(name)[0])
    median = {name: statistics.median(values) for name, values in seconds.items()}
    with FlopCounterMode(display=False) as counter:
        step("ours")
    flops = counter.get_total_flops()
    peak = _matmul_peak(device)
    return {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "parameters_m": round(sum(p.numel() for p in ours.parameters()) / 1e6, 2),
        "channels": config.block_out_channels,
        "layers": config.layers_per_block,
        "head_width": config.attention_head_dim,
        "input": list(x.shape),
        "recompute": arguments.recompute,
        "output_apart": _apart(outputs["ours"], outputs["diffusers"]),
        "gradients_apart": apart,
        "seconds": {name: [round(s, 4) for s in values] for name, values in seconds.items()},
        "median_seconds": {name: round(value, 4) for name, value in median.items()},
        "speedup": round(median["diffusers"] / median["ours"], 3),
        "compiled": {
            "speedup": round(median["ours"] / median["compiled"], 3),
            "first_step_seconds": round(first["compiled"][0], 1),
            "output_apart": _apart(outputs["compiled"], outputs["ours"]),
        }
        if arguments.compile
        else None,
        "samples_per_second": round(arguments.batch / median["ours"], 3),
        "tflop_a_step": round(flops / 1e12, 4),
        "matmul_peak_tflop_s": round(peak / 1e12, 3),
        "fraction_of_peak": round(flops / median["ours"] / peak, 3),
    }


def _apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12)).item()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _matmul_peak(device: torch.device) -> float:
    """The best of some large matrix products, FLOP/s: bfloat16 on a GPU, float32 on a CPU."""
    size, kind = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))

    def seconds(product: Callable[[], torch.Tensor]) -> float:
        start = _now(device)
        product()
        return _now(device) - start

    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(10))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full-size", action="store_true", help="1.41 B parameters instead of the mid-size network")
    parser.add_argument("--base", help="a base folder: the network that its unet/config.json describes")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--head-width", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--side", type=int, default=32, help="height and width of the latents")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="compare with ours compiled, too")
    parser.add_argument("--recompute", action="store_true", help="ours recomputes its activations")
    add_json(parser)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    write_json("train_step", main(chosen), chosen.json)
