"""Calls a registered model as a consumer does: loads it by address, sends a photo and a prompt, decodes the video."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import mlflow
import pandas as pd

from infra.settings import client_address
from tasks.register.packaging import own_wheel_is_no_mismatch
from tasks.video.decode import read_clip
from trip_model.images import load_image


def call_as_consumer(model_uri: str, photo: bytes, prompt: str, steps: int) -> str:
    """Loads a model by its address, sends a photo and a prompt, and decodes the returned mp4.

    The address is looked up at `mlflow.set_tracking_uri`, as for any consumer. Returns a sentence that describes the
    video. Raises ClipError or ValueError when it is not a playable video.
    """
    with own_wheel_is_no_mismatch():
        model = mlflow.pyfunc.load_model(model_uri)
    rows = pd.DataFrame({"image": [photo], "prompt": [prompt]})
    row = model.predict(rows, params={"seed": 0, "steps": steps}).iloc[0]
    clip = read_clip(row["video"], int(row["num_frames"]), float(row["fps"]), int(row["height"]))
    difference = abs(clip.pixels[0].astype(int) - load_image(photo, int(row["height"])).astype(int)).mean()
    return (
        f"answered with {clip.pixels.shape[0]} frames of {row['width']}x{row['height']} as {row['format']},"
        f" frame 1 differs from the photo by {difference:.1f} of 255"
    )


@contextmanager
def addresses(uri: str) -> Iterator[None]:
    """Sets MLflow's module-wide addresses to one store during a `with` block.

    `load_model` reads them, and so does the SQL registry for logged models, whichever client calls it. Afterwards
    MLflow reads the environment again, where its setters have written an earlier address.
    """
    variables = {name: os.environ.get(name) for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")}
    mlflow.set_tracking_uri(client_address(uri))
    mlflow.set_registry_uri(client_address(uri))
    try:
        yield
    finally:
        mlflow.set_tracking_uri(cast(str, None))
        mlflow.set_registry_uri(cast(str, None))
        for name, value in variables.items():  # MLflow sets them, and a later flow would read them as the user's
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
