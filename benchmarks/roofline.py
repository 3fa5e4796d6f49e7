"""Where the time of the 3D-UNet goes on a CPU, kernel by kernel, against the measured peaks of matmul and memory.

    python -m benchmarks.roofline [--head-width 8] [--side 16] [--threads 1] [--repeats 5]

One network of the size of `benchmarks.train_step`, ours and diffusers' eager class with the same weights, in turns: a
forward pass on the two branches of guidance, and a training step. The floating-point operations and bytes of each
kernel are counted as it is dispatched; its bound is the larger of operations / peak and bytes / peak, where both peaks
are measured in the same process. The sum of the bounds is the least time of these kernels; what is no matmul,
convolution or attention is bounded by memory alone, and the exponentials of attention by nothing. Seconds are processor
time, so that other work on the machine disturbs them little. Prints one JSON or, with --table, markdown.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.machine import add_json, write_json
from benchmarks.mid_size import both_networks, mid_size


@dataclass
class Kernel:
    """All calls of one operator: processor seconds, floating-point operations, bytes read and written."""

    calls: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    bytes_moved: float = 0.0

    def bound(self, peaks: Mapping[str, float]) -> float:
        """The least seconds that both peaks allow."""
        return max(self.flops / peaks["flops_per_second"], self.bytes_moved / peaks["bytes_per_second"])


class Kernels(TorchDispatchMode):
    """Measures every operator that is dispatched inside the block; views move nothing and are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: dict[str, Kernel] = defaultdict(Kernel)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.process_time()
        out = func(*args, **(kwargs or {}))
        seconds = time.process_time() - start
        if func.is_view:
            return out
        kernel = self.by_name[func.overloadpacket.__name__]
        kernel.calls += 1
        kernel.seconds += seconds
        kernel.bytes_moved += sum(x.nbytes for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            kernel.flops += count(*args, **(kwargs or {}), out_val=out)
        return out


def measured_peaks() -> dict[str, float]:
    """The matmul rate of a large float32 product and the rate of a copy that fits no cache."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    source = torch.randn(32 * 1024 * 1024)
    target = torch.empty_like(source)
    product = _best(lambda: torch.mm(a, b), 10)
    copy = _best(lambda: target.copy_(source), 10)
    threads = torch.get_num_threads()  # processor time adds the threads up
    return {
        "flops_per_second": 2 * 1024**3 / product,
        "bytes_per_second": 2 * source.nbytes / copy,
        "threads": threads,
    }


def _best(function: Callable[[], Any], repeats: int) -> float:
    function()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return min(seconds)


def passes(unet: nn.Module, side: int) -> dict[str, Callable[[], Any]]:
    """A forward pass on both branches of guidance, and forward and backward on one sample."""
    x, t, text = torch.randn(2, 4, 17, side, side), torch.tensor([500, 500]), torch.randn(2, 77, 256)

    def output(count: int) -> torch.Tensor:
        out = unet(x[:count], t[:count], text[:count])
        return out if isinstance(out, torch.Tensor) else out.sample

    def forward() -> None:
        with torch.no_grad():
            output(2)

    def step() -> None:
        unet.zero_grad(set_to_none=True)
        output(1).square().mean().backward()

    return {"forward with guidance": forward, "training step": step}


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both networks' seconds of each pass, and the kernels of each with their bounds."""
    torch.set_num_threads(arguments.threads)
    peaks = measured_peaks()
    torch.manual_seed(0)
    networks = dict(zip(("ours", "diffusers"), both_networks(mid_size(arguments.head_width)), strict=True))
    all_passes = {name: passes(unet, arguments.side) for name, unet in networks.items()}
    result: dict[str, Any] = {"peaks": peaks, "torch": torch.__version__, "head_width": arguments.head_width}
    for what in next(iter(all_passes.values())):
        for name in all_passes:
            all_passes[name][what]()  # the warm-up
        seconds: dict[str, list[float]] = {name: [] for name in all_passes}
        for _ in range(arguments.repeats):
            for name, functions in all_passes.items():
                start = time.process_time()
                functions[what]()
                seconds[name].append(time.process_time() - start)
        for name, functions in all_passes.items():
            with Kernels() as kernels:
                functions[what]()
            table = sorted(kernels.by_name.items(), key=lambda item: -item[1].seconds)
            result[f"{what}, {name}"] = {
                "seconds": min(seconds[name]),
                "seconds_of_kernels": sum(kernel.seconds for _, kernel in table),
                "bound": sum(kernel.bound(peaks) for _, kernel in table),
                "bound_of_operations": sum(kernel.flops for _, kernel in table) / peaks["flops_per_second"],
                "kernels": {
                    kernel_name: {
                        "calls": kernel.calls,
                        "seconds": kernel.seconds,
                        "share_of_matmul_peak": kernel.flops / kernel.seconds / peaks["flops_per_second"],
                        "share_of_memory_peak": kernel.bytes_moved / kernel.seconds / peaks["bytes_per_second"],
                        "bound": kernel.bound(peaks),
                    }
                    for kernel_name, kernel in table
                    if kernel.seconds > 0
                },
            }
    return result


def table(result: Mapping[str, Any], kernels: int = 10) -> str:
    """The markdown of a result: for each pass and network its largest kernels."""
    peaks = result["peaks"]
    lines = [
        f"Peaks: {peaks['flops_per_second'] / 1e9:.0f} GFLOP/s in a float32 product,"
        f" {peaks['bytes_per_second'] / 1e9:.1f} GB/s in a copy; {peaks['threads']} thread(s)."
    ]
    for what, measured in result.items():
        if not isinstance(measured, dict) or "kernels" not in measured:
            continue
        lines += [
            f"\n{what}: {measured['seconds']:.3f} s, bound {measured['bound']:.3f} s, of the operations alone"
            f" {measured['bound_of_operations']:.3f} s\n",
            "| kernel | calls | ms | share of time | of matmul peak | of memory peak | bound, ms |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, kernel in list(measured["kernels"].items())[:kernels]:
            lines.append(
                f"| {name} | {kernel['calls']} | {1e3 * kernel['seconds']:.0f}"
                f" | {kernel['seconds'] / measured['seconds_of_kernels']:.0%} | {kernel['share_of_matmul_peak']:.0%}"
                f" | {kernel['share_of_memory_peak']:.0%} | {1e3 * kernel['bound']:.0f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-width", type=int, default=8)
    parser.add_argument("--side", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--table", action="store_true", help="print markdown instead of JSON")
    add_json(parser)
    given = parser.parse_args()
    measured = main(given)
    if given.table:
        print(table(measured))
    else:
        write_json("roofline", measured, given.json)
