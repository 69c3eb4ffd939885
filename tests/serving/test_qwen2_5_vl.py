"""Qwen2.5-VL inside vLLM keeps what the transformers path keeps, at the same positions, and says what it says: fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import MEANS, VISION_MARKS, template, tokenizer
from engines import ANSWER, Request, answers, ask, columns, engine, events, logprobs, reference, scenes
from families import IMAGE, QWEN_VISION, TEXT, VIDEO
from PIL import Image

from vtp_plugin import get_strategy, list_strategies, prune
from vtp_plugin.errors import PruningError
from vtp_plugin.integrations.vllm import Refused

ROPE = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
LANGUAGE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": ROPE}
MARKS = {"vision_start_token_id": 185, "vision_end_token_id": 186, "image_token_id": IMAGE, "video_token_id": VIDEO}
UNIT = 8  # pixels per side of a merge unit
CLOSE = 2e-4  # log-probabilities, fp32 kernels of two hosts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint, loud enough that its answers depend on what it sees."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    vision = QWEN_VISION | {"hidden_size": 64, "intermediate_size": 48, "out_hidden_size": 64, "num_heads": 2}
    vision |= {"window_size": 2 * UNIT, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=TEXT | LANGUAGE, **MARKS)
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5 * (3 if "proj" in name else 1))
    patches = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    size = {"size": {"shortest_edge": 16 * UNIT**2, "longest_edge": 256 * UNIT**2}}
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**patches, **MEANS, **size),
        tokenizer(VISION_MARKS | {IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>"}),
        Qwen2VLVideoProcessor(**patches, **MEANS, **size),
        chat_template=template(mark, mark.replace("image", "video"), "<|im_start|>"),
    )
    target = tmp_path_factory.mktemp("qwen") / "model"
    model.save_pretrained(target)
    processor.save_pretrained(target)
    return target


def write(request: Request) -> str:
    images, question = request
    return "<|im_start|>" + "<|vision_start|><|image_pad|><|vision_end|>" * len(images) + question + "\nAnswer:"


def requests() -> list[Request]:
    """Pictures of three sizes; the last request has two of them."""
    (first, one), (second, two), (third, three) = scenes(3)
    wide, high, square = first.resize((144, 72)), second.resize((56, 112)), third.resize((88, 104))
    return [([wide], one[0]), ([high], two[1]), ([square], three[2]), ([high, wide], one[2])]


# -- transformers ------------------------------------------------------------------------------------------------------


def expected(folder: Path, settings: Mapping[str, Any], asked: Sequence[Request]) -> list[dict[str, Any]]:
    """Answer, its log-probabilities, kept indices, and positions of all tokens, per request."""
    model, processor = reference(folder)
    hyper = {name: value for name, value in settings.items() if name != "strategy"}
    found = []
    with prune(model, settings["strategy"], processor=processor, **hyper) as pruned:
        for request in asked:
            pruned.events.clear()
            inputs = processor(images=list(request[0]), text=write(request), return_tensors="pt")
            seen, hook = watched(model.model.language_model.rotary_emb, lambda args, kwargs: args[1])
            greedy = {"do_sample": False, "return_dict_in_generate": True, "output_scores": True}
            output = model.generate(**inputs, max_new_tokens=ANSWER, **greedy)
            hook.remove()
            ids = output.sequences[0, inputs["input_ids"].shape[1] :]
            scores = torch.stack(output.scores)[:, 0].log_softmax(-1).gather(1, ids[:, None])[:, 0]
            kept = [index.tolist() for event in pruned.events for index in event.kept]
            positions = torch.cat([table[:, 0] for table in seen], dim=1)
            found.append({"ids": ids.tolist(), "logprobs": scores.tolist(), "kept": kept, "positions": positions})
    return found


def watched(module: Any, take: Callable[[Any, Any], Any]) -> tuple[list[Any], Any]:
    """What a module is called with, in a list that fills."""
    seen: list[Any] = []
    hook = module.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(take(args, kwargs).clone()), with_kwargs=True
    )
    return seen, hook


@contextmanager
def positions_of(llm: Any) -> Iterator[list[Any]]:
    """What the decoder inside vLLM gets as positions, [3, L] per pass."""
    layer = llm.apply_model(lambda model: model.language_model.model.layers[0].self_attn)[0]
    seen, hook = watched(layer, lambda args, kwargs: kwargs["positions"])
    try:
        yield seen
    finally:
        hook.remove()


# -- the same ----------------------------------------------------------------------------------------------------------

SETTINGS = [
    {"strategy": "visionzip", "keep_ratio": 0.25},
    {"strategy": "random", "keep_ratio": 0.25},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings["strategy"])
def test_kept_tokens_positions_and_answers_equal_those_of_transformers(folder: Path, settings: dict[str, Any]):
    asked = requests()
    wanted = expected(folder, settings, asked)
    with engine(settings, folder) as llm:
        for request, want in zip(asked, wanted, strict=True):
            with positions_of(llm) as seen:
                outputs = ask(llm, [request], write)
            assert [index.tolist() for event in events(llm) for index in event.kept] == want["kept"]
            assert torch.equal(torch.cat(seen, dim=1), want["positions"])
            assert answers(outputs) == [want["ids"]]
            assert logprobs(outputs)[0] == pytest.approx(want["logprobs"], abs=CLOSE)
            assert columns(outputs, IMAGE) == [sum(map(len, want["kept"]))]
