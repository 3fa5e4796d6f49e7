"""The command `recipes`: the names that `--recipe` takes, and the values behind them."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from cyclopts import Parameter

from flows.recipe_values import Values
from infra import storage
from tasks.records import UserError

# How many recipes each action takes.
RECIPES_OF = {"list": 0, "show": 1, "export": 1, "diff": 2, "schema": 0}


def recipes(
    action: Literal["list", "show", "diff", "export", "schema"] = "list",
    recipe: str | None = None,
    other: str | None = None,
    *,
    output: Annotated[str | None, Parameter(name=["--output", "-o"])] = None,
    values: Values = None,
) -> None:
    """List the recipes, or print their values: recipes show demo, diff demo paper, export demo -o my.toml, schema.

    Args:
        action: list the names; show all values of one as TOML; diff: the values in which two differ; export one as a
            file for --recipe; schema: the JSON Schema of such a file.
        recipe: a name, or a file .toml.
        other: of diff, the second one.
        output: of export, the file to write.
        values: FIELD=VALUE, a number of your own instead of the recipe's, as train.steps=200; once for each. Of diff,
            of the first recipe.
    """
    from flows.recipe_values import differences, format_toml, schema, settable, to_toml
    from flows.recipes import RECIPES, find_recipe, paper

    given = [name for name in (recipe, other) if name is not None]
    if len(given) != RECIPES_OF[action] or (action == "export") != (output is not None):
        usage = {"show": "show NAME", "diff": "diff NAME NAME", "export": "export NAME -o FILE"}.get(action, action)
        raise UserError(f"recipes {' '.join([action, *given])}, expected: recipes {usage}; NAME may be a file .toml")
    if action == "list":
        width = max(map(len, RECIPES))
        for name, build in RECIPES.items():
            print(f"{name:<{width}}  {build().about}")
    elif action == "schema":
        print(json.dumps(schema(paper()), indent=2))
    elif action == "diff":
        for name, pair in differences(find_recipe(given[0], None, values), find_recipe(given[1])).items():
            if name not in ("name", "about"):
                print(f"{name} = {format_toml(pair[0])}  ->  {format_toml(pair[1])}")
    elif action == "show":
        print(to_toml(settable(find_recipe(given[0], None, values))), end="")
    elif output is not None:
        if not output.endswith(".toml"):
            raise UserError(f"output {output!r}, expected a file that ends in .toml")
        # Every value, so that the file says the same when the recipes of a later version change.
        numbers = settable(find_recipe(given[0], None, values))
        del numbers["name"]  # the file gives the name
        storage.write_bytes(output, f'from = "demo"\n{to_toml(numbers)}'.encode())
        print(f"recipe      {output}; change its values, then give --recipe {output}")
