"""Checks, before a training starts, what would fail at its first step or its first checkpoint."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open

from infra import storage
from tasks.records import UserError
from tasks.shards import ShardDataset
from tasks.train.optimizer import trained_parameters
from tasks.train.spec import TrainSpec, check_spec
from trip_model.folders import RECORD, folder_hash, resolve_base


def preflight(spec: TrainSpec) -> list[str]:
    """Reads manifests, one sample and the shapes of the base; loads no weights.

    Returns:
        Warnings, one sentence each.
    Raises:
        UserError: the training would fail. BaseFolderError: an incomplete base.
    """
    check_spec(spec)
    base = resolve_base(spec.base)
    unet, vae, text = (
        json.loads((base / part / "config.json").read_text()) for part in ("unet", "vae", "text_encoder")
    )
    if text["hidden_size"] != unet["cross_attention_dim"]:
        raise UserError(
            f"the text encoder of {base} is {text['hidden_size']} wide, its 3D-UNet expects"
            f" {unet['cross_attention_dim']}; take both from one base"
        )
    dataset = ShardDataset(spec.dataset)
    _check_sample(spec, dataset, vae, text)
    _check_stored_text(spec, dataset, base)
    return [*_trained_base(spec, base), *_other_base(spec, dataset, base), *_check_space(spec, _shapes(base))]


def _check_sample(spec: TrainSpec, dataset: ShardDataset, vae: dict[str, Any], text: dict[str, Any]) -> None:
    """Checks one sample: all samples of a data set have the same recipe."""
    if not len(dataset):
        raise UserError(f"the data set {spec.dataset} contains no sample; see the reasons in its report")
    sample = dataset.read(0, ("latents", "tokens"))
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    width, height = dataset.frame_size_of(0) or (spec.model.size, spec.model.size)
    expected = (spec.model.num_frames, vae.get("latent_channels", 4), height // factor, width // factor)
    # A longer sample is a track, and windows are drawn from it.
    if sample["latents"].shape[1:] != expected[1:] or len(sample["latents"]) < spec.model.num_frames:
        raise UserError(
            f"the latents of {spec.dataset} are {sample['latents'].shape} (frames, channels, height, width), the recipe"
            f" expects {expected} or more frames: {spec.model.num_frames} of {spec.model.size} pixels; prepare with it"
        )
    nominal = dataset.published.recipe.get("size")
    if dataset.frame_size_of(0) is not None and nominal != spec.model.size:
        raise UserError(
            f"{spec.dataset} was prepared at size {nominal}, the recipe has {spec.model.size}; prepare with the recipe"
        )
    length, most = len(sample["tokens"]), text["max_position_embeddings"]
    if length > most:
        raise UserError(
            f"captions of {spec.dataset} have {length} tokens, the base's text encoder takes {most};"
            f" prepare with this base"
        )
    if sample["tokens"].max() >= text["vocab_size"]:
        raise UserError(
            f"captions of {spec.dataset} contain token {sample['tokens'].max()}, the base's text encoder knows"
            f" {text['vocab_size']}; prepare with this base"
        )


def _check_stored_text(spec: TrainSpec, dataset: ShardDataset, base: Path) -> None:
    """Stored text features must come from the text encoder that sampling uses."""
    stored_by = dataset.published.recipe.get("text_encoder_sha256")
    if spec.stored_text and stored_by != folder_hash(base, "text_encoder"):
        raise UserError(f"the stored text of {spec.dataset} is not by the text encoder of {base}; train without it")


def _other_base(spec: TrainSpec, dataset: ShardDataset, base: Path) -> list[str]:
    """Latents of another VAE train without an error, but to a useless model."""
    recipe = dataset.published.recipe
    return [
        f"{spec.dataset} was prepared with another {part} than the one in {base}"
        for part in ("vae", "tokenizer")
        if f"{part}_sha256" in recipe and recipe[f"{part}_sha256"] != folder_hash(base, part)
    ]


def _trained_base(spec: TrainSpec, base: Path) -> list[str]:
    """A trained TRIP has the layout of a base, and a fusion that a base does not have."""
    if not (base / RECORD).is_file():
        return []
    return [
        f"{spec.base} is a trained TRIP: as a base it gives its 3D-UNet, and its fusion is trained from the start;"
        f" to continue it whole, give it as --from {spec.base} with the base that it was trained from"
    ]


def _shapes(base: Path) -> dict[str, list[int]]:
    """Returns the shapes of a base's 3D-UNet by name, from the headers of its files."""
    shapes: dict[str, list[int]] = {}
    for path in (base / "unet").glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118, safetensors' file cannot be iterated
    return shapes


def _check_space(spec: TrainSpec, shapes: dict[str, list[int]]) -> list[str]:
    """Checks the space for the 3D-UNet's state in float32, on the disk of a local store and in memory.

    A checkpoint contains the trained weights, AdamW's moments and the average if there is one; memory holds all
    weights, and the gradients, moments and average of the trained ones.
    """
    weights = 4 * sum(map(math.prod, shapes.values()))
    state = 4 * trained_parameters(shapes, spec) * (4 if spec.average_decay else 3)
    output = storage.local_path(spec.output) if spec.output else None
    if output is not None:
        existing = next(folder for folder in (output, *output.absolute().parents) if folder.is_dir())
        free = shutil.disk_usage(existing).free
        if free < state:
            raise UserError(
                f"{existing} has {free / 1e9:.1f} GB left, a checkpoint takes {state / 1e9:.1f} GB; free some space or"
                f" give another output address"
            )
    if spec.gpus_per_worker:
        return []  # the GPUs may be on another machine; see `python -m flows plan`
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = (weights + state) * (1 if spec.sharding == "fsdp2" else spec.workers)
    if needed <= memory:
        return []
    return [
        f"weights, gradients and AdamW's moments of {spec.workers} workers take {needed / 1e9:.1f} GB, more than this"
        f" machine's {memory / 1e9:.1f} GB"
    ]
