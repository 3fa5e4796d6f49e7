"""Packs an exported model folder as an MLflow model from code: signature, example, pinned requirements, no paths."""

from __future__ import annotations

import importlib.metadata
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.models import Model, ModelSignature
from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema
from PIL import Image

import trip_model

CODE_FILE = Path(__file__).with_name("pyfunc_model.py")
PACKAGE_FOLDER = Path(trip_model.__file__).parent
DESCRIPTIONS = ("trip.json", "model_index.json")
REQUIREMENTS = ("torch", "diffusers", "transformers", "av", "numpy", "pandas", "pillow", "safetensors")


def read_model_json(folder: Path, *parts: str) -> dict[str, Any]:
    """One JSON file of a model folder; {} when it is not there."""
    file = folder.joinpath(*parts)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict of dotted names."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= flatten(item, f"{prefix}.{name}" if prefix else str(name))
    return flat


def signature(defaults: dict[str, Any]) -> ModelSignature:
    """Photo bytes and prompt in, video out, and the parameters with this model's own defaults."""
    inputs = Schema([ColSpec("binary", "image"), ColSpec("string", "prompt")])
    outputs = Schema(
        [
            ColSpec("binary", "video"),
            ColSpec("string", "format"),
            ColSpec("long", "num_frames"),
            ColSpec("double", "fps"),
            ColSpec("long", "width"),
            ColSpec("long", "height"),
            ColSpec("long", "seed"),
        ]
    )
    params = ParamSchema(
        [
            ParamSpec("num_frames", "long", int(defaults["num_frames"])),
            ParamSpec("seed", "long", 0),
            ParamSpec("steps", "long", int(defaults["steps"])),
            ParamSpec("guidance", "double", float(defaults["guidance"])),
            ParamSpec("fps", "double", float(defaults["fps"])),
            ParamSpec("format", "string", "mp4"),
        ]
    )
    return ModelSignature(inputs=inputs, outputs=outputs, params=params)


def requirements() -> list[str]:
    """The installed versions of what `trip_model` needs, without local build marks such as `+cpu`."""
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in REQUIREMENTS]


def drawn_photo(size: int) -> bytes:
    """A stand-in photo as PNG bytes: a red disc on a soft gradient, `size` pixels square."""
    y, x = np.mgrid[0:size, 0:size] / size
    pixels = np.stack([40 + 40 * x, 50 + 40 * y, 90 + 30 * x], axis=-1)
    pixels[(x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.15**2] = (226, 54, 48)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def save_package(
    model_folder: Path, target: Path, photo: bytes, prompt: str, defaults: dict[str, Any], record: Model
) -> None:
    """Writes the MLflow model into `target`, a folder that does not exist yet.

    `record` carries the ids under which the model will be logged. What MLflow and the training noted about this
    machine (the paths of the code file, the artifact folder, the base) is replaced by names relative to the model.
    """
    example = pd.DataFrame({"image": [photo], "prompt": [prompt]})
    mlflow.pyfunc.save_model(
        path=str(target),
        python_model=str(CODE_FILE),
        artifacts={"model": str(model_folder)},
        code_paths=[str(PACKAGE_FOLDER)],
        pip_requirements=requirements(),
        signature=signature(defaults),
        input_example=(example, {"seed": 0, "steps": int(defaults["steps"])}),
        mlflow_model=record,
    )
    for cache in [path for path in target.rglob("__pycache__") if path.is_dir()]:
        shutil.rmtree(cache)
    for file in (target / "artifacts").rglob("*.json"):
        if file.name not in DESCRIPTIONS and not file.name.endswith("config.json"):
            continue  # a tokenizer's vocabulary and merges hold slashes of their own
        noted = json.loads(file.read_text(encoding="utf-8"))
        neutral = without_local_paths(noted)
        if neutral != noted:
            file.write_text(json.dumps(neutral, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    saved = Model.load(str(target))
    flavor = saved.flavors["python_function"]
    flavor["model_code_path"] = CODE_FILE.name
    for artifact in flavor["artifacts"].values():
        artifact["uri"] = artifact["path"]
    saved.artifact_path = None
    saved.save(str(target / "MLmodel"))
    left = mentions(target, [str(model_folder), str(PACKAGE_FOLDER.parent), str(target.parent), sys.prefix])
    assert not left, f"{left} name folders of this machine"


def without_local_paths(value: Any) -> Any:
    """JSON with every absolute path replaced by its last part; diffusers notes one in each config it saves."""
    if isinstance(value, dict):
        return {name: without_local_paths(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_local_paths(item) for item in value]
    is_path = isinstance(value, str) and value.removeprefix("file://").startswith("/") and value.count("/") > 1
    return Path(value).name if is_path else value


def mentions(package: Path, paths: list[str]) -> list[str]:
    """Names of the files of a package, weights aside, that mention one of `paths`."""
    needles = [path.encode() for path in paths if len(path) > 1]
    files = [p for p in package.rglob("*") if p.is_file() and p.suffix != ".safetensors"]
    return sorted(str(p.relative_to(package)) for p in files if any(n in p.read_bytes() for n in needles))
