"""The command `check-source`: what a source would give, before anything is downloaded."""

from __future__ import annotations

from collections.abc import Callable

from flows.recipe_values import Values
from flows.source import DEFAULT, SourceOptions
from infra import storage
from infra.redaction import redact
from infra.settings import DEFAULT_ROOT
from tasks.ingest.survey import lines_of, preview, survey
from tasks.records import ClipRef
from tasks.shards.takedowns import read_root_takedowns


def check_source(
    source: str,
    root: str = DEFAULT_ROOT,
    recipe: str = "demo",
    base: str | None = None,
    values: Values = None,
    *,
    options: SourceOptions = DEFAULT,
) -> int:
    """Read all rows of a source, download none, and print what would happen; the exit code is 1 if a row is unusable.

    Args:
        source: a table, several tables, an annotation or a folder of captioned videos.
        root: the run's root, whose takedowns leave clips out.
        recipe: the recipe whose text encoder counts the tokens of captions.
        base: folder of the text-to-video model, instead of the recipe's.
        values: FIELD=VALUE, a number of your own instead of the recipe's; once for each.
        options: reading options of the source.
    """
    spec = options.spec(source)
    for line in preview(spec):
        print(redact(line))
    tokens, longest = _tokenizer(recipe, base, values)
    takedowns = read_root_takedowns(storage.join(storage.absolute(root), "data", "0" * 16))

    def is_taken_down(row: ClipRef, address: str | None) -> bool:
        return takedowns.failure(row, address) is not None

    result = survey(spec, tokens, longest, is_taken_down if takedowns.marks else None)
    for line in lines_of(result, longest):
        print(redact(line))
    return int(result.usable < result.rows - result.taken_down)


def _tokenizer(recipe: str, base: str | None, values: Values) -> tuple[Callable[[str], int] | None, int]:
    """The number of tokens of a caption, and what the text encoder reads; None without a local base."""
    import json
    from pathlib import Path

    from flows.recipes import find_recipe

    folder = Path(find_recipe(recipe, base, values).prepare.base)
    if not (folder / "tokenizer").is_dir():
        return None, 77
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoder = json.loads((folder / "text_encoder" / "config.json").read_text())
    longest = min(int(encoder.get("max_position_embeddings", 77)), int(tokenizer.model_max_length))
    return lambda caption: len(tokenizer(caption, verbose=False)["input_ids"]), longest
