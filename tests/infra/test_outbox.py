"""The queue of records for a receiver that is slow or away."""

from __future__ import annotations

import time
from typing import Any

from infra.outbox import Outbox


def test_the_end_waits_for_a_receiver_that_is_slow_but_accepts_records() -> None:
    received: list[dict[str, Any]] = []

    def send(records: list[dict[str, Any]]) -> None:
        time.sleep(0.3)
        received.extend(records)

    outbox = Outbox("slow", send, lambda pending: 1, (OSError,), lambda error: False)
    for number in range(6):
        outbox.put({"number": number})
    outbox.start()
    assert outbox.close(wait_seconds=0.5) and [record["number"] for record in received] == list(range(6))


def test_the_end_does_not_wait_for_a_receiver_that_accepts_nothing() -> None:
    outbox = Outbox("hangs", lambda records: time.sleep(30), lambda pending: 1, (OSError,), lambda error: False)
    outbox.put({})
    outbox.start()
    began = time.monotonic()
    assert not outbox.close(wait_seconds=0.5) and time.monotonic() - began < 5
