"""Ten lines for a notebook: load the champion by its alias, pass a photo and a prompt, write the video."""

from pathlib import Path

import mlflow
import pandas as pd

mlflow.set_tracking_uri("sqlite:///runs/demo/mlflow.db")  # or the address of an MLflow server
model = mlflow.pyfunc.load_model("models:/trip@champion")
photo = Path("runs/demo/photo.png").read_bytes()
rows = pd.DataFrame({"image": [photo], "prompt": ["a red circle moving left quickly"]})
clip = model.predict(rows, params={"seed": 7}).iloc[0]
Path("quickstart.mp4").write_bytes(clip["video"])
print(f"quickstart.mp4: {clip['num_frames']} frames of {clip['width']}x{clip['height']}, seed {clip['seed']}")
