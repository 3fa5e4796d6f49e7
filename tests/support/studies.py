"""Small preference studies and simulated raters, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tasks.study.build import StudySpec, build
from tasks.study.plan import Key, Plan, read_key
from trip_model.images import write_video

FRAMES, SIZE, FPS = 4, 64, 20


def write_clips(folder: Path, items: int, systems: tuple[str, ...] = ("ours", "other")) -> None:
    """Folders of drawn clips: `real` and each system's, the second and later ones with noise and less motion."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    for item in range(items):
        ground = np.stack([x * 3, y * 3, np.full_like(x, 20 * item % 255)], axis=-1)
        for number, system in enumerate(("real", *systems)):
            frames = []
            for frame in range(FRAMES):
                image = ground + (rng.normal(0, 12, ground.shape) if number > 1 else 0)
                left = 8 + frame * (8 if number < 2 else 2)
                image[20:36, left : left + 16] = (220, 40, 40)
                frames.append(np.clip(image, 0, 255).astype(np.uint8))
            write_video(folder / system / f"item{item:03d}.mp4", np.stack(frames), FPS)
    lines = "".join(f"item{item:03d},a red square moves right in scene {item}\n" for item in range(items))
    (folder / "prompts.csv").write_text("key,prompt\n" + lines)


def make_study(
    folder: Path, items: int, systems: tuple[str, ...] = ("ours", "other"), **values: Any
) -> tuple[Plan, Key]:
    """Builds a study of drawn clips in `folder`/study and returns its plan and key."""
    write_clips(folder, items, systems)
    fixed = {"frames": FRAMES, "fps": FPS, "size": SIZE, "prompts": str(folder / "prompts.csv")}
    spec = StudySpec(
        {name: str(folder / name) for name in systems},
        str(folder / "study"),
        real=str(folder / "real"),
        **(fixed | values),
    )
    plan = build(spec, lambda _: None)
    return plan, read_key(str(folder / "study-key.json"), plan)
