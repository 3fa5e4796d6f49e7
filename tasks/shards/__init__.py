"""The data set at rest: webdataset tar shards with a byte index beside each, and a manifest that is written last.

A data set is a folder at any address:

    recipe.json                 what the samples are made with, written first; another recipe is refused here
    shard-00000-<digest>.tar    plain webdataset tar: members `<sample key>.<field>`; equal samples give equal bytes
    shard-00000-<digest>.json   its index: rows, failures, sha256, and where each member lies; written after the tar
    forgotten.json              hashes of clips that were removed on request and must not come back, where there are any
    manifest.json               counts and the list of shards; written last, a reader trusts nothing without it

Below the root of a run, `<root>/data/<digest>`, such clips are also in `<root>/takedowns/`, which all data sets obey.

A shard is named after its content and never written over. So a shard that is made anew (rows retried, clips forgotten)
lies beside the old one until the manifest names it, a reader that is at work sees the old data set or an error but no
mixture, and a data set whose rows succeeded at the second try has the bytes of one where they did at the first.

Fields of a sample: `latents.npy` fp16 [F, 4, h, w] raw latents, `first.png` uint8 [H, W, 3] frame 1, `caption.txt`,
`tokens.npy` int32 [L], `meta.json` provenance; where they were kept also `pixels.npy` uint8 [F, H, W, 3], `logvar.npy`
fp16 like the latents, the log variance of the VAE's posterior, and `text.npy` fp16 [L, D], the caption's text features.
F is the recipe's `num_frames`, or for tracks (`clip` is `track` in the recipe) that or more, from sample to sample.
"""

from tasks.shards.dataset import ShardDataset
from tasks.shards.fields import OPTIONAL, SUFFIXES, decode_field, encode_field
from tasks.shards.layout import (
    MANIFEST,
    RECIPE,
    SCHEMA_VERSION,
    DatasetManifest,
    Entry,
    PackedSample,
    Sample,
    ShardManifest,
    ShardSummary,
    clip_key_of,
    index_name,
    parse_record,
    sample_key,
    shard_name,
    shard_number,
)
from tasks.shards.reading import read_manifest, read_shard_manifest, shards_held, stored_outcomes
from tasks.shards.split import held_out_samples, split_keys
from tasks.shards.takedowns import (
    FORGOTTEN,
    TAKEDOWNS,
    Forgotten,
    add_takedowns,
    forgotten_sha256,
    gather_takedowns,
    link_marks,
    mark,
    read_forgotten,
    read_takedowns,
    write_forgotten,
)
from tasks.shards.writing import Outcome, open_dataset, publish_dataset, report_addresses, write_shard

__all__ = [
    "FORGOTTEN",
    "MANIFEST",
    "OPTIONAL",
    "RECIPE",
    "SCHEMA_VERSION",
    "SUFFIXES",
    "TAKEDOWNS",
    "DatasetManifest",
    "Entry",
    "Forgotten",
    "Outcome",
    "PackedSample",
    "Sample",
    "ShardDataset",
    "ShardManifest",
    "ShardSummary",
    "add_takedowns",
    "clip_key_of",
    "decode_field",
    "encode_field",
    "forgotten_sha256",
    "gather_takedowns",
    "held_out_samples",
    "index_name",
    "link_marks",
    "mark",
    "open_dataset",
    "parse_record",
    "publish_dataset",
    "read_forgotten",
    "read_manifest",
    "read_shard_manifest",
    "read_takedowns",
    "report_addresses",
    "sample_key",
    "shard_name",
    "shard_number",
    "shards_held",
    "split_keys",
    "stored_outcomes",
    "write_forgotten",
    "write_shard",
]
