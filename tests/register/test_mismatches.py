"""MLflow's warning about versions at the check of a registration: only where it tells something."""

from __future__ import annotations

import importlib.metadata
import logging

import pytest
from mlflow.utils.requirements_utils import warn_dependency_requirement_mismatches

from tasks.register.packaging import own_wheel_is_no_mismatch, package_version

NUMPY = f"numpy=={importlib.metadata.version('numpy')}"


@pytest.mark.parametrize(
    ("required", "warned"),
    [
        ([f"trip-i2v=={package_version()}", NUMPY], False),
        ([f"trip-i2v=={package_version()}", "numpy==0.1"], True),
        (["trip-i2v==0.1.0+sha000000000000"], True),
    ],
    ids=["the wheel of this code", "another package too", "a wheel of other code"],
)
def test_the_wheel_of_this_very_code_is_no_mismatch(required: list[str], warned: bool) -> None:
    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())
    logger = logging.getLogger("mlflow.utils.requirements_utils")
    logger.addHandler(handler)
    try:
        with own_wheel_is_no_mismatch():
            warn_dependency_requirement_mismatches(required)
        assert [text.startswith("Detected one or more mismatches") for text in texts] == [True] * warned
        warn_dependency_requirement_mismatches([f"trip-i2v=={package_version()}"])  # outside of the block as before
        assert len(texts) == warned + 1
    finally:
        logger.removeHandler(handler)
