"""The nodes for ComfyUI by its contract, and the notebook, both on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trip_model import TripPipeline

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def nodes() -> Any:
    """The folder as ComfyUI loads it: by its path, under another name."""
    spec = importlib.util.spec_from_file_location("custom_nodes_trip", EXAMPLES / "comfyui" / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def defaults(node: Any) -> dict[str, Any]:
    """What ComfyUI passes for the widgets that a user leaves as they are."""
    inputs = node.INPUT_TYPES()
    return {
        name: kind[1]["default"]
        for part in ("required", "optional")
        for name, kind in inputs.get(part, {}).items()
        if len(kind) > 1 and "default" in kind[1]
    }


def photo() -> torch.Tensor:
    pixels = torch.from_numpy(np.random.default_rng(0).random((1, 40, 48, 3), dtype=np.float32))
    return pixels * 0.5


def test_every_node_keeps_the_contract_of_comfyui(nodes) -> None:
    assert set(nodes.NODE_CLASS_MAPPINGS) == set(nodes.NODE_DISPLAY_NAME_MAPPINGS)
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        inputs = node.INPUT_TYPES()
        assert set(inputs) <= {"required", "optional", "hidden"} and node.CATEGORY
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
        function = getattr(node, node.FUNCTION)
        names = [*inputs["required"], *inputs.get("optional", {})]
        taken = function.__code__.co_varnames[1 : function.__code__.co_argcount]
        assert sorted(names) == sorted(taken), "ComfyUI passes the inputs by name"
        for kind, *settings in [*inputs["required"].values(), *inputs.get("optional", {}).values()]:
            assert isinstance(kind, list) or kind.isupper()
            for setting in settings:
                if {"min", "max"} <= set(setting):
                    assert setting["min"] <= setting["default"] <= setting["max"]


def test_an_image_becomes_a_batch_of_frames(nodes, tiny_model: Path) -> None:
    (model,) = nodes.TripLoader().load(str(tiny_model), "cpu")
    settings = defaults(nodes.TripAnimate) | {"num_frames": 4, "seed": 7}
    frames, fps = nodes.TripAnimate().animate(model, photo(), **settings)
    assert isinstance(frames, torch.Tensor) and frames.dtype == torch.float32
    assert frames.shape == (4, 32, 32, 3) and frames.min() >= 0 and frames.max() <= 1
    assert fps == model.fps
    (same,) = TripPipeline.from_pretrained(tiny_model).generate([photo()[0].numpy()], [settings["prompt"]], [7], 4)
    assert np.array_equal((frames.numpy() * 255).round().astype(np.uint8), same), "the seed of every other interface"
    longer, _ = nodes.TripAnimate().animate(model, photo(), **(settings | {"num_frames": 20, "steps": 1}))
    assert longer.shape == (20, 32, 32, 3)


def test_comfyui_shows_the_steps_and_stops_when_it_is_told(nodes, tiny_model: Path, monkeypatch) -> None:
    """Its two modules, as far as a node uses them: ComfyUI itself is no package that can be installed."""
    updates: list[int] = []

    class Interrupted(Exception):
        pass

    class ProgressBar:
        def __init__(self, total: int) -> None:
            self.total = total

        def update(self, count: int) -> None:
            updates.append(count)

    def interrupt() -> None:
        if len(updates) == 2:
            raise Interrupted

    utils, management = types.ModuleType("comfy.utils"), types.ModuleType("comfy.model_management")
    utils.ProgressBar = ProgressBar  # type: ignore[attr-defined]
    management.throw_exception_if_processing_interrupted = interrupt  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy.utils", utils)
    monkeypatch.setitem(sys.modules, "comfy.model_management", management)
    (model,) = nodes.TripLoader().load(str(tiny_model), "cpu")
    with pytest.raises(Interrupted):
        nodes.TripAnimate().animate(model, photo(), **(defaults(nodes.TripAnimate) | {"num_frames": 2, "steps": 4}))
    assert updates == [1, 1]


def test_the_notebook_runs(tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    demo = tmp_path / "runs" / "demo"
    demo.mkdir(parents=True)
    (demo / "model").symlink_to(tiny_model)
    Image.fromarray((photo()[0].numpy() * 255).astype(np.uint8)).save(demo / "photo.png")
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES / "trip.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    lines = [line for cell in cells for line in cell["source"] if line.strip()]
    assert len(lines) <= 10 and all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert names["frames"].shape == (16, 32, 32, 3)
    with Image.open(tmp_path / "trip.gif") as gif:
        assert gif.size == (32, 32) and gif.n_frames > 1
