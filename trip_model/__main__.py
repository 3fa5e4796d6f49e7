"""Command line of the model: python -m trip_model photo.jpg "a prompt" -o out.mp4"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

MODEL_VARIABLE = "TRIP_MODEL"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m trip_model", description="Turn a photo and a prompt into a video.")
    parser.add_argument("image", help="a photo (JPEG, PNG, WebP); its centre square is used")
    parser.add_argument("prompt", help="description of the video, in a few words")
    parser.add_argument("-o", "--out", default="out.mp4", help="an .mp4, a .gif, or a folder for png frames")
    parser.add_argument(
        "-m", "--model", default=os.environ.get(MODEL_VARIABLE, "runs/demo/model"),
        help=f"model folder (default: ${MODEL_VARIABLE}, else runs/demo/model, which `make demo` writes)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="DDIM steps (default: the model's)")
    parser.add_argument("--guidance", type=float, help="text guidance, 1 is off (default: the model's)")
    parser.add_argument("--num-frames", type=int, help="frames of the video (default: the model's)")
    parser.add_argument("--fps", type=float, help="frames per second of the file (default: the model's)")
    parser.add_argument("--scale", type=int, default=1, help="integer factor that enlarges the frames (nearest)")
    parser.add_argument(
        "--regenerate-first-frame",
        action="store_true",
        help="decode frame 1, do not copy the photo",
    )
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Writes the video and returns 0; prints one sentence and returns 2 where the input is invalid."""
    options = parse(arguments)
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ.setdefault(name, "1")
    from trip_model.images import load_image, write_video
    from trip_model.pipeline import TripPipeline

    try:
        out = Path(options.out)
        if out.suffix and out.suffix.lower() not in (".mp4", ".gif"):
            raise ValueError(f"--out {options.out!r} ends in {out.suffix!r}; name an .mp4, a .gif, or a folder")
        if not 1 <= options.scale <= 16:
            raise ValueError(f"--scale {options.scale}, expected 1 to 16")
        pipe = TripPipeline.from_folder(options.model, options.device)
        image = load_image(options.image, pipe.size)
        start = time.monotonic()

        def log_step(step: int, steps: int) -> None:
            remaining = (time.monotonic() - start) / step * (steps - step)
            print(f"\rstep {step}/{steps}  {remaining:.0f} s left ", end="", file=sys.stderr, flush=True)

        frames = pipe(
            image,
            options.prompt,
            options.seed,
            options.num_frames,
            options.steps,
            options.guidance,
            keep_first_frame=not options.regenerate_first_frame,
            on_step=log_step,
        )
        print(file=sys.stderr)
        if options.scale > 1:
            frames = frames.repeat(options.scale, axis=1).repeat(options.scale, axis=2)
        write_video(out, frames, options.fps or pipe.fps)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
