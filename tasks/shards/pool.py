"""What the pools of a root contain, and what of it a version names."""

from __future__ import annotations

from infra import storage
from tasks.records import UserError, digest
from tasks.shards.layout import RECIPE, index_name, shard_label
from tasks.shards.places import POOLS, names_of, versions_of
from tasks.shards.reading import read_manifest


def shards_in_use(root: str) -> dict[str, set[str]]:
    """Returns the names of the shards that the versions of all data sets of a root name, by recipe hash."""
    used: dict[str, set[str]] = {}
    for name in names_of(root):
        for version in (name, *versions_of(name)):
            try:
                manifest, _ = read_manifest(version)
            except UserError:  # not finished, or removed meanwhile
                continue
            used.setdefault(manifest.recipe_hash, set()).update(shard.shard for shard in manifest.shards)
    return used


def unused_shards(root: str) -> list[str]:
    """Returns the addresses of the tars in the pools of a root that no version names.

    Pools that an unfinished data set may continue with are left out.
    """
    unfinished = {digest(storage.read_json(storage.join(name, RECIPE))) for name in _unfinished(root)}
    used = shards_in_use(root)
    unused = []
    for recipe_hash in storage.list_dir(storage.join(root, POOLS)):
        pool = storage.join(root, POOLS, recipe_hash)
        names = [] if recipe_hash in unfinished else storage.list_dir(pool)
        known = used.get(recipe_hash, set())
        unused += [storage.join(pool, name) for name in names if shard_label(name) is not None and name not in known]
    return unused


def remove_shard(tar: str) -> None:
    """Deletes a shard by the address of its tar, the index first: an index implies that its tar exists."""
    storage.delete(index_name(tar))
    storage.delete(tar)


def _unfinished(root: str) -> list[str]:
    """Returns the data sets of a root that have a recipe and no manifest."""
    found = []
    for name in names_of(root):
        try:
            read_manifest(name)
        except UserError:
            if storage.exists(storage.join(name, RECIPE)):
                found.append(name)
    return found
