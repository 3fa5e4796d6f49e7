"""Base and model folders on disk: their layout, the address of a base, and the hash of a folder's files.

A base folder has the layout of `text-to-video-ms-1.7b`: `unet/ vae/ text_encoder/ tokenizer/ scheduler/`. This module
imports neither torch nor diffusers, so that an address can be resolved in milliseconds.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

RECORD = "trip.json"  # of a model folder: its configuration and provenance, written last
BASE_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


class BaseFolderError(ValueError):
    """A base or model folder that cannot be used; the message names the part and the fix."""


def resolve_base(base: str | Path) -> Path:
    """Returns the local folder of a base: the path itself, or the download of a name on the hub.

    Raises:
        BaseFolderError: no such folder, a missing part, or a failed download.
    """
    folder = Path(base)
    if not folder.is_dir():
        if not is_hub_name(base):
            raise BaseFolderError(f"base {str(base)!r} is not a folder; give a folder with {', '.join(BASE_PARTS)}")
        from huggingface_hub import snapshot_download

        try:
            fetched = snapshot_download(str(base), allow_patterns=["*.json", "*.txt", "*.safetensors", "*.model"])
        except (OSError, ValueError) as error:
            raise BaseFolderError(
                f"base {str(base)!r} is neither a local folder nor a hub name that could be fetched"
                f" ({type(error).__name__}); download it and give its path"
            ) from error
        folder = Path(fetched)
    missing = [part for part in BASE_PARTS if not (folder / part).is_dir()]
    if missing:
        raise BaseFolderError(f"base {folder} has no {', '.join(missing)}; it needs {', '.join(BASE_PARTS)}")
    return folder


def is_hub_name(name: str | Path) -> bool:
    """Whether a name that is no folder can be one on the hub, owner/name; `runs/typo` is a path next to `runs`."""
    path = Path(name)
    is_path = path.is_absolute() or str(name)[:1] in (".", "~") or path.parent.is_dir() or "\\" in str(name)
    return not is_path and str(name).count("/") == 1


def stored_vae_factor(base: Path) -> int:
    """Returns the pixels per latent cell along one side, from the VAE's configuration in a base folder.

    Raises:
        BaseFolderError: the configuration cannot be read.
    """
    try:
        levels = len(json.loads((base / "vae" / "config.json").read_text())["block_out_channels"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BaseFolderError(f"base {base}: vae/config.json cannot be read ({error}); fetch the base again") from error
    return 2 ** (levels - 1)


def folder_hash(folder: str | Path, part: str = "") -> str:
    """Returns the sha256 of the names and bytes of all files in a folder, or in one part of it."""
    return files_hash(file_hashes(Path(folder, part)))


def file_hashes(folder: Path) -> dict[str, bytes]:
    """Returns the sha256 of each file in a folder by its relative name; weights may be larger than the memory."""
    hashes = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            hashes[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").digest()
    return hashes


def files_hash(hashes: dict[str, bytes]) -> str:
    """Returns the hash of a folder from the hashes of its files, in the order of `file_hashes`."""
    digest = hashlib.sha256()
    for name, file_hash in hashes.items():
        digest.update(name.encode() + b"\0" + file_hash)
    return digest.hexdigest()
