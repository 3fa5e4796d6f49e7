"""Makes the picture that TRIP animates, from a text or from another picture, with pipelines of diffusers (Section 4.5).

Each kind is one of diffusers' own pipelines, by folder or hub name; TRIP needs no training for it. The pipeline is
loaded, called once and freed before TRIP is loaded, so that both never are in memory together.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageFilter

from trip_model.folders import BaseFolderError, folder_hash

PictureKind = Literal["text-to-image", "edit", "edges"]
DEFAULT_MODELS: dict[str, str] = {
    "text-to-image": "stabilityai/stable-diffusion-xl-base-1.0",
    "edit": "timbrooks/instruct-pix2pix",
    "edges": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}
DEFAULT_CONTROLNET = "lllyasviel/sd-controlnet-canny"
MAX_PICTURE_STEPS = 200


@dataclass(frozen=True)
class PictureSpec:
    """How a picture is made.

    Raises:
        ValueError: an empty text, or a number of steps out of bounds.
    """

    # text-to-image: Stable Diffusion XL. edit: InstructPix2Pix. edges: ControlNet with the edges of a picture.
    kind: PictureKind
    # Describes the picture; for `edit` the instruction.
    text: str
    # Folder or hub name; None is that of `DEFAULT_MODELS`.
    model: str | None = None
    # The ControlNet of `edges`, likewise.
    controlnet: str | None = None
    # Denoising steps; None is the pipeline's default.
    steps: int | None = None
    # Seed of the noise.
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError(f"the text of {self.kind} is empty; describe the picture or the change in a few words")
        if self.steps is not None and not 1 <= self.steps <= MAX_PICTURE_STEPS:
            raise ValueError(f"picture steps {self.steps}, expected 1 to {MAX_PICTURE_STEPS}")


def make_picture(
    spec: PictureSpec, photo: Image.Image | None, size: tuple[int, int] | None = None, device: str = "cpu"
) -> tuple[Image.Image, dict[str, Any]]:
    """Returns a picture and its provenance: kind, text, seed, and the model with its hash or revision.

    Args:
        spec: how it is made.
        photo: the picture to change, for `edit` and `edges`; RGB.
        size: (height, width) of a picture from text in pixels; None is the pipeline's default.
        device: where the pipeline runs, in half precision on a GPU.
    Raises:
        BaseFolderError: a model that cannot be loaded.
        ValueError: a photo is missing.
    """
    if photo is None and spec.kind != "text-to-image":
        raise ValueError(f"{spec.kind} changes a picture; give one")
    pipe = _load(spec, torch.float32 if device == "cpu" else torch.float16).to(device)
    try:
        inputs: dict[str, Any] = {"generator": torch.Generator().manual_seed(spec.seed)}
        if spec.steps is not None:
            inputs["num_inference_steps"] = spec.steps
        if spec.kind == "text-to-image" and size is not None:
            inputs |= {"height": size[0], "width": size[1]}
        if photo is not None and spec.kind != "text-to-image":
            factor = pipe.vae_scale_factor
            width, height = (max(factor, side // factor * factor) for side in photo.size)
            photo = photo.resize((width, height), Image.Resampling.BICUBIC)
            inputs["image"] = edges(photo) if spec.kind == "edges" else photo
        picture = pipe(spec.text, **inputs).images[0].convert("RGB")
    finally:
        del pipe
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    provenance: dict[str, Any] = {"kind": spec.kind, "text": spec.text, "seed": spec.seed, "steps": spec.steps}
    provenance |= _identity("model", spec.model or DEFAULT_MODELS[spec.kind])
    if spec.kind == "edges":
        provenance |= _identity("controlnet", spec.controlnet or DEFAULT_CONTROLNET)
    return picture, provenance


def edges(photo: Image.Image, threshold: float = 0.15) -> Image.Image:
    """Returns the edges of a picture, white on black: where the gradient of the smoothed gray exceeds a threshold."""
    gray = np.asarray(photo.convert("L").filter(ImageFilter.GaussianBlur(1.4)), dtype=np.float32) / 255
    rows, columns = np.gradient(gray)
    strength = np.hypot(rows, columns)
    white = strength > threshold * max(float(strength.max()), 0.05)  # a picture without edges stays black
    return Image.fromarray(white.astype(np.uint8) * 255).convert("RGB")


def _load(spec: PictureSpec, dtype: torch.dtype) -> Any:
    from diffusers import (
        ControlNetModel,
        StableDiffusionControlNetPipeline,
        StableDiffusionInstructPix2PixPipeline,
        StableDiffusionXLPipeline,
    )

    settings: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    name = spec.model or DEFAULT_MODELS[spec.kind]
    try:
        if spec.kind == "text-to-image":
            return StableDiffusionXLPipeline.from_pretrained(name, **settings)
        if spec.kind == "edit":
            return StableDiffusionInstructPix2PixPipeline.from_pretrained(name, **settings)
        controlnet = ControlNetModel.from_pretrained(spec.controlnet or DEFAULT_CONTROLNET, **settings)
        return StableDiffusionControlNetPipeline.from_pretrained(name, controlnet=controlnet, **settings)
    except (OSError, ValueError, KeyError) as error:
        raise BaseFolderError(
            f"the model of {spec.kind}, {name!r}, cannot be loaded ({' '.join(str(error).split())[:200]}); download it"
            " and give its folder"
        ) from error


def _identity(role: str, name: str) -> dict[str, str]:
    """Returns a model's name with the hash of its folder, or the revision of its copy from the hub."""
    if Path(name).is_dir():
        return {role: Path(name).name, f"{role}_sha256": folder_hash(name)}
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(name, "model_index.json" if role == "model" else "config.json")
    return {role: name, f"{role}_revision": Path(file).parent.name if isinstance(file, str) else "unknown"}
