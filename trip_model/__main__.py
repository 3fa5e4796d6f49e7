"""The command line of the model: python -m trip_model photo.jpg "a prompt" -o out.mp4"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

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
    parser.add_argument("image", help=f"{PHOTO}; its centre square is used")
    parser.add_argument("prompt", help="what should move, in a few words")
    parser.add_argument("-o", "--out", default="out.mp4", help="an .mp4, a .gif, or a folder for png frames")
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
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: cuda where there is a GPU (default)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 2 after one sentence that says what is wrong with the input."""
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
        prompt, numbers = read_prompt(options.prompt), read_numbers(vars(options))
        photo = _photo(Path(options.image))
        from trip_model.pipeline import TripPipeline

        pipe = TripPipeline.from_folder(options.model, _device(options.device))
        fps = numbers.pop("fps", pipe.fps)
        start = time.monotonic()

        def show_progress(step: int, steps: int) -> None:
            left = (time.monotonic() - start) / step * (steps - step)
            print(f"\rstep {step}/{steps}  {left:.0f} s left ", end="", file=sys.stderr, flush=True)

        frames = pipe(
            photo, prompt, **numbers, keep_first_frame=not options.regenerate_first_frame, on_step=show_progress
        )
        print(file=sys.stderr)
        if options.scale > 1:
            frames = frames.repeat(options.scale, axis=1).repeat(options.scale, axis=2)
        write_video(out, frames, fps)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


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
