"""The data set at rest: webdataset tar shards, an index of all samples, and a manifest that is written last.

A data set below a root has a name, `<root>/data/<name>`, and one version for each state that it had:

    <root>/shards/<recipe hash>/                 the pool: shards of all data sets of the root with this recipe
        shard-<rows>-<digest>.tar                plain webdataset tar: members `<sample key>.<field>`
        shard-<rows>-<digest>.json               its index: rows, failures, sha256, offset and size of each member
    <root>/data/<name>/recipe.json               the fingerprint of the samples, written first
    <root>/data/<name>/forgotten.json            takedowns that these rows follow; missing if there are none
    <root>/data/<name>/versions/<digest>/        one version, never changed, named after its manifest
        manifest.json                            counts and the list of shards
        index-<digest>.npz                       arrays that find every sample and row (`tasks.shards.sample_index`)
    <root>/data/<name>/manifest.json             that of the newest version; readers require it
    <root>/takedowns/, duplicates/, retries/     lists that every prepare below the root follows

A data set at any other address is private: shards, index and manifest are in its own folder, without versions.

A shard is named after its rows and its content and never overwritten. Its rows keep it as long as the source has them,
so appended rows make new shards and no other change. A rebuilt shard (rows retried, removed, or with another caption)
lies next to the old one until the manifest names it, so a reader sees the old data set or an error, never a mixture. A
data set whose rows succeeded at the second attempt has the same bytes as one whose rows succeeded at the first.

Fields of a sample: `latents.npy` fp16 [F, 4, h, w] raw latents, `first.png` uint8 [H, W, 3] frame 1, `caption.txt`,
`tokens.npy` int32 [L], `meta.json` provenance; on request also `pixels.npy` uint8 [F, H, W, 3], `logvar.npy`
fp16 like the latents, the log variance of the VAE's posterior, and `text.npy` fp16 [L, D], the caption's text features.
F is the recipe's `num_frames`; for tracks (`clip` is `track` in the recipe) it varies by sample and is at least that.
H and W are the recipe's `size`. With `frame_sizes` in the recipe they are one of those, which the index records for
each sample; the schema of manifest and shards is then 4.
"""

from tasks.shards.dataset import ShardDataset
from tasks.shards.erasing import erase_shards
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
    row_key_of,
    rows_label,
    sample_key,
    shard_label,
    shard_name,
)
from tasks.shards.places import named, names_of, pool_of, root_of, siblings_of, version_of, versions_of
from tasks.shards.reading import (
    existing_shards,
    read_indexes,
    read_manifest,
    read_parts,
    read_shard_manifest,
    shards_folder,
    stored_outcomes,
)
from tasks.shards.split import SPLIT_RULE, SPLITS, held_out_samples, split_keys, split_of
from tasks.shards.takedowns import (
    DUPLICATE_REASON,
    DUPLICATES_FOLDER,
    TAKEDOWNS_FILE,
    TAKEDOWNS_FOLDER,
    Takedowns,
    add_root_takedowns,
    gather_root_takedowns,
    link_marks,
    mark,
    read_root_takedowns,
    read_takedowns,
    takedowns_sha256,
    write_takedowns,
)
from tasks.shards.upgrading import recipe_of_samples, upgrade
from tasks.shards.writing import Outcome, open_dataset, publish_dataset, report_addresses, write_shard

__all__ = [
    "DUPLICATES_FOLDER",
    "DUPLICATE_REASON",
    "MANIFEST",
    "OPTIONAL",
    "RECIPE",
    "SCHEMA_VERSION",
    "SPLITS",
    "SPLIT_RULE",
    "SUFFIXES",
    "TAKEDOWNS_FILE",
    "TAKEDOWNS_FOLDER",
    "DatasetManifest",
    "Entry",
    "Outcome",
    "PackedSample",
    "Sample",
    "ShardDataset",
    "ShardManifest",
    "ShardSummary",
    "Takedowns",
    "add_root_takedowns",
    "clip_key_of",
    "decode_field",
    "encode_field",
    "erase_shards",
    "existing_shards",
    "gather_root_takedowns",
    "held_out_samples",
    "index_name",
    "link_marks",
    "mark",
    "named",
    "names_of",
    "open_dataset",
    "pool_of",
    "publish_dataset",
    "read_indexes",
    "read_manifest",
    "read_parts",
    "read_root_takedowns",
    "read_shard_manifest",
    "read_takedowns",
    "recipe_of_samples",
    "report_addresses",
    "root_of",
    "row_key_of",
    "rows_label",
    "sample_key",
    "shard_label",
    "shard_name",
    "shards_folder",
    "siblings_of",
    "split_keys",
    "split_of",
    "stored_outcomes",
    "takedowns_sha256",
    "upgrade",
    "version_of",
    "versions_of",
    "write_shard",
    "write_takedowns",
]
