"""docs/paper-and-ours.md: for every field of a recipe, the paper's statement and whether the value is the paper's.

    python -m flows.provenance > docs/paper-and-ours.md

Values come from the recipes, statements of the paper from `ROWS`; `tests/house` checks that no field is without a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from flows.recipes import demo, paper, paper_shrinkage


@dataclass(frozen=True)
class Paper:
    """The paper gives this value."""

    value: Any
    section: str
    note: str = ""


@dataclass(frozen=True)
class Silent:
    """The paper gives no value; the note explains our choice."""

    note: str


@dataclass(frozen=True)
class Ours:
    """Not part of the paper's method: off in `paper`, or without effect there."""

    note: str


ROWS: dict[str, Paper | Silent | Ours] = {
    # Data
    "prepare.base": Silent("a 3D-UNet derived from Stable Diffusion 2.1 (4.1, [59]); this is the published one"),
    "prepare.num_frames": Paper(16, "4.1"),
    "prepare.fps": Paper(4.0, "4.1"),
    "prepare.size": Paper(256, "4.1"),
    "prepare.frame_sizes": Ours("none: every frame is the square; `-frame-sizes` keeps the aspect ratio of a video"),
    "prepare.fit": Paper("crop", "4.1", "centre crop of the resized video"),
    "prepare.clip": Silent("fixed windows; `track` (recipes -tracks) stores all frames and draws windows in training"),
    "prepare.shots": Ours("cuts and lengths under clip `shots` (recipes -shots)"),
    "prepare.captioner": Ours("none; captions are those of the source"),
    "prepare.windows_per_clip": Silent("the first 4 s of a clip; `-tracks` trains on all of it"),
    "prepare.stride": Silent("windows follow each other without overlap"),
    "prepare.longest_track": Silent("frames of a clip that `track` keeps"),
    "prepare.keep_pixels": Silent("stores frames too, for evaluation; changes no training"),
    "prepare.keep_logvar": Silent("latents are the mean of the VAE's posterior, float16; `-posterior` draws them"),
    "prepare.keep_text": Silent("text features are computed in training or (`-stored-text`) once"),
    "prepare.filters": Silent("no window is left out; bounds in `-filtered`"),
    "demo_clips": Ours("clips that the demo draws where no table is given"),
    # The model
    "train.base": Silent("as prepare.base"),
    "train.model.condition": Paper("head", "3.2", "`tail` and `channel` are TRIP_TE and TRIP_C of Table 5"),
    "train.model.num_frames": Paper(16, "4.1"),
    "train.model.fps": Paper(4.0, "4.1"),
    "train.model.size": Paper(256, "4.1"),
    "train.model.guidance": Silent("no classifier-free guidance; the base by itself is sampled with about 9"),
    "train.model.residual_std": Ours("s_i, measured on the data before training; only shrinkage and `unit` read it"),
    "train.model.unet_output": Silent("read from the base's scheduler: noise for ms-1.7b, velocity for the demo's"),
    "train.model.unet_dropout": Silent("off; the base was trained with 0.1 in its temporal convolutions"),
    "train.model.clean_frame_timestep": Silent("the clean frame has the time step of the noised ones"),
    # TNF
    "train.model.fusion.kind": Paper("tnf", "3.4", "`linear` is TRIP^W, `none` TRIP^- of Table 6; `closed` is ours"),
    "train.model.fusion.prediction": Paper("direct", "3.4, Eq. 11, Figure 3", "`shrinkage` is ours"),
    "train.model.fusion.residual_skip": Silent("the text names no skip; `-no-skip` has none (fusion.md)"),
    "train.model.fusion.width": Silent("the width of the base's first level"),
    "train.model.fusion.heads": Silent("heads of 40, as in Stable Diffusion 1"),
    "train.model.fusion.key_value": Silent("[prior, residual] next to each other on the channels"),
    "train.model.fusion.residual": Ours("under shrinkage, what the 3D-UNet's output is read as"),
    "train.model.fusion.residual_error": Ours("under shrinkage of noise, its expected mean square error"),
    "train.model.fusion.local_shrinkage": Ours("keep still what the residual path finds still"),
    "train.model.fusion.lambda_first": Silent("TRIP^W only: linear decay (3.3), range not given, `careful tuning`"),
    "train.model.fusion.lambda_last": Silent("as lambda_first"),
    # Schedule and sampler
    "train.model.schedule.num_train_timesteps": Paper(1000, "4.1"),
    "train.model.schedule.beta_start": Paper(1e-4, "4.1"),
    "train.model.schedule.beta_end": Paper(2e-2, "4.1"),
    "train.model.schedule.beta_schedule": Paper("linear", "4.1"),
    "train.model.schedule.sampling_steps": Paper(50, "4.1", "DDIM"),
    "train.model.schedule.timestep_spacing": Silent("999, 979 .. 19, then the clean latent; eta 0, no clipping of x0"),
    "train.model.schedule.bridge": Paper("paper", "4.1", "the paper's betas, though its base was trained with others"),
    "train.model.schedule.base": Ours("the base's schedule, under the bridge `snr`"),
    # Training
    "train.objective.weighting": Paper("noise", "3.3, Eq. 10", "`unit` is ours"),
    "train.objective.text_dropout": Silent("a tenth of the captions, so that guidance stays possible"),
    "train.steps": Silent("no number given"),
    "train.global_batch": Silent("no number given; eight GPUs (4.1) of eight clips"),
    "train.trained": Paper("all", "3.3, 4.1", "3D-UNet and TNF; `temporal` and `lora` are ours"),
    "train.lora_rank": Ours("under trained `lora`"),
    "train.lora_alpha": Ours("under trained `lora`"),
    "train.learning_rate_unet": Paper(2e-6, "4.1", "AdamW"),
    "train.learning_rate_fusion": Paper(2e-4, "4.1", "AdamW"),
    "train.weight_decay": Silent("AdamW's default, on all weights; betas 0.9 and 0.999, eps 1e-8"),
    "train.clip_norm": Silent("gradients are clipped at norm 1"),
    "train.warmup_steps": Silent("linear warm-up"),
    "train.cosine": Silent("constant learning rates after the warm-up"),
    "train.average_decay": Silent("no moving average of the weights"),
    "train.precision": Silent("arithmetic of the networks; weights, z_t, prior and loss are float32"),
    "train.held_out_fraction": Silent("of the training clips, for the validation loss; time steps are stratified"),
    "train.measure_clips": Ours("from how many samples residual_std is measured"),
    "train.sample_posterior": Silent("as prepare.keep_logvar"),
    "train.stored_text": Silent("as prepare.keep_text"),
    "train.seed": Silent("one seed"),
    # Evaluation
    "evaluate.protocol": Paper("webvid-2048", "4.1", "2,048 clips of WebVid's validation split"),
    "evaluate.clips": Paper(2048, "4.1"),
    "evaluate.held_out_fraction": Silent("under the protocol `held-out`"),
    "evaluate.steps": Silent("those of the model: schedule.sampling_steps"),
    "evaluate.guidance": Silent("that of the model"),
    "evaluate.seed": Silent("one seed for each item"),
    "evaluate.methods": Ours("videos of other methods for the same table"),
    "evaluate.champion": Ours("the model that the gate compares with"),
    "evaluate.references": Ours("rows of the closed form, the VAE's round trip and the best sample"),
    "evaluate.samples": Silent("clips of each item, each with a seed of its own; the paper has one"),
    "evaluate.deterministic_motion": Ours("whether frame 1 and the caption decide the clip: the drawn corpus only"),
    "evaluate.gate.least_clips": Ours("the gate of a promotion (docs/decisions/gate.md)"),
    "evaluate.gate.least_motion_ratio": Ours("half of the real motion, by the whole interval"),
    "evaluate.gate.most_motion_ratio": Ours("twice the real motion, by the whole interval"),
    "evaluate.gate.most_still_clips": Ours("share of clips with less than a tenth of the real motion"),
    "evaluate.gate.champion_margin": Ours("share of the champion's gain that may be lost"),
    "evaluate.judges": Silent("FVD with I3D, FID, CLIP ViT-L/14 (4.1); their weights are files that you give"),
    "evaluate.bootstrap": Ours("intervals; the paper gives none"),
    "evaluate.examples": Ours("clips that the report shows"),
}

# Fields, and complete specs, of addresses and means, which do not change a result.
MEANS = {
    *("name", "about", "prepare.source", "prepare.output", "prepare.download", "prepare.decode", "prepare.retry"),
    *("prepare.frames_per_batch", "prepare.clips_per_shard", "prepare.workers", "prepare.cpus_per_worker"),
    *("prepare.gpus_per_worker", "prepare.ray_address", "train.dataset", "train.validation", "evaluate.model"),
    *("evaluate.dataset", "evaluate.output", "evaluate.batch", "evaluate.workers", "evaluate.cpus_per_worker"),
    *("evaluate.gpus_per_worker", "evaluate.ray_address", "evaluate.base", "evaluate.base_clips"),
    *("prepare.fingerprint", "evaluate.model_sha256", "train.start", "train.dataset_sha256", "train.base_sha256"),
}

HEAD = """# What is the paper's and what is ours

Every field of the recipes that changes a result: its value in `paper`, in `paper-shrinkage` (the paper's numbers with
our fusion) and in `demo`, and what the paper says. `=` is the value of `paper`. Every other recipe is one of these
three with the change that its name says: `paper-x` derives from `paper`, `paper-shrinkage-x` from `paper-shrinkage`,
`demo-x` from `demo`. The column *whose* is about the value in `paper`:

- the paper's: the paper gives the value, in the section named.
- silent: the paper gives none; the value is our choice.
- **ours**: no part of the paper's method; off or without effect in `paper`.

This page is generated from the recipes (`flows/provenance.py`).
"""
PARTS = {
    "prepare": "Data",
    "train.model": "Model",
    "train.model.fusion": "Temporal noise fusion",
    "train.model.schedule": "Schedule and sampler",
    "train": "Training",
    "evaluate": "Evaluation",
}


def settings(spec: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of every field below a record that is no means; a record with a row is one field."""
    for field in fields(spec):
        name, value = f"{path}{field.name}", getattr(spec, field.name)
        if name in MEANS or "means" in field.metadata:
            continue
        if is_dataclass(value) and name not in ROWS:
            yield from settings(value, f"{name}.")
        else:
            yield name, value


def page() -> str:
    """The page, as it is committed."""
    values = [dict(settings(recipe)) for recipe in (paper(), paper_shrinkage(), demo())]
    parts: dict[str, list[str]] = {title: [] for title in PARTS.values()}
    for name in values[0]:
        part = max((p for p in PARTS if name.startswith(f"{p}.")), key=len, default="prepare")
        short = name.removeprefix(f"{part}.")
        first, *others = (format_value(value[name]) for value in values)
        cells = [
            f"`{short}`",
            first,
            *("=" if other == first else other for other in others),
            *owner_of(ROWS[name]),
        ]
        parts[PARTS[part]].append("| " + " | ".join(cells) + " |")
    head = "| field | `paper` | `paper-shrinkage` | `demo` | whose | in the paper, or why |\n|---|---|---|---|---|---|"
    tables = [f"\n## {title}\n\n{head}\n" + "\n".join(rows) + "\n" for title, rows in parts.items()]
    return HEAD + "".join(tables)


def owner_of(row: Paper | Silent | Ours) -> tuple[str, str]:
    """Whose a value is, and the paper's statement or our reason."""
    if isinstance(row, Paper):
        return "the paper's", f"{row.section}: {row.note}" if row.note else row.section
    return "silent" if isinstance(row, Silent) else "**ours**", row.note


def format_value(value: Any) -> str:
    """A value in a cell of the table; an address by its last folder."""
    if value is None or value in ({}, ()):
        return "-"
    if is_dataclass(value):
        chosen = {f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) not in (None, False)}
        return format_value(", ".join(chosen))
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple) and value:
        return f"{format_value(value[0])}, {format_value(value[1])} .. {format_value(value[-1])}"
    if isinstance(value, str) and value.startswith("/"):
        return Path(value).parent.name
    return str(value) or "-"


def stated() -> dict[str, tuple[Any, Any]]:
    """(the paper's value, the value of the recipe `paper`) of every field that the paper gives."""
    return {name: (row.value, value) for name, value in settings(paper()) if isinstance(row := ROWS[name], Paper)}


if __name__ == "__main__":
    print(page(), end="")
