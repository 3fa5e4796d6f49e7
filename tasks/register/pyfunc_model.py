"""The logged model (models from code, nothing pickled): takes photos and prompts, returns videos.

MLflow copies this file into the model and runs it when it loads the model; the model's wheel installs `trip_model`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from trip_model.request_limits import BOUNDS, VIDEO_FORMATS, RequestError, read_numbers, read_photo, read_prompt

MAX_ROWS = 16


class InputError(MlflowException, ValueError):
    """A request that is rejected: a ValueError for callers, status 400 with the message from MLflow's server."""

    def __init__(self, message: str) -> None:
        super().__init__(message, error_code=INVALID_PARAMETER_VALUE)


def read_parameters(params: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the numbers and the format that were given, checked. Raises InputError."""
    params = params or {}
    unknown = next((name for name in params if name not in (*BOUNDS, "format")), None)
    if unknown is not None:
        raise InputError(f"parameter {unknown[:40]!r} is unknown; use {', '.join(BOUNDS)} or format")
    try:
        numbers = read_numbers(params)
    except RequestError as error:
        raise InputError(str(error)) from error
    video_format = params.get("format")
    if video_format is None:
        return numbers
    if video_format not in VIDEO_FORMATS:
        raise InputError(f"format is {video_format!r:.40}; use {' or '.join(VIDEO_FORMATS)}")
    return {**numbers, "format": str(video_format)}


def read_row(image: Any, prompt: Any, row: int) -> tuple[bytes, str]:
    """Returns photo bytes and prompt of one row, checked. Raises InputError, which names the row."""
    try:
        return read_photo(image), read_prompt(prompt)
    except RequestError as error:
        raise InputError(f"row {row}: {error}") from error


class TripModel(PythonModel):
    """Image-to-video with TRIP: makes one video for each row of `image` and `prompt`."""

    def load_context(self, context: PythonModelContext) -> None:
        """Loads the pipeline from the logged model folder, on the GPU when there is one."""
        import torch

        from trip_model.pipeline import TripPipeline

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.pipe = TripPipeline.from_pretrained(context.artifacts["model"]).to(device)

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride], MLflow allows a narrower input
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Returns one row per input row: video (bytes), format, num_frames, fps, width and height in pixels, seed.

        `image` contains the bytes of a photo, or its base64 as text or data URL; the photo becomes frame 1. Row r uses
        the seed `seed + r`, so a row alone with its returned seed gives the same video.

        Raises:
            InputError: an image, prompt or parameter that cannot be used; the message names it and its bounds.
        """
        from trip_model.images import video_bytes

        given = read_parameters(params)
        fps, video_format = given.pop("fps", self.pipe.fps), given.pop("format", VIDEO_FORMATS[0])
        first_seed = given.pop("seed", 0)
        if not 1 <= len(model_input) <= MAX_ROWS:
            raise InputError(f"{len(model_input)} rows were sent; send 1 to {MAX_ROWS} in one call")
        missing = [column for column in ("image", "prompt") if column not in model_input.columns]
        if missing:
            raise InputError(f"column {missing[0]!r} is missing; send columns image and prompt")
        cells = zip(model_input["image"], model_input["prompt"], strict=True)
        inputs = [read_row(image, prompt, row) for row, (image, prompt) in enumerate(cells)]
        rows = []
        for row, (photo, prompt) in enumerate(inputs):
            try:
                pixels = self.pipe.generate([photo], [prompt], [first_seed + row], **given)[0]
            except ValueError as error:
                raise InputError(f"row {row}: {error}") from error
            rows.append(
                {
                    "video": video_bytes(pixels, fps, video_format),
                    "format": video_format,
                    "num_frames": int(pixels.shape[0]),
                    "fps": float(fps),
                    "width": int(pixels.shape[2]),
                    "height": int(pixels.shape[1]),
                    "seed": int(first_seed + row),
                }
            )
        return pd.DataFrame(rows)


mlflow.models.set_model(TripModel())
