"""The command `recipes`: the names that `--recipe` takes."""

from __future__ import annotations


def recipes() -> None:
    """List the recipes."""
    from flows.recipes import RECIPES

    width = max(map(len, RECIPES))
    for name, recipe in RECIPES.items():
        print(f"{name:<{width}}  {recipe().about}")
