"""I3D, Inception, VideoMAE and RAFT on stand-ins of the right signatures: geometry, names, refusals."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flows.cli.selftest import selftest
from tasks.ingest.drawing import draw_clip
from tasks.metrics.extractors.extractor import KNOWN_FILES, ExtractorError, KnownFile, extract_features
from tasks.metrics.extractors.files import ExtractorFiles
from tasks.metrics.extractors.flow import Raft, flow_frames
from tasks.metrics.extractors.i3d import I3D
from tasks.metrics.extractors.inception import Inception, clean_frames, legacy_frames
from tasks.metrics.extractors.loading import identify_extractors, load_extractors
from tasks.metrics.extractors.video_mae import VideoMAE
from tasks.metrics.selftest import selftest as findings
from tasks.records import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
PUBLISHED = ("FVD", "FID", "KVD", "KID", "F-Consistency")


class StandInI3D(torch.nn.Module):
    """The signature of the known file; its "logits" are means by channel and their products."""

    def forward(
        self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> torch.Tensor:
        b, c, t, h, w = x.shape
        if resize:
            flat = x.transpose(1, 2).reshape(b * t, c, h, w)
            flat = F.interpolate(flat, size=[224, 224], mode="bilinear", align_corners=False)
            x = flat.reshape(b, t, c, 224, 224).transpose(1, 2)
        if rescale:
            x = 2 * x / 255 - 1
        assert return_features and x.shape[3] == 224 and float(x.abs().max()) < 1.0001
        mean, corner = x.mean([2, 3, 4]), x[:, :, :, 0, 0].mean(2)
        return torch.cat([mean, corner, (mean * corner).repeat(1, 131), mean[:, :1]], 1)


class Mark(torch.nn.Module):
    """What loading it leaves behind: unpickling runs code."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def noise(count: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


def resampled(frame: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """A frame [H, W, 3] by the weights of each output row and column -> [3, h, w]."""
    return rows @ frame.transpose(2, 0, 1).astype(float) @ columns.T


@pytest.fixture(scope="module")
def i3d(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("i3d") / "i3d.pt"
    torch.jit.script(StandInI3D()).save(str(path))
    return path


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict of torch-fidelity's own module with random weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, *args, **kwargs):  # type: ignore[override]
            return None

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    net = Unloaded("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    for name, weight in net.named_parameters():
        if name.endswith("conv.weight"):  # torch's own start fades to nothing in a net so deep
            torch.nn.init.kaiming_normal_(weight)
    torch.save(net.state_dict(), path)
    return path


def test_i3d_gets_whole_clips_in_the_literatures_geometry(i3d: Path):
    extractor = I3D(str(i3d), sha256_of(i3d))
    pixels = noise(16, 90, 160)
    found = extract_features(extractor, "clip", pixels, "")["i3d"]
    small = F.interpolate(torch.from_numpy(pixels).permute(0, 3, 1, 2).float(), (224, 224), mode="bilinear")
    expected = (2 * small / 255 - 1).mean((0, 2, 3)).numpy()
    assert found.shape == (1, 400) and found.dtype == np.float32
    np.testing.assert_allclose(found[0, :3], expected, atol=1e-5)
    assert extractor.info.metric == f"fvd-i3d@{sha256_of(i3d)[:8]}"
    assert extractor.info.kernel_metric == f"kvd-i3d@{sha256_of(i3d)[:8]}"
    with pytest.raises(ExtractorError, match=r"item clip: 15 frames, fvd-i3d@.* needs at least 16"):
        extract_features(extractor, "clip", pixels[:15], "")


def test_a_script_of_another_signature_is_named(tmp_path: Path):
    path = tmp_path / "other.pt"
    torch.jit.script(torch.nn.Identity()).save(str(path))
    with pytest.raises(ExtractorError, match=r"did not take a clip .* expected I3D with the signature"):
        I3D(str(path), sha256_of(path)).features(noise(16, 32, 32), "")
    path.write_bytes(b"no script")
    with pytest.raises(ExtractorError, match="is no TorchScript file"):
        I3D(str(path), sha256_of(path)).features(noise(16, 32, 32), "")


@pytest.mark.parametrize("kind", ["clip", "i3d", "inception", "raft"])
def test_a_file_of_another_hash_is_not_opened(tmp_path: Path, kind: str):
    mark, path = tmp_path / "mark", tmp_path / "weights"
    torch.save(Mark(mark), path)
    torch.load(path, weights_only=False)
    assert mark.exists()  # the file would leave it
    mark.rmdir()
    files = {"clip_model" if kind == "clip" else kind: str(path)}
    with pytest.raises(ExtractorError, match=sha256_of(path)):
        load_extractors(ExtractorFiles(**files))
    with pytest.raises(ExtractorError, match=f"the given {kind}_sha256 is {'0' * 64}"):
        load_extractors(ExtractorFiles(**files, **{f"{kind}_sha256": "0" * 64}))
    # Nor is anything unpickled once its hash was stated.
    extractors = load_extractors(ExtractorFiles(**files, **{f"{kind}_sha256": sha256_of(path)}))
    with pytest.raises(ExtractorError):
        [extractor.features(noise(16, 64, 64), "") for extractor in extractors]
    assert not mark.exists()


def test_inception_is_torch_fidelitys_extractor(inception: Path):
    from torch_fidelity.utils import create_feature_extractor

    extractor = Inception(str(inception), sha256_of(inception))
    theirs = create_feature_extractor(
        "inception-v3-compat", ["2048"], cuda=False, feature_extractor_weights_path=str(inception)
    )
    pixels = draw_clip(0, 96)[0][:2]
    found = extract_features(extractor, "clip", pixels, "")["inception"]
    (expected,) = theirs(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert found.shape == (2, 2048) and found.std() > 0.01
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)
    clean = Inception(str(inception), sha256_of(inception), clean=True)
    other = extract_features(clean, "clip", pixels, "")["inception_clean"]
    assert other.shape == (2, 2048) and np.abs(other - found).max() > 1e-3
    assert extractor.info.metric == f"fid-inception@{sha256_of(inception)[:8]}"
    assert clean.info.metric == f"fid-inception-clean@{sha256_of(inception)[:8]}" and clean.info.id != extractor.info.id


@pytest.mark.parametrize(("height", "width"), [(256, 256), (180, 320), (61, 97), (480, 299)])
def test_legacy_resize_is_unfiltered_and_off_centre(height: int, width: int):
    """TensorFlow 1: output pixel i is read at i * scale, from the two pixels around, the last one repeated."""
    pixels = noise(1, height, width)

    def matrix(side: int) -> np.ndarray:
        weights = np.zeros((299, side))
        for i, place in enumerate(np.arange(299) * (side / 299)):
            low = int(place)
            weights[i, low] += 1 - (place - low)
            weights[i, min(low + 1, side - 1)] += place - low
        return weights

    grey = resampled(pixels[0], matrix(height), matrix(width))
    np.testing.assert_allclose(legacy_frames(pixels)[0].numpy(), (grey - 128) / 128, atol=2e-4)


@pytest.mark.parametrize(("height", "width"), [(256, 256), (180, 320), (61, 97), (480, 299)])
def test_clean_resize_is_antialiased_bicubic_that_neither_rounds_nor_leaves_the_range(height: int, width: int):
    """Cubic convolution with a = -0.5 around pixel centres, widened where the frame shrinks."""
    pixels = noise(1, height, width)

    def kernel(x: np.ndarray) -> np.ndarray:
        x = np.abs(x)
        inner, outer = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        return np.where(x < 1, inner, np.where(x < 2, outer, 0))

    def matrix(side: int) -> np.ndarray:
        scale = side / 299
        centres = (np.arange(299)[:, None] + 0.5) * scale - 0.5
        weights = kernel((np.arange(side)[None] - centres) / max(scale, 1))
        return weights / weights.sum(1, keepdims=True)

    grey = resampled(pixels[0], matrix(height), matrix(width)).clip(0, 255)
    np.testing.assert_allclose(clean_frames(pixels)[0].numpy(), (grey - 128) / 128, atol=2e-4)


@pytest.mark.parametrize(
    ("size", "expected"), [((256, 256), (256, 256)), ((180, 320), (256, 456)), ((97, 61), (408, 256))]
)
def test_flow_is_measured_on_frames_of_256(size: tuple[int, int], expected: tuple[int, int]):
    frames = flow_frames(noise(2, *size))
    assert frames.shape == (2, 3, *expected)
    assert frames.min() >= -1 and frames.max() <= 1
    assert flow_frames(np.full((1, *size, 3), 255, np.uint8)).min() == pytest.approx(1)


def test_raft_measures_a_shifted_texture(tmp_path: Path):
    from torchvision.models.optical_flow import raft_large

    path = tmp_path / "raft.pth"
    torch.manual_seed(0)
    torch.save(raft_large(weights=None).state_dict(), path)
    texture = noise(1, 72, 80)[0]
    clip = np.stack([texture[:, shift : shift + 64][:64] for shift in (0, 2, 4)])
    extractor = Raft(str(path), sha256_of(path))
    found = extract_features(extractor, "clip", clip, "")["flow"]
    assert found.shape == (2,) and np.isfinite(found).all() and (found > 0).all()
    assert extractor.info.metric == f"flow_ratio@{sha256_of(path)[:8]}"
    torch.save({"other": torch.zeros(1)}, path)
    with pytest.raises(ExtractorError, match="holds no weights of torchvision's raft_large"):
        Raft(str(path), sha256_of(path)).features(clip, "")


def test_video_mae_folder_gives_pooled_tokens(tmp_path: Path):
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    config = VideoMAEConfig(
        image_size=32,
        patch_size=16,
        num_hidden_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=16,
        num_frames=16,
    )
    torch.manual_seed(0)
    model = VideoMAEForVideoClassification(config).eval()
    model.save_pretrained(tmp_path / "mae")
    weights = tmp_path / "mae" / "model.safetensors"
    pixels = noise(16, 32, 32)
    extractor = VideoMAE(str(tmp_path / "mae"), sha256_of(weights))
    found = extract_features(extractor, "clip", pixels, "")["videomae"]
    assert found.shape == (1, 16) and extractor.info.metric == f"fvd-videomae@{sha256_of(weights)[:8]}"
    with torch.no_grad():  # the classifier that transformers itself puts on these features
        logits = model(torch.from_numpy(pixels).permute(0, 3, 1, 2)[None].float() / 255).logits
        np.testing.assert_allclose(model.classifier(torch.from_numpy(found)), logits, atol=1e-5)
    with pytest.raises(ExtractorError, match="takes clips of 16 frames, got 17"):
        extractor.features(noise(17, 32, 32), "")
    with pytest.raises(ExtractorError, match="no published one is known; give this file's own hash as videomae_sha256"):
        VideoMAE(str(tmp_path / "mae"))
    model.videomae.save_pretrained(tmp_path / "bare")
    bare = VideoMAE(str(tmp_path / "bare"), sha256_of(tmp_path / "bare" / "model.safetensors"))
    with pytest.raises(ExtractorError, match=r"has no classifier\.bias"):
        bare.features(pixels, "")


def test_files_of_unknown_hash_never_take_a_published_name(i3d: Path, inception: Path):
    names = identify_extractors(
        ExtractorFiles(
            i3d=str(i3d),
            i3d_sha256=sha256_of(i3d),
            inception=str(inception),
            inception_sha256=sha256_of(inception),
            inception_clean=True,
        )
    )
    assert [name.features[0] for name in names] == [
        "clip_frames",
        "rfd_app",
        "rfd_motion",
        "i3d",
        "inception",
        "inception_clean",
    ]
    assert not [name for name in names if name.metric.startswith(PUBLISHED) or name.kernel_metric.startswith(PUBLISHED)]
    with pytest.raises(ExtractorError, match="inception_clean is set and no inception file"):
        identify_extractors(ExtractorFiles(inception_clean=True))


def test_an_identity_is_that_of_the_loaded_extractor_and_needs_no_torch(tmp_path: Path):
    (tmp_path / "mae").mkdir()
    for name in ("clip.pt", "i3d.pt", "inception.pth", "raft.pth", "mae/config.json", "mae/model.safetensors"):
        (tmp_path / name).write_text(f"not loaded: {name}")
    files = ExtractorFiles(
        clip_model=str(tmp_path / "clip.pt"),
        clip_sha256=sha256_of(tmp_path / "clip.pt"),
        i3d=str(tmp_path / "i3d.pt"),
        i3d_sha256=sha256_of(tmp_path / "i3d.pt"),
        inception=str(tmp_path / "inception.pth"),
        inception_sha256=sha256_of(tmp_path / "inception.pth"),
        inception_clean=True,
        videomae=str(tmp_path / "mae"),
        videomae_sha256=sha256_of(tmp_path / "mae" / "model.safetensors"),
        raft=str(tmp_path / "raft.pth"),
        raft_sha256=sha256_of(tmp_path / "raft.pth"),
    )
    code = (
        "import sys\n"
        "from tasks.metrics.extractors.files import ExtractorFiles\n"
        "from tasks.metrics.extractors.loading import identify_extractors\n"
        f"print(*(info.id for info in identify_extractors({files!r})), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *ids, imported = done.stdout.split()
    assert ids == [extractor.info.id for extractor in load_extractors(files)] and len(ids) == 8
    assert imported == "False"


def test_the_selftest_says_which_published_value_applies(
    i3d: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    files = ExtractorFiles(i3d=str(i3d), i3d_sha256=sha256_of(i3d))
    (finding,) = findings(files)
    assert finding.passed is None and "8 white ones: 28.000" in finding.text  # 7 of 400 means, each 2 away
    assert "the published 151.256 does not apply, it is of sha256 bec6519f" in finding.text
    with pytest.raises(UserError, match=r"no file of a feature extractor is given.*i3d_torchscript.pt"):
        selftest()
    # As if the stand-in were the known file: its value is not the published one, and the command says so.
    monkeypatch.setitem(KNOWN_FILES, "i3d", KnownFile("FVD", "stand-in", sha256_of(i3d)))
    assert selftest(extractors=ExtractorFiles(i3d=str(i3d))) == 1
    assert "FAILED  FVD: 8 black clips against 8 white ones: 28.000" in capsys.readouterr().out
