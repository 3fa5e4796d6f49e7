"""The command `animate`: the command line of the model, whose photo may also be a URL."""

from __future__ import annotations

from typing import Annotated

import cyclopts


def animate(*arguments: Annotated[str, cyclopts.Parameter(allow_leading_hyphen=True)]) -> int:
    """Animate a photo, given as a file or a URL; the flags are those of `python -m trip_model --help`.

    Args:
        arguments: photo, prompt and flags.
    """
    from tasks.ingest.download import download_photo
    from trip_model.__main__ import main

    return main(list(arguments), download_photo)
