"""docs/paper-and-ours.md says of every field of the recipes whose its value is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flows.provenance import ROWS, page, settings, stated
from flows.recipes import Recipe, demo, paper, paper_shrinkage

PAGE = Path(__file__).resolve().parents[2] / "docs" / "paper-and-ours.md"


@pytest.mark.parametrize("recipe", [paper, paper_shrinkage, demo])
def test_every_field_of_a_recipe_has_a_row_and_every_row_a_field(recipe: Callable[[], Recipe]) -> None:
    names = {name for name, _ in settings(recipe())}
    missing = sorted(names - set(ROWS))
    assert not missing, f"fields without a row in flows/provenance.py: {missing}; say whose their values are"
    assert names == set(ROWS)


def test_the_recipe_paper_has_the_papers_values() -> None:
    assert {name: here for name, (_, here) in stated().items()} == {name: told for name, (told, _) in stated().items()}


def test_the_committed_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run `python -m flows.provenance > docs/paper-and-ours.md`"
