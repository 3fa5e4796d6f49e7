"""The logged model (models from code, nothing pickled): photo bytes and a sentence in, a video out.

MLflow copies this file into the model and runs it at loading; `trip_model` is installed from the model's own wheel.
"""

from __future__ import annotations

import base64
import binascii
import math
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext

MAX_IMAGE_BYTES = 32 * 2**20
MAX_PROMPT_CHARACTERS = 2000
MAX_ROWS = 16
BOUNDS: dict[str, tuple[float, float]] = {
    "num_frames": (2, 64),
    "seed": (0, 2**63 - 1),
    "steps": (1, 1000),
    "guidance": (0.0, 50.0),
    "fps": (1.0, 60.0),
}
FORMATS = ("mp4", "gif")


class InputError(MlflowException, ValueError):
    """A request that cannot be used. A ValueError for callers; MLflow's server answers it with 400 and the sentence."""

    def __init__(self, message: str) -> None:
        super().__init__(message, error_code=INVALID_PARAMETER_VALUE)


def image_bytes(value: Any, row: int) -> bytes:
    """The bytes of one image cell: bytes as they are, or a base64 text or data URL decoded.

    Raises:
        InputError: another type, broken base64, nothing, or more than `MAX_IMAGE_BYTES`.
    """
    if isinstance(value, str):
        head, comma, body = value.partition(",")
        if value.startswith("data:") and not (comma and head.endswith(";base64")):
            raise InputError(f"image of row {row}: data URL {value[:30]!r} without ';base64,'; send base64 data")
        try:
            text = body if value.startswith("data:") else value
            value = base64.b64decode("".join(text.split()), validate=True)  # MLflow's examples hold line breaks
        except (binascii.Error, ValueError) as error:
            raise InputError(f"image of row {row} is text but not base64; send bytes or a data URL") from error
    if not isinstance(value, bytes | bytearray | memoryview):
        raise InputError(f"image of row {row} is {type(value).__name__}; send image bytes or a base64 data URL")
    data = bytes(value)
    if not data:
        raise InputError(f"image of row {row} is empty; send the bytes of a JPEG, PNG or WebP photo")
    if len(data) > MAX_IMAGE_BYTES:
        raise InputError(f"image of row {row} has {len(data)} bytes, at most {MAX_IMAGE_BYTES} are taken")
    return data


def prompt_text(value: Any, row: int) -> str:
    """One prompt. Raises InputError when it is not text, empty, or longer than `MAX_PROMPT_CHARACTERS`."""
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"prompt of row {row} is {value!r:.40}; send a sentence that says what should move")
    if len(value) > MAX_PROMPT_CHARACTERS:
        raise InputError(f"prompt of row {row} has {len(value)} characters, at most {MAX_PROMPT_CHARACTERS} are taken")
    return value.strip()


def checked_params(params: dict[str, Any] | None) -> dict[str, Any]:
    """The parameters that were given, as numbers within `BOUNDS`.

    Raises:
        InputError: an unknown name, or a value out of bounds.
    """
    checked: dict[str, Any] = {}
    for name, value in (params or {}).items():
        if value is None:
            continue
        if name == "format":
            if value not in FORMATS:
                raise InputError(f"format is {value!r}; send one of {', '.join(FORMATS)}")
            checked[name] = str(value)
            continue
        if name not in BOUNDS:
            raise InputError(f"parameter {name!r} is unknown; there are {', '.join([*BOUNDS, 'format'])}")
        low, high = BOUNDS[name]
        try:
            number = float(value) if isinstance(low, float) else int(value)
        except (TypeError, ValueError) as error:
            raise InputError(f"{name} is {value!r}; send a number from {low} to {high}") from error
        if not math.isfinite(number) or not low <= number <= high:
            raise InputError(f"{name} is {value!r}; send a number from {low} to {high}")
        checked[name] = number
    return checked


class TripModel(PythonModel):
    """Image-to-video with TRIP: one video for each row of `image` and `prompt`."""

    def load_context(self, context: PythonModelContext) -> None:
        """Builds the pipeline from the model folder that was logged; on the accelerator when there is one."""
        import torch

        from trip_model.pipeline import TripPipeline

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.pipe = TripPipeline.from_folder(context.artifacts["model"], device=device)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """One row out per row in: video (bytes), format, num_frames, fps, width and height in pixels, seed.

        `image` is the bytes of a photo, or its base64 as text or data URL; it becomes frame 1. Row r draws its noise
        from `seed + r`, so every row can be made again alone with the seed it came with.

        Raises:
            InputError: an image, prompt or parameter that cannot be used; the sentence names it and the bounds.
        """
        from trip_model.images import video_bytes

        given = checked_params(params)
        fps, container = given.pop("fps", 4.0), given.pop("format", "mp4")
        seed = given.pop("seed", 0)
        if not 1 <= len(model_input) <= MAX_ROWS:
            raise InputError(f"{len(model_input)} rows were sent; send 1 to {MAX_ROWS} in one call")
        missing = [column for column in ("image", "prompt") if column not in model_input.columns]
        if missing:
            raise InputError(f"column {missing[0]!r} is missing; send columns image and prompt")
        images = [image_bytes(value, row) for row, value in enumerate(model_input["image"])]
        prompts = [prompt_text(value, row) for row, value in enumerate(model_input["prompt"])]
        rows = []
        for row, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            try:
                pixels = self.pipe(image, prompt, seed=seed + row, **given)
            except ValueError as error:
                raise InputError(f"row {row}: {error}") from error
            rows.append(
                {
                    "video": video_bytes(pixels, fps, container),
                    "format": container,
                    "num_frames": int(pixels.shape[0]),
                    "fps": float(fps),
                    "width": int(pixels.shape[2]),
                    "height": int(pixels.shape[1]),
                    "seed": int(seed + row),
                }
            )
        return pd.DataFrame(rows)


mlflow.models.set_model(TripModel())
