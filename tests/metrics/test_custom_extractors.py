"""Extractors of a user's own: named after their module and its hash, and one sentence for each that cannot be used."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tasks.metrics.extractors.extractor import ExtractorError, extract_features
from tasks.metrics.extractors.files import ExtractorFiles
from tasks.metrics.extractors.loading import identify_extractors, load_extractors

CUSTOM = """
import numpy as np
import torch

class Mean(torch.nn.Module):
    name = "FVD"
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor({scale}))
    def features(self, pixels, caption):
        return self.scale * torch.from_numpy(pixels).float().mean((1, 2))

def make(device):
    return Mean()

def nameless(device):
    return object()

def broken(device):
    raise OSError("no weights")
"""


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "lab_extractor.py"
    path.write_text(CUSTOM.format(scale=1.0))
    yield path
    sys.modules.pop("lab_extractor", None)


def test_a_custom_extractor_is_named_after_its_module_and_hash_and_never_as_published(custom: Path):
    *_, extractor = load_extractors(ExtractorFiles(custom="lab_extractor:make"))
    assert extractor.info.metric == f"cfd-lab_extractor.fvd@{extractor.info.sha256[:8]}" and not extractor.info.official
    found = extract_features(extractor, "clip", np.full((4, 8, 8, 3), 7, np.uint8), "")["custom"]
    np.testing.assert_array_equal(found, np.full((4, 3), 7, np.float32))
    sys.modules.pop("lab_extractor")
    custom.write_text(CUSTOM.format(scale=2.5))
    assert identify_extractors(ExtractorFiles(custom="lab_extractor:make"))[-1].id != extractor.info.id


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("lab_extractor", "expected package.module:factory"),
        ("no_such_module:make", "cannot be made .*No module named"),
        ("lab_extractor:broken", "cannot be made .*no weights"),
        ("lab_extractor:nameless", "has the name None"),
    ],
)
def test_a_custom_extractor_that_cannot_be_used_is_one_sentence(custom: Path, address: str, message: str):
    with pytest.raises(ExtractorError, match=message) as caught:
        load_extractors(ExtractorFiles(custom=address))
    assert "\n" not in str(caught.value)
