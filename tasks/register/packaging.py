"""Packages an exported model folder as an MLflow model from code: wheel, pinned requirements, signature, no paths."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.models import Model, ModelSignature
from mlflow.types.schema import AnyType, ColSpec, ParamSchema, ParamSpec, Schema
from PIL import Image

import trip_model
from tasks.records import UserError, digest
from trip_model.folders import RECORD, files_hash
from trip_model.request_limits import BOUNDS, VIDEO_FORMATS

CODE_FILE = Path(__file__).with_name("pyfunc_model.py")
PACKAGE_FOLDER = Path(trip_model.__file__).parent
DESCRIPTIONS = (RECORD, "model_index.json")
REQUIREMENTS = ("torch", "diffusers", "transformers", "accelerate", "av", "numpy", "pandas", "pillow", "safetensors")
# Files for the wheel in addition to the package: settings, and the texts that they name.
BUILD_FILES = ("pyproject.toml", "README.md", "LICENSE", "NOTICE")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
WHEELS = "wheels"


def read_model_json(folder: Path, *parts: str) -> dict[str, Any]:
    """Returns the content of a JSON file of a model folder; {} without the file."""
    file = folder.joinpath(*parts)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Returns nested dicts as one dict with dotted names."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= flatten(item, f"{prefix}.{name}" if prefix else str(name))
    return flat


def package_code() -> dict[str, str]:
    """Returns the sha256 of each file of `trip_model` by name: the identity of the code that consumers run.

    Raises:
        UserError: `trip_model` was installed without its checkout, so that no wheel can be built from it.
    """
    root = PACKAGE_FOLDER.parent
    absent = [name for name in BUILD_FILES if not (root / name).is_file()]
    if absent:
        raise UserError(
            f"{root} contains trip_model without {', '.join(absent)}; a registered model contains the trip-i2v wheel,"
            " which is built from a checkout: register from one"
        )
    files = sorted([*PACKAGE_FOLDER.rglob("*.py"), PACKAGE_FOLDER / "py.typed"])
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def package_version() -> str:
    """Returns the version of the wheel that `build_wheel` builds: that of the package, and the hash of its code."""
    return f"{trip_model.__version__}+sha{digest(package_code())[:12]}"


@contextmanager
def own_wheel_is_no_mismatch() -> Iterator[None]:
    """Drops MLflow's warning about versions if it names nothing but the wheel of this very code.

    MLflow compares the version of a checkout with that of its wheel, which contains the hash of the code.
    """
    own = f"trip-i2v=={package_version()}"

    def names_another(record: logging.LogRecord) -> bool:
        return re.findall(r"^ - .*required: (.*)\)$", record.getMessage(), re.MULTILINE) != [own]

    logger = logging.getLogger("mlflow.utils.requirements_utils")
    logger.addFilter(names_another)
    try:
        yield
    finally:
        logger.removeFilter(names_another)


def build_wheel(folder: Path) -> str:
    """Builds the wheel of `trip_model` into `folder` and returns the requirement that names exactly this wheel.

    The hash of the code is part of the version (`0.1.0+sha…`), so pip accepts neither another installed build of 0.1.0
    nor a package of that name from an index, which cannot have local versions. The same sources give the same bytes.
    The wheel is built in a copy of the sources, because a build leaves folders behind.

    Raises:
        UserError: no checkout, or a build that failed.
    """
    code = package_code()
    with tempfile.TemporaryDirectory() as scratch:
        for name in (*code, *BUILD_FILES):
            copy = Path(scratch, name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((PACKAGE_FOLDER.parent / name).read_bytes())
            copy.chmod(0o644)  # a wheel records the modes, which a checkout's umask decides
        tag = package_version().removeprefix(trip_model.__version__)
        Path(scratch, "setup.cfg").write_text(f"[egg_info]\ntag_build = {tag}\n")
        build = subprocess.run(
            [sys.executable, "-c", BUILD, str(folder.resolve())],
            cwd=scratch,
            env=os.environ | {"SOURCE_DATE_EPOCH": "315532800"},  # 1980, the first date that a zip can hold
            umask=0o022,
            capture_output=True,
            text=True,
        )
    if build.returncode:
        reason = (build.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"the trip-i2v wheel cannot be built ({reason}); install setuptools 77 or newer")
    (wheel,) = folder.glob("*.whl")
    return f"trip-i2v=={wheel.name.split('-')[1]}"


def signature(defaults: dict[str, Any]) -> ModelSignature:
    """Returns the signature: photo and prompt, video, and the parameters with this model's defaults.

    `image` has type `any`, because MLflow would decode the text of a `binary` column itself and fail on a data URL;
    `request_limits.read_photo` takes bytes, base64 and data URLs, and rejects the rest.
    """
    inputs = Schema([ColSpec(AnyType(), "image"), ColSpec("string", "prompt")])
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


def bounds() -> dict[str, dict[str, Any]]:
    """Returns the bounds of each parameter as JSON Schema; MLflow's signature cannot contain them."""
    numbers = {name: {"minimum": bound.minimum, "maximum": bound.maximum} for name, bound in BOUNDS.items()}
    return {**numbers, "format": {"enum": list(VIDEO_FORMATS)}}


def requirements() -> list[str]:
    """Returns the installed versions of the requirements of `trip_model`, without local labels such as `+cpu`."""
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in REQUIREMENTS]


def drawn_photo(size: int) -> bytes:
    """Returns a drawn photo as PNG bytes: a red disc on a gradient, `size` pixels square."""
    y, x = np.mgrid[0:size, 0:size] / size
    pixels = np.stack([40 + 40 * x, 50 + 40 * y, 90 + 30 * x], axis=-1)
    pixels[(x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.15**2] = (226, 54, 48)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def save_package(
    model_folder: Path,
    hashes: dict[str, bytes],
    target: Path,
    photo: bytes,
    prompt: str,
    defaults: dict[str, Any],
    record: Model,
) -> str:
    """Writes the MLflow model to `target`, a new folder; returns the hash of its model folder.

    `hashes` has the hashes of the files of `model_folder`, `record` the ids of the logged model. Paths of this machine
    that MLflow and the training wrote (the code file, the artifact folder, the base) are replaced by names relative to
    the model. The returned hash is that of the files that a consumer downloads; only the rewritten ones are read again.
    """
    example = pd.DataFrame({"image": [photo], "prompt": [prompt]})
    with tempfile.TemporaryDirectory() as wheels, own_wheel_is_no_mismatch():
        mlflow.pyfunc.save_model(
            path=str(target),
            python_model=str(CODE_FILE),
            artifacts={"model": str(model_folder)},
            # pip resolves a file name in its working directory, but this option in the folder of requirements.txt.
            pip_requirements=[f"--find-links {WHEELS}", build_wheel(Path(wheels)), *requirements()],
            signature=signature(defaults),
            input_example=(example, {"seed": 0, "steps": int(defaults["steps"])}),
            mlflow_model=record,
        )
        shutil.copytree(wheels, target / WHEELS)
    saved = Model.load(str(target))
    flavor = saved.flavors["python_function"]
    flavor["model_code_path"] = CODE_FILE.name
    artifact = flavor["artifacts"]["model"]
    artifact["uri"] = artifact["path"]
    copy, rewritten = target / artifact["path"], {}
    for file in copy.rglob("*.json"):
        if file.name not in DESCRIPTIONS and not file.name.endswith("config.json"):
            continue  # the vocabulary and merges of a tokenizer contain slashes
        content = json.loads(file.read_text(encoding="utf-8"))
        neutral = without_local_paths(content)
        if neutral != content:
            text = (json.dumps(neutral, indent=2, sort_keys=True) + "\n").encode()
            file.write_bytes(text)
            rewritten[str(file.relative_to(copy))] = hashlib.sha256(text).digest()
    model_hash = files_hash(hashes | rewritten)
    saved.metadata = {"bounds": bounds(), "model_sha256": model_hash}
    saved.artifact_path = None
    saved.save(str(target / "MLmodel"))
    remaining = mentions(target, [str(model_folder), str(PACKAGE_FOLDER.parent), str(target.parent), sys.prefix])
    assert not remaining, f"{remaining} name folders of this machine"
    return model_hash


def without_local_paths(value: Any) -> Any:
    """Replaces every absolute path in JSON by its last part; diffusers writes one to each config it saves."""
    if isinstance(value, dict):
        return {name: without_local_paths(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_local_paths(item) for item in value]
    is_path = isinstance(value, str) and value.removeprefix("file://").startswith("/") and value.count("/") > 1
    return Path(value).name if is_path else value


def mentions(package: Path, paths: list[str]) -> list[str]:
    """Returns the names of the files of a package, except weights, that contain one of `paths`."""
    needles = [path.encode() for path in paths if len(path) > 1]
    files = [p for p in package.rglob("*") if p.is_file() and p.suffix != ".safetensors"]
    return sorted(str(p.relative_to(package)) for p in files if any(n in p.read_bytes() for n in needles))
