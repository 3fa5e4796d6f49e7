"""What the trainings of the demo's base share: numbers, drawn clips, rates, and how files are written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tasks.ingest.drawing import draw_frame, draw_scene

SIZE, NUM_FRAMES, FPS = 64, 16, 4.0
TEXT_LENGTH, TEXT_WIDTH = 32, 64
VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"


def one_cycle(step: int, steps: int, peak: float) -> float:
    """Learning rate: linear warm-up over 3 % of the steps, then a cosine to 2 % of the peak."""
    warm = max(1, int(0.03 * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def clip_pixels(seed: int) -> tuple[np.ndarray, str]:
    """Draws the 16 frames at 4 fps of one scene and returns them with its caption."""
    scene = draw_scene(seed)
    return np.stack([draw_frame(scene, k / FPS, SIZE) for k in range(NUM_FRAMES)]), scene.caption


def training_folder(out: Path) -> Path:
    """Where encoded clips and the state of an unfinished training lie; not part of the base."""
    folder = out.parent / "training"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save_atomically(value: dict[str, Any], file: Path) -> None:
    torch.save(value, file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)


def forget_origin(folder: Path) -> None:
    """Removes the folder that a configuration was read from, which diffusers writes into it."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_score(out: Path, name: str, value: float) -> None:
    file = out / "scores.json"
    scores = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(scores | {name: value}, indent=2, sort_keys=True) + "\n")
