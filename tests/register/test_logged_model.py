"""The logged model: its files, the check of its weights by the service, and a new environment from its requirements."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import jsonschema
import numpy as np
import pandas as pd
import pytest
from mlflow.models import Model
from mlflow.pyfunc.model import PythonModelContext

from infra.tracking import connect
from tasks.records import UserError
from tasks.register import packaging
from tasks.register.packaging import build_wheel, drawn_photo, mentions, requirements, without_local_paths
from tasks.register.pyfunc_model import InputError, TripModel
from tasks.register.registry import RegisterSpec, register
from tasks.serve.versions import AliasedModel, RegistryTrouble
from tasks.video.decode import read_clip
from tests.support.reports import write_record
from trip_model.folders import folder_hash
from trip_model.images import load_image

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = (f"python{sys.version_info.major}.{sys.version_info.minor}", "python3.12")
DEPENDENCIES = "import mlflow; print(mlflow.pyfunc.get_model_dependencies('models:/trip@champion'))"
CONSUMER = """
import sys, mlflow, pandas
model = mlflow.pyfunc.load_model("models:/trip@champion")
rows = pandas.DataFrame({"image": [open("photo.png", "rb").read()], "prompt": ["a red circle moving left"]})
answer = model.predict(rows, params={"seed": 7, "steps": 2, "fps": 4.0}).iloc[0]
open("out.mp4", "wb").write(answer["video"])
import trip_model, importlib.metadata
print(sys.prefix, trip_model.__file__, importlib.metadata.version("trip-i2v"), answer["num_frames"], sep="\\n")
"""


@pytest.fixture(scope="module")
def spec(tiny_model, tmp_path_factory) -> RegisterSpec:
    """The spec of version 1 of a new registry, which is its champion."""
    home = tmp_path_factory.mktemp("registry")
    write_record(home)
    spec = RegisterSpec(str(tiny_model), str(home), f"sqlite:///{home}/mlflow.db", check_steps=2)
    assert register(spec).promoted
    return spec


@pytest.fixture(scope="module")
def package(spec) -> Path:
    """The folder of the logged model in the artifact store."""
    (file,) = Path(spec.report).glob("artifacts/models/*/artifacts/MLmodel")
    return file.parent


def test_the_package_is_code_safetensors_and_json_without_a_path_of_this_machine(spec, package):
    assert mentions(package, [spec.report, spec.model, str(ROOT)]) == []
    assert not [p for p in package.rglob("*") if p.suffix in (".pkl", ".pickle", ".pt", ".bin", ".pyc")]
    assert not any("+" in line for line in requirements())
    wheels, wheel, *rest = (package / "requirements.txt").read_text().splitlines()[1:]
    assert (wheels, rest) == ("--find-links wheels", requirements())
    (file,) = (package / "wheels").iterdir()
    assert file.name == f"trip_i2v-{wheel.removeprefix('trip-i2v==')}-py3-none-any.whl" and "+sha" in wheel
    with zipfile.ZipFile(file) as archive:
        texts = {name: archive.read(name) for name in archive.namelist()}
    sources = [*(ROOT / "trip_model").rglob("*.py"), ROOT / "trip_model" / "py.typed"]
    code = {p.relative_to(ROOT).as_posix(): p.read_bytes() for p in sources}
    assert code.items() <= texts.items() and not any(str(ROOT).encode() in text for text in texts.values())


def test_the_same_sources_give_the_same_wheel_whatever_the_umask(tmp_path):
    built = []
    for name, umask in (("a", 0o022), ("b", 0o077)):
        (tmp_path / name).mkdir()
        before = os.umask(umask)
        try:
            requirement = build_wheel(tmp_path / name)
        finally:
            os.umask(before)
        (file,) = (tmp_path / name).iterdir()
        built.append((requirement, file.name, file.read_bytes()))
    assert built[0] == built[1]


def test_a_package_without_its_checkout_cannot_be_registered(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(packaging, "PACKAGE_FOLDER", tmp_path / "trip_model")
    with pytest.raises(UserError, match="is built from a checkout"):
        register(spec)


def test_the_service_loads_only_the_registered_weights(spec, package, tmp_path):
    aliased = AliasedModel("trip", "champion", spec.tracking_uri, tmp_path / "cache")
    client, version = connect(spec.tracking_uri), aliased.current()
    model_hash = client.get_model_version("trip", "1").tags["trip.model_sha256"]
    assert folder_hash(aliased.fetch(version)) == model_hash
    assert Model.load(str(package)).metadata["model_sha256"] == model_hash
    aliased.remove_all_except()
    weights = package / "artifacts" / "model" / "fusion" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        for _ in range(2):  # the second time without a download
            with pytest.raises(RegistryTrouble, match=f"expected {model_hash[:12]}"):
                aliased.fetch(version)
    finally:
        weights.write_bytes(content)
    assert list((tmp_path / "cache").iterdir()) == []
    again = AliasedModel("trip", "champion", spec.tracking_uri, tmp_path / "cache")
    client.delete_model_version_tag("trip", "1", "trip.model_sha256")
    try:
        with pytest.raises(RegistryTrouble, match=r"has no tag trip\.model_sha256"):
            again.fetch(version)
    finally:
        client.set_model_version_tag("trip", "1", "trip.model_sha256", model_hash)


def test_paths_in_a_config_are_cut_to_their_names_and_nothing_else_changes():
    config = {"_name_or_path": "/home/me/base/unet", "list": ["file:///data/x", "/", "a/b"], "beta": 1e-4, "ok": None}
    assert without_local_paths(config) == {"_name_or_path": "unet", "list": ["x", "/", "a/b"], "beta": 1e-4, "ok": None}


def hostile() -> dict[str, tuple[dict, dict, str]]:
    """(columns, parameters, words of the message) of inputs that the logged model must reject."""
    photo, prompt = drawn_photo(32), "a cat"
    good = {"image": [photo], "prompt": [prompt]}
    return {
        "no image": ({"image": [None], "prompt": [prompt]}, {}, "row 0: image is None"),
        "NaN": ({"image": [float("nan")], "prompt": [prompt]}, {}, "row 0: image is nan"),
        "a number": ({"image": [5], "prompt": [prompt]}, {}, "row 0: image is 5"),
        "a list": ({"image": [[1, 2]], "prompt": [prompt]}, {}, "row 0: image is [1, 2]"),
        "a path": ({"image": ["/etc/passwd"], "prompt": [prompt]}, {}, "cannot be read"),
        "an address": ({"image": ["http://127.0.0.1/a.png"], "prompt": [prompt]}, {}, "not base64"),
        "a page": ({"image": ["data:text/html;base64,PGh0bWw+"], "prompt": [prompt]}, {}, "cannot be read"),
        "PostScript": ({"image": [b"%!PS-Adobe-3.0 EPSF-3.0\n"], "prompt": [prompt]}, {}, "cannot be read"),
        "half a photo": ({"image": [photo[: len(photo) // 2]], "prompt": [prompt]}, {"steps": 1}, "row 0: "),
        "no prompt": ({"image": [photo], "prompt": [None]}, {}, "row 0: prompt is None"),
        "an object": ({"image": [photo], "prompt": [{"a": 1}]}, {}, "row 0: prompt is {'a': 1}"),
        "the second row": ({"image": [photo] * 2, "prompt": [prompt, " "]}, {}, "row 1: prompt is ' '"),
        "no rows": ({"image": [], "prompt": []}, {}, "0 rows were sent; send 1 to 16"),
        "17 rows": ({"image": [photo] * 17, "prompt": [prompt] * 17}, {}, "17 rows were sent"),
        "no column": ({"prompt": [prompt]}, {}, "column 'image' is missing"),
        "a negative seed": (good, {"seed": -1}, "seed is -1"),
        "a seed that rows exceed": (
            {"image": [photo] * 2, "prompt": [prompt] * 2},
            {"seed": 2**63 - 1, "steps": 1, "num_frames": 2},
            "row 1: seed is",
        ),
        "no steps": (good, {"steps": 0}, "steps is 0"),
        "another format": (good, {"format": "../a"}, "format is '../a'"),
    }


@pytest.fixture(scope="module")
def model(tiny_model) -> TripModel:
    model = TripModel()
    model.load_context(PythonModelContext({"model": str(tiny_model)}, {}))
    return model


@pytest.mark.parametrize("case", hostile())
def test_the_model_rejects_hostile_input_with_one_sentence(case, model):
    """As `predict` gets it: MLflow's own check of types comes before it, and is not in every way that leads there."""
    columns, params, words = hostile()[case]
    with pytest.raises(InputError) as caught:
        model.predict(None, pd.DataFrame(columns), params)
    message = str(caught.value)
    assert words in message and "\n" not in message and len(message) < 400
    assert caught.value.error_code == "INVALID_PARAMETER_VALUE"  # MLflow's server answers 400


def test_the_signature_names_inputs_outputs_and_parameters_with_defaults(package):
    model = Model.load(str(package))
    signature = model.signature
    assert signature is not None and signature.params is not None and model.metadata is not None
    inputs = [(column["name"], column["type"]) for column in signature.inputs.to_dict()]
    assert inputs == [("image", "any"), ("prompt", "string")]
    assert signature.outputs.input_names()[:3] == ["video", "format", "num_frames"]
    defaults = {p.name: p.default for p in signature.params}
    assert set(defaults) == {"num_frames", "seed", "steps", "guidance", "fps", "format"}
    assert (defaults["steps"], defaults["num_frames"], defaults["seed"], defaults["format"]) == (2, 16, 0, "mp4")
    bounds = model.metadata["bounds"]
    assert set(bounds) == set(defaults)
    for name, bound in bounds.items():
        jsonschema.validate(defaults[name], bound)
    assert bounds["steps"] == {"minimum": 1, "maximum": 1000} and bounds["format"] == {"enum": ["mp4", "gif"]}


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("python", sorted(set(PYTHONS)))
def test_an_environment_from_the_models_requirements_gives_a_video_that_begins_with_the_photo(
    python: str, spec: RegisterSpec, tmp_path: Path
) -> None:
    if not shutil.which(python) or subprocess.run([python, "--version"], capture_output=True).returncode:
        pytest.skip(f"no {python} here")
    # MLflow leaves the addresses that this process has used in its environment.
    ours = ("PYTHONPATH", "VIRTUAL_ENV", "MLFLOW_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment |= {"MLFLOW_TRACKING_URI": spec.tracking_uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment |= {"PIP_NO_COMPILE": "1"}  # what is imported is compiled then; the rest need not be
    work, home = tmp_path / "work", tmp_path / "environment"
    work.mkdir()

    def run(step: str, *command: str) -> str:
        start = time.perf_counter()
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
        print(f"{python}: {step} in {time.perf_counter() - start:.0f} s", flush=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    try:
        run("environment made", python, "-m", "venv", str(home))
        inside = str(home / "bin" / "python")
        install = [inside, "-m", "pip", "install", "--quiet"]
        run("mlflow installed", *install, f"mlflow=={importlib.metadata.version('mlflow')}")
        listed = run("requirements asked for", inside, "-c", DEPENDENCIES).split()[-1]
        run("requirements installed", *install, "-r", listed)
        (work / "photo.png").write_bytes(drawn_photo(48))
        (work / "consumer.py").write_text(CONSUMER)
        printed = run("loaded, predicted, written", inside, "consumer.py").splitlines()
        prefix, module, version, frames = printed[-4:]
    finally:
        shutil.rmtree(home, ignore_errors=True)  # about 6 GB with the CUDA build of torch
    assert Path(prefix) == home
    assert Path(module).is_relative_to(home / "lib") and "site-packages" in module
    assert "+sha" in version
    clip = read_clip(work / "out.mp4", int(frames), 4.0, 32)
    assert clip.pixels.shape == (int(frames), 32, 32, 3)
    difference = np.abs(clip.pixels[0].astype(int) - load_image(drawn_photo(48), 32).astype(int)).mean()
    print(f"{python}: trip-i2v {version}, frame 1 differs from the photo by {difference:.2f} of 255")
    assert difference < 8
