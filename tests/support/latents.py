"""A data set without a video: random latents of the tiny base's size."""

from __future__ import annotations

import numpy as np

from tasks.shards import Sample, open_dataset, publish_dataset, write_shard


def write_latents(uri: str, clips: int, frames: int) -> str:
    """Publishes one shard of clips of 32 pixels, each with its own seed; returns the address."""
    rng = np.random.default_rng(0)
    open_dataset(uri, {})
    outcomes = [
        [
            Sample(
                key=f"clip{row}_000",
                caption="a red circle",
                latents=rng.normal(size=(frames, 4, 4, 4)).astype(np.float16),
                first=np.zeros((32, 32, 3), np.uint8),
                tokens=rng.integers(2, 500, size=32).astype(np.int32),
                meta={},
            )
        ]
        for row in range(clips)
    ]
    publish_dataset(uri, {}, "hash", {}, [write_shard(uri, 0, (0, clips), outcomes, "hash").summary()])
    return uri
