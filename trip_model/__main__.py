"""The command line of the model: python -m trip_model photo.jpg "a prompt" -o out.mp4

The photo can also be made first, from a text or from another photo (Section 4.5).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trip_model.request_limits import (
    BOUNDS,
    MAX_PHOTO_BYTES,
    PHOTO,
    RequestError,
    read_numbers,
    read_photo,
    read_prompt,
    too_many_bytes,
)

MODEL_VARIABLE = "TRIP_MODEL"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m trip_model", description="Animate a photo from a text prompt.")
    parser.add_argument("image", help=f"{PHOTO}, or - with --text-to-image; `python -m flows animate` also takes a URL")
    parser.add_argument("prompt", help="what should move, in a few words")
    parser.add_argument(
        "-o", "--out", default="out.mp4", help="an .mp4, .webm, .gif or .webp, or a folder for png frames"
    )
    parser.add_argument(
        "-m", "--model", default=os.environ.get(MODEL_VARIABLE, "runs/demo/model"),
        help=f"model folder (default: ${MODEL_VARIABLE}, else runs/demo/model, which `make demo` writes)",
    )  # fmt: skip
    for name, bound in BOUNDS.items():
        default = "0" if name == "seed" else "the model's"
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, metavar="N", help=f"{bound.description()}; default: {default}")
    parser.add_argument("--scale", type=int, default=1, help="enlarge the frames by an integer factor (nearest pixel)")
    parser.add_argument("--regenerate-first-frame", action="store_true", help="show the model's own frame 1")
    parser.add_argument(
        "--fit", choices=("crop", "pad", "keep"), default="crop",
        help="crop: the photo's centre in a square (default); pad: the whole photo in it; keep: the photo's own shape",
    )  # fmt: skip
    parser.add_argument("--height", type=int, metavar="N", help="of the frames in pixels; default: the model's")
    parser.add_argument("--width", type=int, metavar="N", help="likewise")
    parser.add_argument(
        "--sampler", choices=("ddim", "dpm++", "unipc", "euler"), default="ddim", help="solver (default: ddim)"
    )
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    parser.add_argument(
        "--motion", type=float, default=1.0, metavar="X", help="0 is the still photo, 1 the model's motion"
    )
    parser.add_argument(
        "--start", choices=("noise", "photo", "low-pass"), default="noise",
        help="what sampling starts from: noise (default), the noised photo, or its low frequencies",
    )  # fmt: skip
    parser.add_argument(
        "--feature-reuse",
        type=int,
        default=1,
        metavar="N",
        help="steps that share the network's deep features; 1 is off",
    )
    parser.add_argument(
        "--long", choices=("joint", "chunks"), help="for videos longer than the model's: windows together, or in turn"
    )
    picture = parser.add_argument_group("a picture made first, by a pipeline of diffusers")
    kinds = picture.add_mutually_exclusive_group()
    kinds.add_argument("--text-to-image", metavar="TEXT", help="describes the picture (Stable Diffusion XL)")
    kinds.add_argument("--edit", metavar="TEXT", help="instruction that changes the photo (InstructPix2Pix)")
    kinds.add_argument("--edges", metavar="TEXT", help="describes a new picture with the photo's edges (ControlNet)")
    picture.add_argument("--picture-model", metavar="NAME", help="folder or hub name of its model")
    picture.add_argument("--controlnet", metavar="NAME", help="folder or hub name of the ControlNet of --edges")
    picture.add_argument("--picture-steps", type=int, metavar="N", help="its denoising steps")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: cuda where there is a GPU (default)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None, download: Callable[[str], bytes] | None = None) -> int:
    """Returns 0, or 2 after one sentence that says what is wrong with the input.

    Args:
        arguments: of the command line.
        download: returns the photo at a URL; without it a URL is rejected.
    """
    options = parse(arguments)
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ.setdefault(name, "1")
    from trip_model.images import check_video_target, write_video

    try:
        # All that can be checked without the model is checked before it is loaded.
        out = Path(options.out)
        check_video_target(out)
        if not 1 <= options.scale <= 16:
            raise ValueError(f"--scale {options.scale}, expected 1 to 16")
        given = vars(options)
        if options.long is not None:  # more frames than one request of the service may have
            given = given | {"num_frames": None}
        prompt, numbers = read_prompt(options.prompt), read_numbers(given)
        device = _device(options.device)
        photo: Any = None if options.text_to_image is not None else _source(options.image, download)
        if options.text_to_image is not None and options.image != "-":
            raise ValueError(f"--text-to-image makes the photo; give - in place of {options.image}")
        photo, picture = _picture(options, photo, numbers.get("seed", 0), device)
        frames, fps, model = _animate(options, photo, prompt, numbers, device)
        if options.scale > 1:
            frames = frames.repeat(options.scale, axis=1).repeat(options.scale, axis=2)
        made = {"model": model, "seed": numbers.get("seed", 0), "prompt": prompt}
        write_video(out, frames, fps, metadata=generated_metadata(**made, picture=picture))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


def generated_metadata(**values: Any) -> dict[str, Any]:
    """Returns what a file says of its origin: that it is generated, by which version, and the given values."""
    from trip_model import __version__

    return {"generated": True, "version": f"trip-i2v {__version__}"} | {
        name: value for name, value in values.items() if value is not None
    }


def _picture(
    options: argparse.Namespace, photo: bytes | None, seed: int, device: str
) -> tuple[Any, dict[str, Any] | None]:
    """Returns the photo to animate and the provenance of a picture that was made first."""
    texts = {"text-to-image": options.text_to_image, "edit": options.edit, "edges": options.edges}
    chosen = [(kind, text) for kind, text in texts.items() if text is not None]
    if not chosen:
        unused = [
            name for name in ("picture_model", "controlnet", "picture_steps") if getattr(options, name) is not None
        ]
        if unused:
            flag = unused[0].replace("_", "-")
            raise ValueError(f"--{flag} needs --text-to-image, --edit or --edges; give one of them, or leave it out")
        return photo, None
    from trip_model.images import open_photo
    from trip_model.pictures import PictureSpec, make_picture

    kind, text = chosen[0]
    spec: Any = PictureSpec(kind, text, options.picture_model, options.controlnet, options.picture_steps, seed)  # type: ignore[arg-type]
    return make_picture(spec, None if photo is None else open_photo(photo), device=device)


def _animate(
    options: argparse.Namespace, photo: Any, prompt: str, numbers: dict[str, Any], device: str
) -> tuple[Any, float, str]:
    """Returns the frames uint8 [F, H, W, 3], frames per second, and the name of the model."""
    import numpy as np

    from trip_model.pipeline import TripPipeline, seed_generator

    pipe = TripPipeline.from_pretrained(options.model).to(device)
    pipe.set_progress_bar_config(disable=True)
    fps = numbers.get("fps", pipe.fps)
    start, done = time.monotonic(), 0

    def show_progress(_: Any, step: int, t: int, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal done
        done += 1
        steps = numbers.get("steps", pipe.model.config.schedule.sampling_steps)
        left = (time.monotonic() - start) / done * max(steps - done, 0)
        print(f"\rstep {done}/{steps}  {left:.0f} s left ", end="", file=sys.stderr, flush=True)
        return {}

    frames: Any = pipe(
        photo,
        prompt,
        height=options.height,
        width=options.width,
        num_frames=_long_frames(options) if options.long else numbers.get("num_frames"),
        num_inference_steps=numbers.get("steps"),
        guidance_scale=numbers.get("guidance"),
        negative_prompt=options.negative_prompt,
        generator=seed_generator(numbers.get("seed", 0)),
        output_type="np",
        callback_on_step_end=show_progress,
        scheduler=options.sampler,
        fit=options.fit,
        motion_strength=options.motion,
        start=options.start,
        feature_reuse=options.feature_reuse,
        long=options.long,
        keep_first_frame=not options.regenerate_first_frame,
    ).frames[0]
    print(file=sys.stderr)
    return np.rint(frames * 255).astype(np.uint8), fps, Path(options.model).resolve().name


def _long_frames(options: argparse.Namespace) -> int:
    try:
        return int(options.num_frames)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--num-frames {options.num_frames}; give the number of frames with --long") from error


def _source(image: str, download: Callable[[str], bytes] | None) -> bytes:
    """Returns the bytes of the photo at a path or a URL."""
    if not image.lower().startswith(("http://", "https://")):
        return _photo(Path(image))
    if download is None:
        raise ValueError("the photo is a URL; give a file, or use `python -m flows animate`, which checks its address")
    return download(image)


def _device(name: str) -> str:
    """Returns the device of `--device`. Raises ValueError for one that this machine does not have."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: a build without CUDA
        raise ValueError(f"--device {name} is not available here; use cpu, cuda or auto") from error
    return name


def _photo(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_PHOTO_BYTES:
            raise too_many_bytes(size)
        with path.open("rb") as file:
            data = file.read(MAX_PHOTO_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; give the path of a photo") from error
    try:
        return read_photo(data)
    except RequestError as error:
        raise ValueError(f"{path}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
