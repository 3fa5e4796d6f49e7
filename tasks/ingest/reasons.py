"""The classes of failures that a later run may try again, and the reasons that belong to each."""

from __future__ import annotations

RETRY_CLASSES: dict[str, frozenset[str]] = {
    "network": frozenset({"network", "truncated"}),
    "timeout": frozenset({"timeout", "too_slow"}),
    "server": frozenset({"http_500", "http_502", "http_503", "http_504", "http_408", "http_425"}),
    "throttled": frozenset({"http_429", "http_403"}),
    "crash": frozenset({"decoder_crash", "decoder_timeout"}),
}
