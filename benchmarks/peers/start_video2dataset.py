"""Starts video2dataset in its own environment, with the one fix that its subsamplers need to run.

Its download worker asks the resolution subsampler for `encode_formats`, which that does not have, and every shard fails
(iejMac/video2dataset#263, still so in its last commit, 28e7d1c). Nothing else is changed.
"""

import fire
from video2dataset import video2dataset
from video2dataset.subsamplers import ResolutionSubsampler

ResolutionSubsampler.encode_formats = property(lambda self: {"video": self.encode_format})

if __name__ == "__main__":  # its worker processes import this file
    fire.Fire(video2dataset)
