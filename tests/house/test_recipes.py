"""Every recipe builds, and a variant of Table 5 or 6 differs from its base in one value."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from flows.layout import prepared_for
from flows.recipes import RECIPES, find_recipe
from tasks.records import UserError, digest


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        return [d for key in {*one, *other} for d in differences(one.get(key), other.get(key), f"{path}.{key}")]
    return [] if one == other else [path]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_builds_and_is_plain_data(name: str) -> None:
    recipe = find_recipe(name)
    assert recipe.name == name and recipe.about
    assert digest(json.loads(json.dumps(recipe.identity()))) == digest(recipe.identity())


@pytest.mark.parametrize("name", RECIPES)
def test_the_stages_of_a_recipe_agree(name: str) -> None:
    recipe = find_recipe(name)
    model = recipe.train.model
    assert (model.num_frames, model.fps, model.size) == (
        recipe.prepare.num_frames,
        recipe.prepare.fps,
        recipe.prepare.size,
    )
    assert recipe.train.base == recipe.prepare.base
    assert recipe.train.global_batch % recipe.train.workers == 0
    # What training reads, prepare has stored.
    assert recipe.train.sample_posterior == recipe.prepare.keep_logvar
    assert recipe.train.stored_text == recipe.prepare.keep_text


@pytest.mark.parametrize("base", ["paper", "demo"])
@pytest.mark.parametrize(
    ("variant", "value"),
    [
        ("trip-c", ".train.model.condition"),
        ("trip-te", ".train.model.condition"),
        ("trip-minus", ".train.model.fusion.kind"),
        ("trip-w", ".train.model.fusion.kind"),
    ],
)
def test_a_variant_differs_in_one_value(base: str, variant: str, value: str) -> None:
    found = differences(find_recipe(base).identity(), find_recipe(f"{base}-{variant}").identity())
    assert sorted(found) == sorted([".about", ".name", value])


def test_the_papers_numbers() -> None:
    recipe = find_recipe("paper")
    assert (recipe.prepare.num_frames, recipe.prepare.fps, recipe.prepare.size) == (16, 4.0, 256)
    assert (recipe.train.learning_rate_unet, recipe.train.learning_rate_fusion) == (2e-6, 2e-4)
    schedule = recipe.train.model.schedule
    assert (schedule.num_train_timesteps, schedule.beta_start, schedule.beta_end) == (1000, 1e-4, 2e-2)
    assert schedule.sampling_steps == 50
    assert (recipe.evaluate.protocol, recipe.evaluate.clips) == ("webvid-2048", 2048)
    # The protocol asks for what the recipe prepares.
    assert prepared_for(recipe.prepare, recipe.evaluate.protocol) == replace(recipe.prepare, keep_pixels=True)


def test_an_unknown_recipe_is_told_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no recipe 'dema', did you mean 'demo'.*paper"):
        find_recipe("dema")
