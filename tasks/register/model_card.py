"""Writes the model card: origin, data and its terms, configuration, scores, gate, limits, licences and use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tasks.evaluation_record import Gate
from tasks.register.pyfunc_model import MAX_ROWS
from trip_model.request_limits import BOUNDS, MAX_PHOTO_BYTES, MAX_PROMPT_CHARACTERS, VIDEO_FORMATS

BASE_TERMS = (
    "Base weights keep the licence of their publisher; weights fine-tuned from them inherit it. "
    "`text-to-video-ms-1.7b` is CC-BY-NC-4.0: non-commercial, for research. "
    "The demo base in `examples/demo_base` was trained by this project on drawn shapes and is Apache-2.0."
)
DATA_TERMS = (
    "Clips keep the terms of their source. WebVid clips and captions were published for non-commercial research and "
    "their distribution has ended; drawn demo clips are free of terms."
)
LIMITS = (
    "Clips have the length, size and variety of the training data; photos unlike it move badly or not at all.",
    "Frame 1 is the photo after a centre crop to a square; what the crop cuts off is not in the video.",
    "F-Consistency rewards clips that hardly move. Read it with the motion ratio and the rows `frozen` and `real`.",
    "The effect of training is the difference from the row `base`, the base without training; not from `frozen`.",
    "A model trained on clips with a stock watermark may draw traces of it.",
    "Photos, prompts and results are not filtered, and results carry no mark that they are generated.",
)
SCHEDULE_KEYS = (
    "_class_name",
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "timestep_spacing",
    "prediction_type",
    "clip_sample",
    "steps_offset",
)


def write_model_card(
    name: str,
    lineage: Mapping[str, str],
    configuration: Mapping[str, Any],
    schedule: Mapping[str, Any],
    scores: Iterable[tuple[str, str, str]],
    gate: Gate,
    notes: Iterable[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> str:
    """Returns the card as Markdown.

    Args:
        name: of the registered model.
        lineage: the origin; `data_terms` and `base_terms` replace the default paragraphs, the rest is a table.
        configuration: the model's own settings (trip.json), dotted names to plain values.
        schedule: the scheduler's configuration.
        scores: (row, metric, value with its interval) as text.
        gate: the evaluation's gate.
        notes: the evaluation's notes on comparability.
        defaults: the model's default parameters.
    """
    origin = {k: v for k, v in lineage.items() if k not in ("data_terms", "base_terms")}
    default = {"seed": 0, "format": VIDEO_FORMATS[0], **(defaults or {})}
    values = {name: f"{bound.minimum} to {bound.maximum}" for name, bound in BOUNDS.items()}
    values["format"] = " or ".join(VIDEO_FORMATS)
    parts = [
        f"# {name}",
        "Image-to-video: makes a short clip from a photo and a prompt. The clip begins with the photo. "
        "TRIP (Temporal Residual Learning with Image Noise Prior, CVPR 2024), an independent implementation.",
        "## Origin",
        _table(("key", "value"), origin.items()) or "Not recorded.",
        "## Data and its terms",
        lineage.get("data_terms", DATA_TERMS),
        "## Configuration",
        _table(("setting", "value"), configuration.items()),
        "## Noise schedule",
        _table(("setting", "value"), [(k, schedule[k]) for k in SCHEDULE_KEYS if k in schedule]),
        "## Scores",
        _table(("row", "metric", "value"), scores) or "The report has no scores.",
        *(f"- {note}" for note in notes),
        "## Gate",
        f"{'Passed' if gate.passed else 'Not passed'}." + "".join(f"\n- {reason}" for reason in gate.reasons),
        "## Limits",
        "\n".join(f"- {limit}" for limit in LIMITS),
        "## Licences",
        "The code is Apache-2.0. " + lineage.get("base_terms", BASE_TERMS),
        "## Use",
        "```python\nimport mlflow, pandas\n"
        f'model = mlflow.pyfunc.load_model("models:/{name}@champion")\n'
        'rows = pandas.DataFrame({"image": [open("photo.jpg", "rb").read()], "prompt": ["a red circle moving left"]})\n'
        'open("out.mp4", "wb").write(model.predict(rows, params={"seed": 7})["video"][0])\n```',
        _table(
            ("parameter", "default", "may be"), [(name, default.get(name, ""), text) for name, text in values.items()]
        ),
        f"A call takes 1 to {MAX_ROWS} rows, photos of up to {MAX_PHOTO_BYTES >> 20} MiB as bytes, base64 or data URL,"
        f" and prompts of up to {MAX_PROMPT_CHARACTERS} characters. `mlflow.pyfunc.get_model_dependencies` names the"
        " file for `pip install -r`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(head: tuple[str, ...], rows: Iterable[Iterable[Any]]) -> str:
    """Returns a Markdown table; "" without rows."""
    lines = ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    if not lines:
        return ""
    return "\n".join(["| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *lines])


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
