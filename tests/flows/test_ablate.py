"""The ablation's flow: learning rates by variant, and clips to choose weights on that no table is of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flows.ablate import LAMBDAS, _rates, _validation_protocol, _with_rate
from flows.layout import Run
from flows.recipes import VARIANTS, demo
from tasks.evaluate.protocol.protocol import held_out_protocol, load_protocol
from tasks.records import Artifact, UserError
from tasks.shards import Sample, ShardDataset, publish_dataset, sample_key, write_shard


def dataset(folder: Path, clips: int) -> str:
    pixels, latents = np.zeros((4, 16, 16, 3), np.uint8), np.zeros((4, 4, 2, 2), np.float16)
    rows = [
        [Sample(sample_key(f"clip{i}", 0), "a ball", latents, pixels[0], np.zeros(77, np.int32), {}, pixels)]
        for i in range(clips)
    ]
    shard = write_shard(str(folder), 0, (0, clips), rows, "hash")
    publish_dataset(str(folder), {"fps": 4.0, "size": 16}, "hash", {}, [shard.summary()])
    return str(folder)


def test_weights_are_chosen_on_held_out_clips_that_the_evaluation_does_not_take(tmp_path: Path) -> None:
    data = ShardDataset(dataset(tmp_path / "data", 60))
    recipe = replace(demo(), train=replace(demo().train, held_out_fraction=0.5))
    run = Run(replace(recipe, evaluate=replace(recipe.evaluate, clips=10)), None, str(tmp_path))
    address, clips = _validation_protocol(run, Artifact(data.uri, data.manifest_sha256))
    tables = {item.clip for item in held_out_protocol(data, 0.5, 10, 0).items}
    chosen = {item.clip for item in load_protocol(address, data, 0.5, 10, 0).items}
    everything = {item.clip for item in held_out_protocol(data, 0.5, 60, 0).items}
    assert len(chosen) == clips and not chosen & tables and chosen | tables == everything
    few = Run(replace(recipe, evaluate=replace(recipe.evaluate, clips=40)), None, str(tmp_path))
    with pytest.raises(UserError, match=r"held-out clips are left in addition to the .* that are evaluated"):
        _validation_protocol(few, Artifact(data.uri, data.manifest_sha256))


def test_a_factor_changes_the_learning_rates_of_its_variant_only() -> None:
    rates = _rates(["TRIP^-=2"], VARIANTS)
    assert rates == {"TRIP^-": 2.0}
    train, changed = demo().train, _with_rate(demo(), 2.0).train
    assert (changed.learning_rate_unet, changed.learning_rate_fusion) == (
        2 * train.learning_rate_unet,
        2 * train.learning_rate_fusion,
    )
    assert _with_rate(demo(), 1.0) == demo()
    for bad in ("TRIP^-", "TRIP^-=0", "TRIP^-=x", "other=2", "TRIP=nan"):
        with pytest.raises(UserError, match="expected VARIANT=FACTOR"):
            _rates([bad], VARIANTS)


def test_the_recipes_own_weights_are_one_of_the_pairs_that_are_tried() -> None:
    fusion = demo().train.model.fusion
    assert LAMBDAS[0] == (fusion.lambda_first, fusion.lambda_last) and all(first > last for first, last in LAMBDAS)
