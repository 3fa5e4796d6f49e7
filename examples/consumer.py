"""Loads the champion from the registry, passes a photo and a prompt, and writes the video.

python examples/consumer.py photo.jpg "a red circle moving left" -o out.mp4 --tracking sqlite:///runs/mlflow.db
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import mlflow
import pandas as pd


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Animate a photo with a registered model.")
    parser.add_argument("photo", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("-o", "--out", type=Path, default=Path("out.mp4"), help="an .mp4 or .gif file")
    parser.add_argument("--model", default="models:/trip@champion")
    parser.add_argument("--tracking", default=None, help="address of MLflow; default: MLFLOW_TRACKING_URI")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None, help="DDIM steps; default: the model's")
    args = parser.parse_args(arguments)
    if args.tracking:
        mlflow.set_tracking_uri(args.tracking)
    params = {"seed": args.seed, "format": args.out.suffix.lower().lstrip(".")}
    if args.steps is not None:
        params["steps"] = args.steps
    try:
        rows = pd.DataFrame({"image": [args.photo.read_bytes()], "prompt": [args.prompt]})
        model = mlflow.pyfunc.load_model(args.model)
        video = model.predict(rows, params=params).iloc[0]
        args.out.write_bytes(video["video"])
    except (mlflow.MlflowException, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {video['num_frames']} frames of {video['width']}x{video['height']}, seed {video['seed']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
