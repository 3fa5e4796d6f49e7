"""What a device holds and how fast it can be, each number with where it comes from."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tasks.records import UserError


@dataclass(frozen=True)
class Device:
    """One GPU, or the cores of one CPU worker. FLOP/s are of dense matrices: bfloat16 on a GPU, float32 on a CPU."""

    name: str
    memory_bytes: float
    memory_source: str
    flops_per_second: float  # peak of the data sheet
    flops_source: str
    bytes_per_second: float  # of its memory
    measured_flops_per_second: float | None = None  # of a large matrix product
    utilisation: float = 0.35  # share of the peak that training reaches
    utilisation_source: str = "assumed, not measured; --mfu"

    @property
    def best_flops_per_second(self) -> float:
        return self.measured_flops_per_second or self.flops_per_second

    @property
    def encode_flops_per_second(self) -> float:
        """Peak of the VAE, which runs in float32: on a GPU its convolutions run in TF32, at half the bfloat16 rate."""
        return self.flops_per_second if self.name == "cpu" else self.flops_per_second / 2


SHEET = "published: data sheet"
GPUS = {
    "h200": Device(
        "h200", 139 * 2**30, "measured: 139 GiB to use", 989e12, SHEET, 4.3e12, measured_flops_per_second=790e12
    ),
    "h100": Device("h100", 80e9, SHEET, 989e12, SHEET, 3.35e12),
    "a100-80": Device("a100-80", 80e9, SHEET, 312e12, SHEET, 2.04e12),
    "a100-40": Device("a100-40", 40e9, SHEET, 312e12, SHEET, 1.56e12),
    "l40s": Device("l40s", 48e9, SHEET, 362e12, SHEET, 0.864e12),
    "4090": Device("4090", 24e9, SHEET, 165e12, SHEET, 1.01e12),
}
DEVICES = (*GPUS, "cpu")


def find_device(name: str, workers: int, cores: int) -> Device:
    """The device of that name; `cpu` is this machine's memory shared by `workers`, and `cores` of it for each.

    Raises:
        UserError: a name that is not in the table.
    """
    if name in GPUS:
        return GPUS[name]
    if name != "cpu":
        raise UserError(f"no device {name!r} in the table; known are {', '.join(DEVICES)}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(
        "cpu",
        memory / workers,
        f"measured: this machine's memory / {workers} workers",
        cores * 98.5e9,
        f"measured: float32 matrix product, AMD EPYC, 98.5 GFLOP/s a core x {cores}",
        20e9,
        measured_flops_per_second=cores * 98.5e9,
        utilisation=0.2,
        utilisation_source="measured: small 3D-UNets reach 0.21 to 0.42; --mfu",
    )
