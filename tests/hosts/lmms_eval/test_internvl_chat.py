"""The host's class for InternVL's own code, whose tiles and calls are the real ones, on a model made by the tests.

The class wants CUDA, so that the command line cannot run everywhere: its constructor alone is replaced.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import lmms
import pytest
import torch
from internvl_chat import InternVLChatModel, Words

pytest.importorskip("lmms_eval")
pytest.importorskip("decord")

SIDE = 448  # of a tile, in the host
TOKENS = 16  # of a tile, of patches of 56 pixels


def chat_model() -> InternVLChatModel:
    from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config
    from transformers.models.internvl import InternVLVisionConfig

    vision = InternVLVisionConfig(**families.VISION, patch_size=[56] * 2, image_size=[SIDE] * 2, attention_bias=True)
    text = Qwen2Config(**families.text(7, 1))
    torch.manual_seed(0)
    config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=families.IMAGE)
    source = InternVLForConditionalGeneration(config).eval()
    source.lm_head.weight.data[[families.IMAGE, families.VIDEO]] = 0
    source.generation_config.eos_token_id, source.generation_config.pad_token_id = None, families.PAD
    return InternVLChatModel(source.bfloat16())


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> type:
    from lmms_eval.api.model import lmms as base
    from lmms_eval.models.simple.internvl3 import InternVL3

    class OnThisMachine(InternVL3):
        def __init__(self, pretrained: str = "", **kwargs: Any) -> None:
            base.__init__(self)
            self._model, self._tokenizer, self._device = chat_model(), Words(), torch.device("cpu")
            self._rank, self._world_size, self.batch_size_per_gpu, self.modality = 0, 1, 1, "image"
            self.max_num = self.total_max_num = 4

        @property
        def model(self) -> Any:
            return self._model

    return OnThisMachine


@pytest.mark.parametrize(
    ("pruning", "left"),
    [("none", TOKENS), ("pruning=stride,pruning.keep_ratio=0.25", 4), ("pruning=l2,pruning.keep_ratio=0.5", 8)],
)
def test_pictures_in_tiles(
    pruning: str, left: int, host: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lmms.write_own_tasks(tmp_path / "tasks")
    monkeypatch.chdir(tmp_path)
    lm = host.create_from_arg_string(pruning if "=" in pruning else f"pruning={pruning}")
    options = {"task_manager": lmms.task_manager(own=True, include=str(tmp_path / "tasks")), "limit": 3}
    results = lmms.evaluate(lm, "", "pictures", **options, gen_kwargs="max_new_tokens=3")
    record = results["pruning"]
    assert record["model"]["family"] == "internvl_chat"
    assert record["samples"] == {"total": 3, "with_images": 3, "pruned": 0 if pruning == "none" else 3}
    for line in lmms.lines(results, "pictures"):
        images, sizes = line["pruning"]["images"], lmms.PICTURES[line["doc_id"]]
        assert len(images) == len(sizes)
        for image in images:
            tiles, more = divmod(image["before"], TOKENS)
            assert (more, image["after"]) == (0, tiles * left)
