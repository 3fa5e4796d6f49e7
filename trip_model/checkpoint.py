"""Saves and loads a TRIP model as one self-contained folder of safetensors and JSON, in the base's own layout.

trip.json  model_index.json  pipeline.py  unet/  fusion/  vae/  text_encoder/  tokenizer/  scheduler/
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
from safetensors.torch import load_file

from trip_model.config import BaseSchedule, FusionConfig, ScheduleConfig, TripConfig, values_before
from trip_model.folders import RECORD, BaseFolderError
from trip_model.model import Trip
from trip_model.unet import WEIGHTS, load_unet, save_unet

FORMAT = 1
INDEX = "model_index.json"
CODE = "pipeline.py"  # what diffusers loads by `custom_pipeline`
_CODE_TEXT = '''"""The pipeline class of this folder, which diffusers loads by `custom_pipeline`."""

from trip_model.pipeline import TripPipeline

__all__ = ["TripPipeline"]
'''


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
        model.fusion.save_pretrained(folder / "fusion")
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(Path(base) / part, folder / part, dirs_exist_ok=True)
    model.schedule.ddim().save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "TripPipeline",
        "_diffusers_version": diffusers.__version__,
        "fusion": [None, None] if model.fusion is None else ["trip_model.fusion", "TemporalNoiseFusion"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "trip_config": asdict(model.config),
        "unet": ["trip_model.unet", "UNet3D"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    write_record(folder, model.config, provenance)
    return folder


def write_record(folder: Path, config: TripConfig, provenance: dict[str, Any] | None) -> None:
    """Writes `pipeline.py` for diffusers, then `trip.json`, which marks completion."""
    (folder / CODE).write_text(_CODE_TEXT)
    record = {"format": FORMAT, "config": asdict(config), "provenance": provenance or {}}
    (folder / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def read_record(folder: str | Path) -> dict[str, Any]:
    """Returns the contents of a model folder's `trip.json`.

    Raises:
        BaseFolderError: not a TRIP model folder, or an unknown format.
    """
    try:
        record = json.loads((Path(folder) / RECORD).read_text())
    except OSError as error:
        raise BaseFolderError(f"{folder} is not a TRIP model folder: it has no trip.json") from error
    if record.get("format") != FORMAT:
        raise BaseFolderError(f"{folder}/trip.json has format {record.get('format')!r}, expected {FORMAT}")
    return record


def load_model(folder: str | Path) -> Trip:
    """Loads a folder that `save_model` wrote, in eval mode and float32.

    Raises:
        BaseFolderError: not a TRIP model folder, an unknown format, or weights that are missing or do not fit.
    """
    folder = Path(folder)
    record = read_record(folder)
    model = Trip(load_unet(folder), config_from_json(record["config"]))
    if model.fusion is not None:
        file = folder / "fusion" / WEIGHTS
        if not file.is_file():
            file = folder / "fusion" / "model.safetensors"  # its name in older folders
        try:
            model.fusion.load_state_dict(load_file(file))
        except (OSError, RuntimeError) as error:
            raise BaseFolderError(f"{file} does not fit the model: {str(error).splitlines()[0]}") from error
    return model.eval()
