"""Flows for deployments of the tests: they know one recipe more, `tiny`, whose base is a parameter."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows import layout, recipes
from flows.mlflow_store import tracking_address
from flows.nightly import nightly as nightly
from flows.prepare_latents import prepare_stage
from flows.reproduce import reproduce as reproduce
from flows.source import DEFAULT
from flows.train_trip import train_stage
from infra.cluster import kept_ray_session
from infra.output import outlive_reader
from tests.support.tiny_cli import tiny

recipes.RECIPES["tiny"] = lambda: tiny(recipes.DEMO_BASE)


@flow(name="prepare-and-train", on_running=[outlive_reader])
def prepare_and_train(recipe: str, source: str, root: str, base: str, values: list[str]) -> dict[str, Any]:
    """The first two stages of `reproduce`, in one session of Ray."""
    run = layout.resolve(recipe, source, root, base, DEFAULT, values)
    uri = tracking_address(None, root)
    with kept_ray_session():
        data = prepare_stage(run).data
        model = train_stage(run.train(data), uri, f"train {run.recipe.name}").exported
    return {"dataset": data.uri, "model": model.uri}
