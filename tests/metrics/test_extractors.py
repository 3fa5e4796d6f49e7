"""The extractors: honest names, hashes checked before loading, QuickGELU, and equality with open_clip used directly."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from tasks.ingest.drawing import draw_clip
from tasks.metrics.consistency import consistency_curve
from tasks.metrics.extractors.clip import Clip
from tasks.metrics.extractors.extractor import (
    KNOWN_FILES,
    ExtractorError,
    MetricKind,
    checked_sha256,
    extract_features,
    extractor_info,
    state_sha256,
)
from tasks.metrics.extractors.files import ExtractorFiles
from tasks.metrics.extractors.identity import RANDOM_SHA256
from tasks.metrics.extractors.loading import identify_extractors
from tasks.metrics.extractors.random_nets import RandomDistance

CAPTION = "a red ball rolls to the left"
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}


def frames(count: int = 5) -> np.ndarray:
    return draw_clip(0, 48)[0][::10][:count]


def embed(extractor: Clip, pixels: np.ndarray) -> np.ndarray:
    return extractor.features(pixels, CAPTION)["clip_frames"]


def tiny_folder(folder: Path, quick_gelu: bool | None) -> tuple[open_clip.CLIP, str]:
    """A folder as open_clip saves it, and the hash of its weights."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = open_clip.CLIP(**TINY, quick_gelu=bool(quick_gelu)).eval()  # type: ignore[arg-type]
    config = TINY if quick_gelu is None else TINY | {"quick_gelu": quick_gelu}
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model, hashlib.sha256((folder / "open_clip_model.safetensors").read_bytes()).hexdigest()


@torch.no_grad()
def direct(model: open_clip.CLIP, pixels: np.ndarray) -> np.ndarray:
    """Embeddings by open_clip alone."""
    transform = open_clip.image_transform(32, is_train=False)
    inputs = torch.stack([transform(Image.fromarray(frame)) for frame in pixels])  # type: ignore[arg-type]
    return model.encode_image(inputs).numpy()


def test_random_tower_is_the_same_every_time_whatever_the_global_generator_holds():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = Clip()
    assert torch.equal(torch.random.get_rng_state(), before)  # building an extractor leaves no trace
    torch.manual_seed(2)
    second = Clip()
    assert first.info == second.info and first.info.sha256 == state_sha256(first._loaded[0].visual)
    np.testing.assert_array_equal(embed(first, frames()), embed(second, frames()))


def test_random_weights_have_not_changed():
    """Numbers compare only within these hashes; a changed network changes the name of its metric."""
    names = identify_extractors(ExtractorFiles())
    assert [name.metric for name in names] == ["rfc-clip-random@db8a3869", "rfd-app@2c1eb077", "rfd-motion@5eab684f"]
    assert [name.kernel_metric for name in names[1:]] == ["rkd-app@2c1eb077", "rkd-motion@5eab684f"]
    assert not any(name.official for name in names)
    # Keys of reports and folders of cached features contain these.
    ids = ["clip_frames-7832a6fe5f6a3a6e", "rfd_app-d01b93b227cfd0aa", "rfd_motion-fa1a17f6c2cc6c31"]
    assert [name.id for name in names] == ids


@pytest.mark.parametrize("feature", RANDOM_SHA256)
def test_a_random_network_of_another_state_is_refused(feature: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(RANDOM_SHA256, feature, "0" * 64)
    with pytest.raises(ExtractorError, match=f"{feature} has sha256 .*, expected 0000"):
        Clip().features(frames(1), CAPTION) if feature == "clip_frames" else RandomDistance(feature)


def test_random_tower_sees_frames_differ():
    extractor = Clip()
    clip, other = frames(), draw_clip(11, 48)[0][:1]
    assert consistency_curve(embed(extractor, clip))[-1] < 99.99
    far = consistency_curve(embed(extractor, np.concatenate([clip[:1], other])))[0]
    assert far < consistency_curve(embed(extractor, clip[:2]))[0]
    assert consistency_curve(embed(extractor, np.repeat(clip[:1], 4, axis=0)))[-1] == pytest.approx(100)


def test_each_frame_is_embedded_on_its_own():
    extractor = Clip()
    pairs, whole = (extractor.features(frames(), CAPTION, batch=batch)["clip_frames"] for batch in (2, 5))
    np.testing.assert_allclose(pairs, whole, rtol=1e-4, atol=1e-5)


def test_features_of_a_still_clip_have_no_motion_and_the_given_frame_is_left_out():
    appearance, motion = RandomDistance("rfd_app"), RandomDistance("rfd_motion")
    still = np.repeat(frames(1), 6, axis=0)
    seen, moved = appearance.features(still, CAPTION)["rfd_app"], motion.features(still, CAPTION)["rfd_motion"]
    assert seen.shape == moved.shape == (5, 32)
    assert not moved.any() and seen.any()
    changed = still.copy()
    changed[0] = 0
    np.testing.assert_allclose(appearance.features(changed, CAPTION)["rfd_app"], seen, rtol=1e-6)


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_a_clip_folder_gives_what_open_clip_gives_with_its_own_activation(tmp_path: Path, quick_gelu: bool):
    model, sha256 = tiny_folder(tmp_path / "clip", quick_gelu)
    extractor = Clip(str(tmp_path / "clip"), sha256)
    assert extractor.info.metric == f"rfc-clip@{sha256[:8]}" and not extractor.info.official
    found = extractor.features(frames(), CAPTION)
    np.testing.assert_allclose(found["clip_frames"], direct(model, frames()), rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        text = model.encode_text(open_clip.get_tokenizer("ViT-L-14")([CAPTION]))[0].numpy()
    np.testing.assert_allclose(found["clip_text"], text, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clip", ["big-buck-bunny", "car-detection", "flower", "one-by-one-person-detection"])
def test_consistency_of_real_clips_is_that_of_open_clip_used_directly(tmp_path: Path, real_clips: Path, clip: str):
    from tasks.video.decode import read_clip

    model, sha256 = tiny_folder(tmp_path / "clip", True)
    video = (real_clips.parent / "videos" / f"{clip}.mp4").read_bytes()
    pixels = read_clip(video, 16, 4.0, 256).pixels
    vectors = direct(model, pixels).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = [100 * float(a @ b) for a, b in itertools.pairwise(vectors)]
    expected = [np.mean(cosines[: k - 1]) for k in range(2, 17)]
    curve = consistency_curve(embed(Clip(str(tmp_path / "clip"), sha256), pixels))
    np.testing.assert_allclose(curve, expected, atol=1e-4)
    assert curve[-1] < 100


def test_the_two_activations_differ_so_a_folder_has_to_say_which(tmp_path: Path):
    _, sha = tiny_folder(tmp_path / "quick", True)
    _, plain_sha = tiny_folder(tmp_path / "plain", False)
    assert sha == plain_sha  # the weights do not tell
    a, b = Clip(str(tmp_path / "quick"), sha), Clip(str(tmp_path / "plain"), sha)
    assert np.abs(embed(a, frames()) - embed(b, frames())).max() > 1e-4
    assert a.info.id != b.info.id  # or the features of one would be found for the other
    tiny_folder(tmp_path / "silent", None)
    with pytest.raises(ExtractorError, match="quick_gelu"):
        Clip(str(tmp_path / "silent"), sha)


def test_a_file_in_openai_form_is_loaded_with_quick_gelu(tmp_path: Path):
    """The genuine file is not here; a state dict of the same form stands in, under its own hash and name."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**TINY, quick_gelu=True).eval()  # type: ignore[arg-type]
    path = tmp_path / "ViT-tiny.pt"
    torch.save(model.state_dict() | {"input_resolution": torch.tensor(32)}, path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    extractor = Clip(str(path), sha256)
    assert extractor.info.metric == f"rfc-clip@{sha256[:8]}"
    found = extractor.features(frames(), CAPTION)
    # OpenAI's loader passes the weights through half precision.
    np.testing.assert_allclose(found["clip_frames"], direct(model, frames()), rtol=2e-2, atol=5e-3)
    assert found["clip_text"].shape == (16,)


def test_weights_with_another_hash_are_refused_before_they_are_loaded(tmp_path: Path):
    path = tmp_path / "ViT-L-14.pt"
    path.write_bytes(b"a file that would run code when loaded")
    with pytest.raises(ExtractorError, match=KNOWN_FILES["clip"].sha256):
        Clip(str(path))
    with pytest.raises(ExtractorError, match="given clip_sha256 is 00"):
        Clip(str(path), "00")


def test_missing_weights_are_an_error_and_not_random_ones(tmp_path: Path):
    with pytest.raises(ExtractorError, match="no CLIP weights"):
        Clip(str(tmp_path / "nothing.pt"))
    tiny_folder(tmp_path / "clip", True)
    (tmp_path / "clip" / "open_clip_model.safetensors").unlink()
    with pytest.raises(ExtractorError, match=r"lacks open_clip_model\.safetensors"):
        Clip(str(tmp_path / "clip"))


@pytest.mark.parametrize("kind", KNOWN_FILES)
def test_published_names_belong_to_the_known_files_alone(tmp_path: Path, kind: str):
    published = KNOWN_FILES[kind]
    named = extractor_info(
        kind, f"x-{kind}", published.sha256.ljust(64, "0"), ("feature",), "as it is", MetricKind.CLIP_SETS
    )
    assert named.official and named.metric == published.metric and named.mark == ""
    path = tmp_path / "weights"
    path.write_bytes(b"others")
    with pytest.raises(ExtractorError, match=f"that of .* is {published.sha256}.* as {kind}_sha256"):
        checked_sha256(path, kind, None)
    found = hashlib.sha256(b"others").hexdigest()
    other = extractor_info(
        kind, f"x-{kind}", checked_sha256(path, kind, found.upper()), ("feature",), "as it is", MetricKind.CLIP_SETS
    )
    assert not other.official and other.metric == f"x-{kind}@{found[:8]}" and other.mark == f"@{found[:8]}"
    with pytest.raises(ExtractorError, match=r"no file .* give "):
        checked_sha256(tmp_path / "nothing", kind, None)


def test_bad_frames_and_bad_features_name_the_item_and_the_extractor():
    extractor = RandomDistance("rfd_motion")
    with pytest.raises(ExtractorError, match=r"item clip3_000: rfd-motion@5eab684f takes frames uint8 .* got float32"):
        extract_features(extractor, "clip3_000", frames().astype(np.float32) / 255, CAPTION)  # type: ignore[arg-type]
    with pytest.raises(ExtractorError, match=r"item clip3_000: 1 frames, rfd-motion@5eab684f needs at least 2"):
        extract_features(extractor, "clip3_000", frames(1), CAPTION)
    extractor.net.layers[0].weight.data[0] = float("nan")  # type: ignore[union-attr, index]
    with pytest.raises(ExtractorError, match=r"item clip3_000: rfd-motion@5eab684f gave NaN or infinity in rfd_motion"):
        extract_features(extractor, "clip3_000", frames(), CAPTION)
