"""Names, missing videos, results and scores of VBench-I2V, as its repository (commit 45e79ec) defines them."""

from __future__ import annotations

import json

import pytest

from tasks.evaluate.vbench import DIMENSIONS, final_scores, missing, names_of, prompt_of, read_result, result_table
from tasks.evaluation_record import EvaluatedItem
from tasks.records import UserError


def items(*captions: str) -> list[EvaluatedItem]:
    return [EvaluatedItem(f"k{n}", f"c{n}", caption) for n, caption in enumerate(captions)]


@pytest.mark.parametrize(
    ("caption", "name"),
    [
        # Two prompts of its suite, which must stay as they are.
        ("a close up of a blue and orange liquid, camera pans left", None),
        ("a squirrel sitting on the ground eating a piece of bread", None),
        ("a road / a river", "a road a river"),
        ("route-66", "route 66"),
        ("..", "k0"),
        ("x" * 300, "x" * 200),
        ("caf\u00e9 \u6d77", None),
    ],
)
def test_a_name_is_the_prompt_that_its_tool_reads_back(caption, name):
    (found,) = names_of(items(caption)).values()
    assert found == (name or caption)
    assert prompt_of(f"folder/{found}-3.mp4") == found


def test_items_with_one_caption_have_names_of_their_own():
    names = names_of(items("a dog", "a dog", "a cat"))
    assert list(names.values()) == ["a dog", "a dog (k1)", "a cat"]


def test_missing_videos_of_the_suite_are_counted_by_dimension():
    suite = [
        {"prompt_en": "a dog", "dimension": ["i2v_subject", "imaging_quality"], "image_name": "a dog.jpg"},
        {"prompt_en": "a cat", "dimension": ["i2v_subject"], "image_name": "a cat.jpg"},
    ]
    files = {f"a dog-{sample}.mp4" for sample in range(5)}
    assert missing(json.dumps(suite).encode(), files) == {"i2v_subject": 5, "imaging_quality": 0}
    with pytest.raises(UserError, match="full_info"):
        missing(b"{}[", set())


def result(values: dict[str, float]) -> bytes:
    content = {}
    for dimension, value in values.items():
        scale = 100 if dimension == "imaging_quality" else 1
        videos = [{"video_path": f"v/{n}-0.mp4", "video_results": value * scale} for n in "ab"]
        between = [{"pan_left": value}] if dimension == "camera_motion" else []
        content[dimension] = [value, *between, videos]
    return json.dumps(content).encode()


def test_scores_are_those_of_its_script():
    values = dict.fromkeys(DIMENSIONS, 0.9)
    row = read_result(result(values), "ours", {})
    # cal_i2v_final_score.py, by hand: (v - min) / (max - min) x weight, over the sum of weights of each half.
    of_image = (0.9 * 0.1 + (0.9 - 0.1462) / 0.8538 + (0.9 - 0.2615) / 0.7385) / 2.1
    quality = ((0.9 - 0.1462) / 0.8538 + (0.9 - 0.2615) / 0.7385 + (0.9 - 0.706) / 0.2915 + 0.45 + 0.9 + 0.9) / 5.5
    assert row.scores == pytest.approx({"I2V": of_image, "Quality": quality, "Total": (of_image + quality) / 2})
    assert row.clips == 2 and len(result_table([row]).rows) == len(DIMENSIONS) + 3
    assert final_scores({"vbench-i2v_subject": 1.0}) == {}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[]", "not a result of VBench-I2V"),
        (b"{}", "has no dimension"),
        (b'{"other": [1, []]}', "unknown dimension 'other'"),
        (b'{"i2v_subject": [0.5, []]}', "i2v_subject has no videos"),
        (b"x", "not a result of VBench-I2V"),
    ],
)
def test_another_file_is_refused(content, reason):
    with pytest.raises(UserError, match=reason):
        read_result(content, "ours", {})
