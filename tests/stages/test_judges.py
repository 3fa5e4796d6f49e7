"""The judges: honest names, hashes checked before loading, QuickGELU, and equality with open_clip used directly."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from tasks.evaluate.clip import OPENAI_VIT_L_14_SHA256, identify_clip, load_clip, random_clip
from tasks.evaluate.consistency import consistency_curve
from tasks.evaluate.judges import JudgeError, state_sha256
from tasks.evaluate.random_nets import RandomDistances
from tasks.ingest.drawing import draw_clip

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1},
}


def frames(count: int = 5) -> np.ndarray:
    return draw_clip(0, 48)[0][::10][:count]


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


def test_random_tower_is_the_same_every_time_whatever_the_global_generator_holds():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = random_clip()
    assert torch.equal(torch.random.get_rng_state(), before)  # building a judge leaves no trace
    torch.manual_seed(2)
    second = random_clip()
    assert first.sha256 == second.sha256 == state_sha256(first.model.visual)
    np.testing.assert_array_equal(first.embed(frames()), second.embed(frames()))


def test_random_judges_carry_their_hash_and_never_a_published_name():
    judge, distances = identify_clip(None), RandomDistances()
    assert judge.metric == f"rfc-clip-random@{judge.sha256[:8]}" and not judge.official
    assert distances.app_metric == f"rfd-app@{distances.app_sha256[:8]}"
    assert distances.motion_metric == f"rfd-motion@{distances.motion_sha256[:8]}"
    assert distances.app_sha256 != distances.motion_sha256


def test_random_weights_have_not_changed():
    """Numbers compare only within these hashes; whoever changes a net changes the name of its metric."""
    distances = RandomDistances()
    names = [identify_clip(None).metric, distances.app_metric, distances.motion_metric]
    assert names == ["rfc-clip-random@db8a3869", "rfd-app@2c1eb077", "rfd-motion@5eab684f"]


def test_random_tower_sees_frames_differ():
    judge = random_clip()
    clip, other = frames(), draw_clip(11, 48)[0][:1]
    assert consistency_curve(judge.embed(clip))[-1] < 99.99
    far = consistency_curve(judge.embed(np.concatenate([clip[:1], other])))[0]
    assert far < consistency_curve(judge.embed(clip[:2]))[0]
    assert consistency_curve(judge.embed(np.repeat(clip[:1], 4, axis=0)))[-1] == pytest.approx(100)


def test_each_frame_is_embedded_on_its_own():
    judge = random_clip()
    np.testing.assert_allclose(judge.embed(frames(), batch=2), judge.embed(frames(), batch=5), rtol=1e-4, atol=1e-5)


def test_features_of_a_still_clip_have_no_motion_and_the_given_frame_is_left_out():
    distances = RandomDistances()
    still = np.repeat(frames(1), 6, axis=0)
    appearance, motion = distances.features(still)
    assert appearance.shape == motion.shape == (5, 32)
    assert not motion.any() and appearance.any()
    changed = still.copy()
    changed[0] = 0
    np.testing.assert_allclose(distances.features(changed)[0], appearance, rtol=1e-6)


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_a_clip_folder_gives_what_open_clip_gives_with_its_own_activation(tmp_path: Path, quick_gelu: bool):
    model, sha256 = tiny_folder(tmp_path / "clip", quick_gelu)
    judge = load_clip(str(tmp_path / "clip"), sha256)
    assert judge.metric == f"rfc-clip@{sha256[:8]}" and not judge.official
    transform = open_clip.image_transform(32, is_train=False)
    inputs = torch.stack([transform(Image.fromarray(f)) for f in frames()])  # type: ignore[arg-type]
    with torch.no_grad():
        direct = model.encode_image(inputs).numpy()
    np.testing.assert_allclose(judge.embed(frames()), direct, rtol=1e-4, atol=1e-6)


def test_the_two_activations_differ_so_a_folder_has_to_say_which(tmp_path: Path):
    quick, sha = tiny_folder(tmp_path / "quick", True)
    plain, plain_sha = tiny_folder(tmp_path / "plain", False)
    assert sha == plain_sha  # the weights do not tell
    a, b = load_clip(str(tmp_path / "quick"), sha), load_clip(str(tmp_path / "plain"), sha)
    assert np.abs(a.embed(frames()) - b.embed(frames())).max() > 1e-4
    tiny_folder(tmp_path / "silent", None)
    with pytest.raises(JudgeError, match="quick_gelu"):
        load_clip(str(tmp_path / "silent"), sha)


def test_a_file_in_openai_form_is_loaded_with_quick_gelu(tmp_path: Path):
    """The genuine file is not here; a state dict of the same form stands in, under its own hash and name."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**TINY, quick_gelu=True).eval()  # type: ignore[arg-type]
    path = tmp_path / "ViT-tiny.pt"
    torch.save(model.state_dict() | {"input_resolution": torch.tensor(32)}, path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    judge = load_clip(str(path), sha256)
    assert judge.metric == f"rfc-clip@{sha256[:8]}"
    transform = open_clip.image_transform(32, is_train=False)
    inputs = torch.stack([transform(Image.fromarray(f)) for f in frames()])  # type: ignore[arg-type]
    with torch.no_grad():
        direct = model.encode_image(inputs).numpy()
    # OpenAI's loader passes the weights through half precision.
    np.testing.assert_allclose(judge.embed(frames()), direct, rtol=2e-2, atol=5e-3)


def test_weights_with_another_hash_are_refused_before_they_are_loaded(tmp_path: Path):
    path = tmp_path / "ViT-L-14.pt"
    path.write_bytes(b"a file that would run code when loaded")
    with pytest.raises(JudgeError, match=OPENAI_VIT_L_14_SHA256):
        load_clip(str(path))
    with pytest.raises(JudgeError, match="given clip_sha256 is 00"):
        load_clip(str(path), "00")


def test_missing_weights_are_an_error_and_not_random_ones(tmp_path: Path):
    with pytest.raises(JudgeError, match="no CLIP weights"):
        load_clip(str(tmp_path / "nothing.pt"))
    tiny_folder(tmp_path / "clip", True)
    (tmp_path / "clip" / "open_clip_model.safetensors").unlink()
    with pytest.raises(JudgeError, match="lacks open_clip_model.safetensors"):
        load_clip(str(tmp_path / "clip"))
