"""Limits how often something happens for each key, in bounded memory."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class RateLimit:
    """A token bucket for each key.

    Attributes:
        per_second: how many tokens a bucket gains each second.
        burst: how many it holds at most.
        keys: number of buckets; the one that was used longest ago is dropped, full again if it comes back.
        clock: seconds that only grow.
    """

    per_second: float
    burst: float
    keys: int = 100_000
    clock: Callable[[], float] = time.monotonic
    _buckets: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict, init=False)

    def seconds_until_allowed(self, key: str) -> float:
        """Takes a token and returns 0, or returns the seconds until there is one."""
        now = self.clock()
        tokens, since = self._buckets.pop(key, (self.burst, now))
        tokens = min(self.burst, tokens + (now - since) * self.per_second)
        wait = 0.0 if tokens >= 1 else (1 - tokens) / self.per_second
        self._buckets[key] = (tokens if wait else tokens - 1, now)
        if len(self._buckets) > self.keys:
            self._buckets.popitem(last=False)
        return wait
