"""TRIP: temporal residual learning with image noise prior, for image-to-video diffusion (Zhang et al., CVPR 2024).

A public name loads its module at first use, so that `import trip_model` loads neither torch nor diffusers:

>>> from trip_model import TripPipeline
>>> pipe = TripPipeline.from_folder("runs/demo/model")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; Python reads `_MODULES`
    from trip_model.checkpoint import load_model, save_model
    from trip_model.config import FusionConfig, ObjectiveConfig, ScheduleConfig, TripConfig
    from trip_model.folders import BaseFolderError
    from trip_model.fusion import TemporalNoiseFusion
    from trip_model.images import load_image, video_bytes, write_video
    from trip_model.model import Trip
    from trip_model.noise_prior import image_noise_prior
    from trip_model.objective import training_loss
    from trip_model.pipeline import TripPipeline
    from trip_model.sampler import sample_latents
    from trip_model.schedule import NoiseSchedule
    from trip_model.unet import UNet3D

__version__ = "0.1.0"

__all__ = [
    "BaseFolderError",
    "FusionConfig",
    "NoiseSchedule",
    "ObjectiveConfig",
    "ScheduleConfig",
    "TemporalNoiseFusion",
    "Trip",
    "TripConfig",
    "TripPipeline",
    "UNet3D",
    "__version__",
    "image_noise_prior",
    "load_image",
    "load_model",
    "sample_latents",
    "save_model",
    "training_loss",
    "video_bytes",
    "write_video",
]

# The module that defines each public name.
_MODULES = {
    "BaseFolderError": "folders",
    "FusionConfig": "config",
    "NoiseSchedule": "schedule",
    "ObjectiveConfig": "config",
    "ScheduleConfig": "config",
    "TemporalNoiseFusion": "fusion",
    "Trip": "model",
    "TripConfig": "config",
    "TripPipeline": "pipeline",
    "UNet3D": "unet",
    "image_noise_prior": "noise_prior",
    "load_image": "images",
    "load_model": "checkpoint",
    "sample_latents": "sampler",
    "save_model": "checkpoint",
    "training_loss": "objective",
    "video_bytes": "images",
    "write_video": "images",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # the next access does not call this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
