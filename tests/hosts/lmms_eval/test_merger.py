"""The embedded model with a merger under the real host, by both model classes that read it."""

from __future__ import annotations

import lmms
import pytest

pytest.importorskip("lmms_eval")
pytest.importorskip("qwen_vl_utils")

from vtp_plugin.errors import PruningError

QWEN = "pretrained=vtp-tiny-qwen,device=cpu"
TOKENS = 64


@pytest.mark.parametrize(("host", "judge"), [("qwen2_vl", "after"), ("huggingface", "before")])
def test_its_pictures_are_enlarged_and_pruned(host: str, judge: str) -> None:
    arguments = f"{QWEN},pruning=vtp,pruning.keep_ratio=0.25,pruning.judge={judge}"
    results = lmms.evaluate(host, arguments, "vtp_scenes_attribute", limit=4)
    assert results["pruning"]["model"]["family"] == "qwen2_vl"
    assert results["pruning"]["samples"] == {"total": 4, "with_images": 4, "pruned": 4}
    for line in lmms.lines(results, "vtp_scenes_attribute"):
        assert line["pruning"]["images"] == [{"before": TOKENS, "after": TOKENS // 4}]


def test_it_answers_without_pruning() -> None:
    results = lmms.evaluate("qwen2_vl", QWEN, "vtp_scenes_attribute,vtp_scenes_digit", limit=8)
    for task in ("attribute", "digit"):
        assert results["results"][f"vtp_scenes_{task}"]["exact_match,none"] > 0.7


def test_another_size_is_the_users() -> None:
    arguments = f"{QWEN},pruning=stride,pruning.keep_ratio=0.5,min_pixels=3136,max_pixels=28224"
    results = lmms.evaluate("qwen2_vl", arguments, "vtp_scenes_digit", limit=1)
    (line,) = lmms.lines(results, "vtp_scenes_digit")
    assert line["pruning"]["images"] == [{"before": 36, "after": 18}]


def test_another_model_class_is_refused() -> None:
    with pytest.raises(PruningError, match=r"unknown model for vtp-tiny-qwen 'llava_hf'.*qwen2_vl"):
        lmms.evaluate("llava_hf", f"{QWEN},pruning=vtp", "vtp_scenes_digit", limit=1)
