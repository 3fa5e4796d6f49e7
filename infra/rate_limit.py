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
        wait = self.wait(key)
        self._use(key, 0 if wait else 1)
        return wait

    def wait(self, key: str) -> float:
        """Returns the seconds until there is a token, 0 if there is one; takes none."""
        return max(0.0, (1 - self._tokens(key)) / self.per_second)

    def take(self, key: str) -> None:
        """Takes a token, whether there is one or not."""
        self._use(key, 1)

    def _tokens(self, key: str) -> float:
        now = self.clock()
        tokens, since = self._buckets.get(key, (self.burst, now))
        return min(self.burst, tokens + (now - since) * self.per_second)

    def _use(self, key: str, count: int) -> None:
        tokens = self._tokens(key) - count
        self._buckets.pop(key, None)
        self._buckets[key] = (tokens, self.clock())
        if len(self._buckets) > self.keys:
            self._buckets.popitem(last=False)
