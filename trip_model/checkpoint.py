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
    """Returns the `TripConfig` of its JSON form; fields that older JSON does not have get their older values."""
    schedule: dict[str, Any] = dict(data["schedule"])
    if schedule.get("base") is not None:
        schedule["base"] = BaseSchedule(**schedule["base"])
    values: dict[str, Any] = {
        **data,
        "fusion": FusionConfig(**values_before(FusionConfig) | data["fusion"]),
        "schedule": ScheduleConfig(**schedule),
        "residual_std": tuple(data["residual_std"]),
    }
    return TripConfig(**values)


def save_model(folder: str | Path, model: Trip, base: str | Path, provenance: dict[str, Any] | None = None) -> Path:
    """Writes the model and the frozen parts of its base; `trip.json` is written last and marks completion."""
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
    record = {"format": FORMAT, "config": asdict(model.config), "provenance": provenance or {}}
    (folder / "trip.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    return folder


def load_model(folder: str | Path) -> Trip:
    """Loads a folder that `save_model` wrote, in eval mode and float32.

    Raises:
        BaseFolderError: not a TRIP model folder, an unknown format, or weights that are missing or do not fit.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / "trip.json").read_text())
    except OSError as error:
        raise BaseFolderError(f"{folder} is not a TRIP model folder: it has no trip.json") from error
    if record.get("format") != FORMAT:
        raise BaseFolderError(f"{folder}/trip.json has format {record.get('format')!r}, expected {FORMAT}")
    model = Trip(load_unet(folder), config_from_json(record["config"]))
    if model.fusion is not None:
        file = folder / "fusion" / "model.safetensors"
        try:
            model.fusion.load_state_dict(load_file(file))
        except (OSError, RuntimeError) as error:
            raise BaseFolderError(f"{file} does not fit the model: {str(error).splitlines()[0]}") from error
    return model.eval()
