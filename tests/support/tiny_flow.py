"""The flow `reproduce` for a deployment of the tests: it knows one recipe more, `tiny`, whose base is a parameter."""

from __future__ import annotations

from flows import recipes
from flows.reproduce import reproduce as reproduce
from tests.support.tiny_cli import tiny

recipes.RECIPES["tiny"] = lambda: tiny(recipes.DEMO_BASE)
