"""Memory and speed of devices, each number with its source."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

from tasks.records import UserError


@dataclass(frozen=True)
class Device:
    """One GPU, or the cores of one CPU worker. FLOP/s are of dense matrices, by precision."""

    name: str
    memory_bytes: float
    memory_source: str
    flops_per_second: dict[str, float]
    flops_source: str
    bytes_per_second: float  # of its memory
    link_bytes_per_second: float  # to the other devices of the machine, in one direction
    measured_flops_per_second: dict[str, float] = field(default_factory=dict)  # of a large matrix product
    utilisation: float = 0.35  # share of the peak that training reaches
    utilisation_source: str = "assumed, not measured; --mfu"

    def best_flops_per_second(self, precision: str) -> float:
        """Upper bound of the speed."""
        return self.measured_flops_per_second.get(precision, self.flops_per_second[precision])

    @property
    def encode_flops_per_second(self) -> float:
        """Peak of the VAE, which runs in float32: on a GPU its convolutions run in TF32, at half the bfloat16 rate."""
        return self.flops_per_second["float32"] if self.name == "cpu" else self.flops_per_second["bfloat16"] / 2


def _gpu(
    name: str, memory_bytes: float, bfloat16: float, float32: float, bytes_per_second: float, link: float
) -> Device:
    peaks = {"bfloat16": bfloat16, "float32": float32}
    return Device(name, memory_bytes, SHEET, peaks, SHEET, bytes_per_second, link)


SHEET = "published: data sheet"
_H200 = {"memory_source": "measured: 139 GiB to use", "measured_flops_per_second": {"bfloat16": 790e12}}
GPUS = {
    gpu.name: gpu
    for gpu in (
        replace(_gpu("h200", 139 * 2**30, 989e12, 67e12, 4.3e12, 450e9), **_H200),
        _gpu("h100", 80e9, 989e12, 67e12, 3.35e12, 450e9),
        _gpu("a100-80", 80e9, 312e12, 19.5e12, 2.04e12, 300e9),
        _gpu("a100-40", 40e9, 312e12, 19.5e12, 1.56e12, 300e9),
        _gpu("l40s", 48e9, 362e12, 91.6e12, 0.864e12, 32e9),
        _gpu("4090", 24e9, 165e12, 82.6e12, 1.01e12, 32e9),
    )
}
HERE = "here"  # the GPUs of this machine, without one its processors, with measured rates
DEVICES = (*GPUS, "cpu", HERE)
CPU_CORE = {"float32": 98.5e9, "bfloat16": 215e9}  # matrix product, AMD EPYC with AVX512-bf16


def find_device(name: str, workers: int, cores: int) -> Device:
    """The device of that name; `cpu` is this machine's memory shared by `workers`, and `cores` of it for each.

    `here` is measured, by `measuring.measured_device`.

    Raises:
        UserError: a name that is not in the table.
    """
    if name in GPUS:
        return GPUS[name]
    if name != "cpu":
        raise UserError(f"no device {name!r} in the table; known are {', '.join(DEVICES)}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    peaks = {precision: cores * rate for precision, rate in CPU_CORE.items()}
    return Device(
        "cpu",
        memory / workers,
        f"measured: this machine's memory / {workers} workers",
        peaks,
        f"measured: matrix product, AMD EPYC, one core x {cores}",
        20e9,
        1e9,
        measured_flops_per_second=peaks,
        utilisation=0.2,
        utilisation_source="measured: small 3D-UNets reach 0.21 to 0.42 in float32; --mfu",
    )
