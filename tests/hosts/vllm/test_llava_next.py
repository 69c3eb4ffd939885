"""LLaVA-NeXT inside vLLM keeps what the transformers path keeps: the embedded model's weights, in tiles."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import IMAGE_TOKEN, Request, answers, ask, columns, engine, events, expected, prompt, reference, scenes
from PIL import Image

from vtp_plugin.hosts.vllm import Refused
from vtp_plugin.tiny.checkpoint import resolve

SIDE = 168
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
SETTINGS = [
    {"strategy": "visionzip", "keep_ratio": 0.25},
    {"strategy": "divprune", "keep_ratio": 0.1},
    {"strategy": "atp", "keep_ratio": 0.25},
    {"strategy": "fastervlm", "keep_tokens": 40},
    {"strategy": "divprune+vispruner", "divprune.keep_ratio": 0.5, "vispruner.keep_ratio": 0.5},
    {"strategy": "visionzip", "keep_ratio": 1.0},
]
ROOM = {"max_model_len": 1600, "max_num_batched_tokens": 2048}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as a LLaVA-NeXT: more weights than a newline it does not need."""
    from safetensors.torch import load_file, save_file
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    source, target = resolve("vtp-tiny", "hf"), tmp_path_factory.mktemp("next") / "model"
    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    width = len(weights["multi_modal_projector.linear_2.bias"])
    newline = torch.randn(width, generator=torch.Generator().manual_seed(0)).to(torch.float16)
    save_file({**weights, "image_newline": newline}, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config |= {"architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next"}
    config |= {"image_grid_pinpoints": PINPOINTS}
    (target / "config.json").write_text(json.dumps(config))
    plain = reference()[1]
    images = LlavaNextImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=plain.image_processor.image_mean,
        image_std=plain.image_processor.image_std,
        image_grid_pinpoints=PINPOINTS,
    )
    given = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    for file in ("processor_config.json", "preprocessor_config.json"):
        (target / file).unlink(missing_ok=True)
    LlavaNextProcessor(images, plain.tokenizer, chat_template=plain.chat_template, **given).save_pretrained(target)
    return target


def requests() -> list[Request]:
    """Pictures of several shapes, so that tiles, padding and newlines differ; the last request has two."""
    (first, one), (second, two), (third, three) = scenes(3)
    wide, high = first.resize((300, 130)), second.resize((150, 320), Image.Resampling.BICUBIC)
    return [([wide], one[0]), ([high], two[1]), ([third], three[2]), ([wide, third], one[2])]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: f"{settings['strategy']}")
def test_kept_rows_and_answers_equal_those_of_transformers(folder: Path, settings: dict[str, Any]):
    asked = requests()
    said, kept = expected(settings, asked, folder)
    with engine(settings, folder, **ROOM) as llm:
        found = []
        for number, request in enumerate(asked[:3]):
            outputs = ask(llm, [request])
            assert answers(outputs) == [said[number]]
            found.append([index.tolist() for event in events(llm) for index in event.kept])
        again = ask(llm, asked)
    assert answers(again) == said
    assert found == kept[:3]
    assert len(set(columns(again))) > 1


def test_stages_before_the_projector_are_refused(folder: Path):
    with (
        pytest.raises(Refused, match="l2: of LLaVA-NeXT inside vLLM only the projector stage is served"),
        engine({"strategy": "l2"}, folder, **ROOM),
    ):
        pass


def test_the_record_counts_what_each_picture_would_have_had(folder: Path):
    pytest.importorskip("lmms_eval")
    from lmms_eval.models.simple.vllm import VLLM

    from vtp_plugin import config
    from vtp_plugin.hosts.lmms_eval.served import ServedRun

    asked, processor = requests(), reference(folder)[1]
    whole = [processor(images=list(r[0]), text=prompt(r))["input_ids"][0].count(IMAGE_TOKEN) for r in asked]
    with engine(SETTINGS[0], folder, **ROOM) as llm:
        lm = VLLM.__new__(VLLM)
        lm.client = llm
        run = ServedRun(lm, config.resolve("visionzip", {"keep_ratio": 0.25}))
        left = columns(ask(lm.client, asked))
        run.pruned.detach()
    assert [len(sample["images"]) for sample in run.pruned.samples] == [len(pictures) for pictures, _ in asked]
    for side, counts in (("before", whole), ("after", left)):
        assert [sum(image[side] for image in sample["images"]) for sample in run.pruned.samples] == counts
