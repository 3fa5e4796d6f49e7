"""Records the hashes of model folders by a command and all processes that it starts, Ray's workers among them."""

from __future__ import annotations

import os
from pathlib import Path


def recording(log: Path) -> dict[str, str]:
    """Variables for the environment of a process: it appends the path of each file that it hashes to `log`."""
    log.touch()
    path = [str(Path(__file__).with_name("hash_log")), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"TRIP_HASH_LOG": str(log), "PYTHONPATH": os.pathsep.join(path)}


def model_hashes(log: Path, base: Path) -> list[str]:
    """The 3D-UNet's weight files in a log, one for each hash of a model folder; the base's own are left out."""
    unets = [line for line in log.read_text().splitlines() if "/unet/" in line and line.endswith(".safetensors")]
    return [line for line in unets if not Path(line).is_relative_to(base)]
