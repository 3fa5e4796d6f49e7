"""Saves and loads a TRIP model as one self-contained folder of safetensors and JSON, in the base's own layout.

trip.json  model_index.json  unet/  fusion/  vae/  text_encoder/  tokenizer/  scheduler/
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from trip_model.config import BaseSchedule, FusionConfig, ScheduleConfig, TripConfig, values_before
from trip_model.folders import BaseFolderError
from trip_model.model import Trip
from trip_model.unet import load_unet, save_unet

FORMAT = 1


def config_from_json(data: dict[str, Any]) -> TripConfig:
    """A `TripConfig` from its JSON form, also from before some fields of its fusion existed."""
    schedule: dict[str, Any] = dict(data["schedule"])
    if schedule.get("base") is not None:
        schedule["base"] = BaseSchedule(**schedule["base"])
    return TripConfig(
        **data
        | {
            "fusion": FusionConfig(**values_before(FusionConfig) | data["fusion"]),
            "schedule": ScheduleConfig(**schedule),
            "residual_std": tuple(data["residual_std"]),
        }
    )


def save_model(folder: str | Path, model: Trip, base: str | Path, provenance: dict[str, Any] | None = None) -> Path:
    """Writes the model with the frozen parts of its base; `trip.json` comes last and marks the folder as whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_unet(model.unet, folder / "unet")
    if model.fusion is not None:
        (folder / "fusion").mkdir(exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in model.fusion.state_dict().items()}
        save_file(tensors, folder / "fusion" / "model.safetensors")
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(Path(base) / part, folder / part, dirs_exist_ok=True)
    model.schedule.ddim().save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "TripPipeline",
        "vae": ["diffusers", "AutoencoderKL"],
        "unet": ["diffusers", "UNet3DConditionModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    described = {"format": FORMAT, "config": asdict(model.config), "provenance": provenance or {}}
    (folder / "trip.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
    return folder


def load_model(folder: str | Path) -> Trip:
    """Loads what `save_model` wrote, in eval mode, float32.

    Raises:
        BaseFolderError: not a TRIP model folder, a newer format, or missing or foreign weights.
    """
    folder = Path(folder)
    try:
        described = json.loads((folder / "trip.json").read_text())
    except OSError as error:
        raise BaseFolderError(f"{folder} is not a TRIP model folder: it has no trip.json") from error
    if described.get("format") != FORMAT:
        raise BaseFolderError(f"{folder}/trip.json has format {described.get('format')!r}, this version reads {FORMAT}")
    model = Trip(load_unet(folder), config_from_json(described["config"]))
    if model.fusion is not None:
        file = folder / "fusion" / "model.safetensors"
        try:
            model.fusion.load_state_dict(load_file(file))
        except (OSError, RuntimeError) as error:
            raise BaseFolderError(f"{file} does not fit the model: {str(error).splitlines()[0]}") from error
    return model.eval()
