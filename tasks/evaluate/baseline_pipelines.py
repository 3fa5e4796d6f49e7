"""Makes the clips of another method for a protocol's items with a pipeline of diffusers, as a baseline's folder."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra import storage
from infra.redaction import redact
from tasks.evaluate.generate import file_name, real_pixels, save_arrays
from tasks.evaluate.progress import Ticks
from tasks.evaluate.protocol.protocol import Item, Protocol
from tasks.records import UserError
from tasks.shards import ShardDataset
from trip_model.folders import folder_hash, is_hub_name
from trip_model.images import load_image

RECORD = "baseline.json"  # in the folder of the clips: what made them
_OURS = ("prompt", "image", "height", "width", "generator", "output_type", "return_dict", "latents")


@dataclass(frozen=True)
class Adapter:
    """How a pipeline class of diffusers is called.

    Args:
        pipeline: the name of the class.
        height: of the frames that it was trained on, in pixels.
        width: likewise.
        multiple: the sides of a frame are multiples of it.
        dtype: of its weights on a GPU.
        image: whether it takes a photo; without one it makes a video from the prompt only.
        prompt: whether it takes a prompt.
        frame_step: a number of frames is a multiple of it plus one; 1: any number.
        count: the argument for the number of frames.
        result: the field of its output that has the frames.
        load: arguments of `from_pretrained`.
    """

    pipeline: str
    height: int
    width: int
    multiple: int
    dtype: str
    image: bool = True
    prompt: bool = True
    frame_step: int = 1
    count: str = "num_frames"
    result: str = "frames"
    load: Mapping[str, Any] = field(default_factory=dict)

    def frames(self, least: int) -> int:
        """The smallest number of frames that it can make, at least `least`."""
        return least + (1 - least) % self.frame_step


_NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
ADAPTERS = {
    "svd": Adapter("StableVideoDiffusionPipeline", 576, 1024, 64, "float16", prompt=False),
    "i2vgen-xl": Adapter("I2VGenXLPipeline", 704, 1280, 64, "float16"),
    "cogvideox-i2v": Adapter("CogVideoXImageToVideoPipeline", 480, 720, 16, "bfloat16", frame_step=4),
    "wan-i2v": Adapter("WanImageToVideoPipeline", 480, 832, 16, "bfloat16", frame_step=4),
    "ltx-i2v": Adapter("LTXImageToVideoPipeline", 512, 704, 32, "bfloat16", frame_step=8),
    "modelscope": Adapter("TextToVideoSDPipeline", 256, 256, 32, "float16", image=False),
    "text-to-video-zero": Adapter(
        "TextToVideoZeroPipeline",
        *(512, 512, 64, "float16"),
        image=False,
        count="video_length",
        result="images",
        load=_NO_CHECKER,
    ),
}


@dataclass(frozen=True)
class BaselineSpec:
    """Which clips to make, with what, and where.

    Args:
        method: a name of `ADAPTERS`.
        model: folder of the pipeline, or its name on the hub.
        output: address of the folder for the clips.
        height: of the frames that the pipeline makes, in pixels; None: what it was trained on.
        width: likewise.
        frames: that it makes, of which the protocol's first ones are kept; None: the least that it can make.
        arguments: further arguments of its call.
        dtype: of its weights; None: float32 on the CPU, and the method's own on a GPU.
        device: of torch.
        offload: whether parts that are not in use wait in the CPU's memory.
        part: (k, n): only every n-th item from the k-th on, counted from 1. Parts may run at the same time.
    """

    method: str
    model: str
    output: str
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    device: str = "cpu"
    offload: bool = False
    part: tuple[int, int] = (1, 1)


def canvas(photo: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """A square photo as uint8 [height, width, 3]: scaled to the shorter side, with its mirror image at both ends.

    The evaluation crops the centre, so that a method of another aspect ratio sees the photo in the frames that it was
    trained on, and its clip shows the same part of the scene as all others.
    """
    side = min(height, width)
    square = load_image(photo, side)
    gaps = [((length - side) // 2, (length - side + 1) // 2) for length in (height, width)]
    return np.pad(square, (*gaps, (0, 0)), mode="symmetric")


def make_baseline(
    spec: BaselineSpec, dataset: ShardDataset, protocol: Protocol, progress: Callable[[str], None] = print
) -> int:
    """Makes the clips that are missing in the folder, KEY.npz for each item; returns how many the folder has of them.

    Each clip has its item's seed and the protocol's frames and size. A folder has clips of one method, model and
    setting, which `baseline.json` records.

    Raises:
        UserError: an unknown method or argument, a model that cannot be loaded, sizes that the method cannot make, or
            a folder with clips of other settings.
    """
    adapter = _adapter(spec)
    height, width = spec.height or adapter.height, spec.width or adapter.width
    for name, side in (("height", height), ("width", width)):
        if side < adapter.multiple or side % adapter.multiple:
            raise UserError(f"{name} {side}, expected a multiple of {adapter.multiple} for {spec.method}")
    frames = adapter.frames(protocol.frames) if spec.frames is None else spec.frames
    if frames < protocol.frames or adapter.frames(frames) != frames:
        rule = f", a multiple of {adapter.frame_step} plus 1" if adapter.frame_step > 1 else ""
        raise UserError(f"frames {frames}, expected at least {protocol.frames}{rule} for {spec.method}")
    k, n = spec.part
    if not 1 <= k <= n:
        raise UserError(f"part {k}/{n}, expected K/N with K from 1 to N")
    dtype = spec.dtype or ("float32" if spec.device == "cpu" else adapter.dtype)
    folder, identity = _model(spec.model)
    call = {**spec.arguments, "height": height, "width": width, adapter.count: frames}
    _record(
        spec.output,
        {
            "method": spec.method,
            "pipeline": adapter.pipeline,
            "model": identity,
            "arguments": call,
            "dtype": dtype,
            "frames": protocol.frames,
            "size": protocol.size,
            "protocol": protocol.name,
            "protocol_sha": protocol.sha,
            "dataset_manifest_sha256": dataset.manifest_sha256,
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        },
    )
    mine = protocol.items[k - 1 :: n]
    present = set(storage.list_dir(spec.output))
    missing = [item for item in mine if file_name(item) not in present]
    ticks = Ticks("baseline", len(mine), progress, len(mine) - len(missing))
    if missing:
        pipeline = _load(spec, adapter, folder, dtype)
        for item in missing:
            photo = real_pixels(dataset, item, 1)[0]
            clip = _clip(pipeline, adapter, call, canvas(photo, height, width), item)[: protocol.frames]
            if len(clip) < protocol.frames:
                raise UserError(f"{spec.method} made {len(clip)} frames of {frames}; give another --frames")
            clip = np.stack([load_image(frame, protocol.size) for frame in clip])
            save_arrays(storage.join(spec.output, file_name(item)), {"frames": clip})
            ticks.tick(1)
    return len(present.union(map(file_name, missing)) & set(map(file_name, protocol.items)))


def _adapter(spec: BaselineSpec) -> Adapter:
    if spec.method not in ADAPTERS:
        raise UserError(f"method {spec.method!r}, expected one of {', '.join(ADAPTERS)}")
    adapter = ADAPTERS[spec.method]
    known = {*inspect.signature(_pipeline_class(adapter).__call__).parameters} - {"self", *_OURS, adapter.count}
    for name in spec.arguments:
        if name not in known:
            raise UserError(f"{spec.method} has no argument {name!r}; it has {', '.join(sorted(known))}")
    return adapter


def _pipeline_class(adapter: Adapter) -> Any:
    import diffusers

    try:
        return getattr(diffusers, adapter.pipeline)
    except (AttributeError, RuntimeError) as error:  # RuntimeError: a package that the class needs is not installed
        raise UserError(
            f"diffusers {diffusers.__version__} has no {adapter.pipeline} ({error}); install a version that has it"
        ) from error


def _model(address: str) -> tuple[Path, str]:
    """The local folder of a pipeline, and what identifies its files. Raises UserError."""
    folder = Path(address)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise UserError(f"{folder} has no model_index.json; give the folder of a diffusers pipeline")
        return folder, f"sha256:{folder_hash(folder)}"
    if not is_hub_name(address):
        raise UserError(f"model {address!r} is neither a folder nor a name on the hub such as owner/name")
    from diffusers import DiffusionPipeline

    try:
        folder = Path(DiffusionPipeline.download(address, use_safetensors=True))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{address} cannot be downloaded ({type(error).__name__}: {' '.join(str(error).split())[:200]}); download"
            " it and give its folder"
        ) from error
    return folder, f"{address}@{folder.name}"  # the folder of a snapshot is named by its commit


def _record(output: str, content: dict[str, Any]) -> None:
    """Writes what makes the clips of a folder, or compares it with what made the clips that are there."""
    address = storage.join(output, RECORD)
    if not storage.exists(address):
        if storage.list_dir(output):
            raise UserError(f"{redact(output)} has files but no {RECORD}; give a new folder")
        storage.write_json(address, content)
        return
    existing = storage.read_json(address)
    for name, value in content.items():
        if existing.get(name) != value:
            raise UserError(
                f"the clips in {redact(output)} were made with {name} {existing.get(name)}, not {value};"
                " give a new folder"
            )


def _load(spec: BaselineSpec, adapter: Adapter, folder: Path, dtype: str) -> Any:
    import torch

    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise UserError(f"dtype {dtype!r}, expected float32, float16 or bfloat16")
    try:
        pipeline = _pipeline_class(adapter).from_pretrained(str(folder), dtype=kind, **adapter.load)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{folder} cannot be loaded as {adapter.pipeline}: {' '.join(str(error).split())[:300]}"
        ) from error
    text = getattr(pipeline, "text_encoder", None)
    if adapter.pipeline == "I2VGenXLPipeline" and not hasattr(text, "text_model"):
        # It asks for the last norm at `text_model`; transformers 5 has it in the encoder itself. As a plain attribute:
        # a module that is its own child is visited without end.
        object.__setattr__(text, "text_model", text)
    pipeline.set_progress_bar_config(disable=True)
    if spec.offload:
        pipeline.enable_model_cpu_offload(device=spec.device)
        return pipeline
    return pipeline.to(spec.device)


def _clip(
    pipeline: Any, adapter: Adapter, call: Mapping[str, Any], photo: NDArray[np.uint8], item: Item
) -> NDArray[np.uint8]:
    """The clip of one item, uint8 [F, H, W, 3]."""
    import torch
    from PIL import Image

    given: dict[str, Any] = {"image": Image.fromarray(photo)} if adapter.image else {}
    given |= {"prompt": item.caption} if adapter.prompt else {}
    generator = torch.Generator().manual_seed(item.seed)
    torch.manual_seed(item.seed)  # some draw the photo's latents without the generator
    try:
        result = pipeline(**call, **given, generator=generator, output_type="np")
    except (ValueError, TypeError) as error:
        raise UserError(f"{adapter.pipeline}: {' '.join(str(error).split())[:300]}; change the arguments") from error
    frames = np.asarray(getattr(result, adapter.result), dtype=np.float32)
    frames = frames.reshape(-1, *frames.shape[-3:])  # some have an axis of one video
    if not np.isfinite(frames).all():
        raise UserError(f"{adapter.pipeline} made values that are not finite for {item.key}; give --dtype float32")
    return (frames.clip(0, 1) * 255).round().astype(np.uint8)
