"""A package, so that `python -m tests.chaos.kills` finds it before a `tests` that a library installs."""
