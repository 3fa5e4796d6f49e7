"""Where the parts of a data set are: its shards in the pool of its root, its versions, and its name.

Below a root:

    <root>/shards/<recipe hash>/                    the pool: shards of all data sets with this recipe
    <root>/data/<name>/manifest.json                the newest version of a name; the same bytes as in its version
    <root>/data/<name>/versions/<digest>/           a version, named after its manifest's sha256: never changed

A data set at any other address is private: its shards are next to its manifest, and it has no versions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from infra import storage

POOLS = "shards"
VERSIONS = "versions"
_DIGEST = "[0-9a-f]{16}"


def root_of(dataset: str) -> str | None:
    """Returns the root of a data set, from its address or that of a version; None for a private data set."""
    match = re.fullmatch(rf"(.*[^/])/data/{_DIGEST}(/{VERSIONS}/{_DIGEST})?", dataset.rstrip("/"))
    return match[1] if match else None


def named(dataset: str) -> str:
    """Returns the address of the name that a version belongs to; any other address is returned as it is."""
    return re.sub(rf"/{VERSIONS}/{_DIGEST}/?$", "", dataset) if root_of(dataset) is not None else dataset


def version_of(dataset: str, manifest_sha256: str) -> str:
    """Returns the address of the version with this manifest; a private data set has only its own address."""
    if root_of(dataset) is None:
        return dataset
    return storage.join(named(dataset), VERSIONS, manifest_sha256[:16])


def pool_of(dataset: str, recipe_hash: str) -> str:
    """Returns the folder with the shards of a data set."""
    root = root_of(dataset)
    return dataset if root is None else storage.join(root, POOLS, recipe_hash)


def names_of(root: str) -> list[str]:
    """Returns the addresses of all data sets below a root, finished or not."""
    folder = storage.join(root, "data")
    return [storage.join(folder, name) for name in storage.list_dir(folder) if re.fullmatch(_DIGEST, name)]


def versions_of(dataset: str) -> list[str]:
    """Returns the addresses of all versions of a name; empty for a private data set."""
    if root_of(dataset) is None:
        return []
    folder = storage.join(named(dataset), VERSIONS)
    return [storage.join(folder, name) for name in storage.list_dir(folder) if re.fullmatch(_DIGEST, name)]


def siblings_of(dataset: str) -> Iterator[str]:
    """Yields the addresses of the other data sets of the root."""
    root = root_of(dataset)
    if root is not None:
        yield from (name for name in names_of(root) if name != named(dataset))
