"""InternVL, saved either way, and Gemma 3 inside vLLM keep what the transformers path keeps, and say what it says."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import Request, ask, columns, engine, events, reference
from families import IMAGE
from served import alike, expected, folder_of, named, requests, served, settings_of, write

from vtp_plugin.adapters.internvl_chat import InternVLChat
from vtp_plugin.hosts.vllm import Refused
from vtp_plugin.surgery.pixels import Pixels

CARTON = {"internvl": "<IMG_CONTEXT>", "internvl_chat": "<image>\n", "gemma3": "<start_of_image>"}
CROPS = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 32, "pan_and_scan_max_num_crops": 3}
ONE_WAY = ("token_type_ids",)  # left out: vLLM's attention on a CPU sees the tokens of a picture one way
SERVED = served({"text", "aligned", "film"})
# Few picks: near the end of a greedy search two distances are the same up to the rounding of two hosts.
SEVERAL = {"strategy": "divprune+visionzip", "divprune.keep_ratio": 0.3, "visionzip.keep_tokens": 10}
EARLY = [
    {"strategy": "pixelprune", "threshold": 0.1},
    {"strategy": "vprune+fastervlm", "vprune.chi2_threshold": 40.0, "vprune.cosine_threshold": 0.7}
    | {"fastervlm.keep_ratio": 0.5},
    {"strategy": "l2", "keep_ratio": 0.4, "center": True},
    {"strategy": "divprune", "judge": "before", "keep_ratio": 0.25},
]
CASES = [
    *(("internvl", settings_of(name) | {"positions": "compact"}) for name in SERVED),
    *(("gemma3", settings_of(name)) for name in ("random", "fastervlm", "pooling")),
    ("internvl_chat_6b", settings_of("visionzip")),
    *((family, settings) for family in CARTON for settings in (SEVERAL, *EARLY)),
]


def wanted(family: str, settings: dict[str, Any], asked: list[Request]) -> list[dict[str, Any]]:
    return expected(folder_of(family), settings, asked, wording(family), ONE_WAY)


def wording(family: str) -> Callable[[Request], str]:
    return partial(write, picture=CARTON[family.removesuffix("_6b")])


def started(family: str, settings: dict[str, Any], **arguments: Any) -> Any:
    """An engine of a family; an InternVL in its authors' layout brings the class of its configuration."""
    return engine(settings, folder_of(family), trust_remote_code="chat" in family, **arguments)


@pytest.mark.parametrize(("family", "settings"), CASES, ids=named)
def test_kept_tokens_and_answers_equal_those_of_transformers(family: str, settings: dict[str, Any]):
    asked = requests()
    said = wanted(family, settings, asked)
    with started(family, settings) as llm:
        outputs = [ask(llm, [request], wording(family))[0] for request in asked]
        found = [index.tolist() for event in events(llm) for index in event.kept]
    assert found == [index for want in said for index in want["kept"]]
    left = [sum(map(len, want["kept"][-len(request[0]) :])) for request, want in zip(asked, said, strict=True)]
    assert columns(outputs, IMAGE) == left
    alike(outputs, said)


@pytest.mark.parametrize("settings", [EARLY[0], settings_of("fastervlm")], ids=named)
def test_a_crop_of_pan_and_scan_is_a_picture_of_its_own(settings: dict[str, Any]):
    asked, ask_for = requests(), wording("gemma3")
    said = expected(folder_of("gemma3"), settings, asked, ask_for, ONE_WAY, **CROPS)
    with started("gemma3", settings, max_model_len=1000, mm_processor_kwargs=CROPS) as llm:
        outputs = ask(llm, asked, ask_for)
    assert max(len(want["kept"]) for want in said) > 2
    assert columns(outputs, IMAGE) == [sum(map(len, want["kept"])) for want in said]
    alike(outputs, said)


@pytest.mark.parametrize("family", CARTON)
def test_together_with_caches_requests_answer_as_alone_and_everything_as_unpruned(family: str):
    asked = requests()
    for settings in (EARLY[0], settings_of("visionzip"), {"strategy": "stride", "keep_ratio": 1.0}):
        with started(family, settings, enable_prefix_caching=True, block_size=32) as llm:
            together = ask(llm, asked, wording(family))
            assert events(llm)
            again = ask(llm, asked, wording(family))
            assert events(llm) == []
        unpruned = settings.get("keep_ratio") == 1.0
        said = wanted(family, {"strategy": "none"} if unpruned else settings, asked)
        alike(together, said)
        alike(again, said)


COUNTED = [("internvl", {}), ("internvl_chat", {"max_dynamic_patch": 2}), ("gemma3", {}), ("gemma3", CROPS)]


@pytest.mark.parametrize(("family", "arguments"), COUNTED, ids=named)
def test_the_record_counts_what_each_picture_would_have_had(family: str, arguments: dict[str, Any]):
    from vtp_plugin.hosts.lmms_eval.served import Requests

    asked, ask_for, processor = requests(), wording(family), reference(folder_of(family))[1]
    given = {"mm_processor_kwargs": arguments} if arguments else {}
    with started(family, settings_of("stride"), max_model_len=1000, **given) as llm:
        counted = Requests(SimpleNamespace(client=llm, generate_until=lambda requests: None))
        left = columns(ask(llm, asked, ask_for), IMAGE)
        counted.detach()
    whole = [processor(images=list(r[0]), text=ask_for(r), **arguments)["input_ids"][0].count(IMAGE) for r in asked]
    for side, totals in (("before", whole), ("after", left)):
        assert [sum(image[side] for image in sample["images"]) for sample in counted.samples] == totals
    assert sum(left) < sum(whole)


REFUSED = [
    ("internvl", {"strategy": "downsample"}, "downsample: new patches have no place in the vision tower of InternVL"),
    ("internvl", {"strategy": "l2", "keep_tokens": 20}, "l2: at the vit stage keep_tokens counts per tile here"),
    ("internvl", {"strategy": "atp"}, "atp: InternVL (transformers) has no aligned"),
    ("internvl", {"strategy": "stride", "positions": "original"}, "stride: vLLM counts positions by columns"),
    ("internvl_chat", {"strategy": "fastv"}, "fastv: vLLM fixes its attention metadata"),
    ("internvl_chat", {"strategy": "downsample"}, "downsample: new patches have no place in the vision tower of"),
    ("internvl_chat", {"strategy": "l2", "keep_tokens": 20}, "l2: at the vit stage keep_tokens counts per tile here"),
    ("internvl_chat", {"strategy": "cdpruner"}, "cdpruner: InternVL (its own code) has no aligned"),
    ("gemma3", {"strategy": "prumerge", "keep_ratio": 0.5}, "prumerge: Gemma 3 has no"),
    ("gemma3", {"strategy": "fastv"}, "fastv: vLLM fixes its attention metadata"),
]


@pytest.mark.parametrize(("family", "settings", "sentence"), REFUSED, ids=named)
def test_what_cannot_be_served_is_refused_in_one_sentence(family: str, settings: dict[str, Any], sentence: str):
    with pytest.raises(Refused) as refusal, started(family, settings):
        pass
    assert str(refusal.value).startswith(f"vtp_pruning: {sentence}")
    assert "\n" not in str(refusal.value)


NEARLY = [({"select_layer": -4}, "select_layer=-4"), ({"ps_version": "v1"}, "ps_version='v1'")]


@pytest.mark.parametrize(("facts", "said"), NEARLY, ids=named)
def test_a_checkpoint_that_arranges_its_tokens_otherwise_is_refused(facts: dict[str, Any], said: str):
    overrides = {"vtp_pruning": settings_of("stride"), **facts}
    with pytest.raises(Refused) as refusal, started("internvl_chat", {}, hf_overrides=overrides):
        pass
    sentence = f"this model is nearly {InternVLChat.models}, but its configuration has {said}, only "
    assert str(refusal.value).startswith(f"vtp_pruning: {sentence}")
    assert "\n" not in str(refusal.value)


def test_under_the_deviation_of_imagenet_bf16_tells_all_levels_apart():
    """So nothing of what vLLM's processor makes has to be remembered."""
    from vtp_plugin.hosts.vllm.families.internvl_chat import IMAGENET

    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    mean, std = torch.tensor([IMAGENET.image_mean, IMAGENET.image_std]).view(2, 3, 1, 1)
    assert torch.equal(Pixels.of(IMAGENET).images(((levels / 255 - mean) / std).bfloat16()), levels)
