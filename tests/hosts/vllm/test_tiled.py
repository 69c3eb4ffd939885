"""InternVL and Gemma 3 inside vLLM keep what the transformers path keeps, and say what it says."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from engines import Request, ask, columns, engine, events, reference
from families import IMAGE
from served import alike, expected, folder_of, named, requests, served, settings_of, write

from vtp_plugin.hosts.vllm import Refused

CARTON = {"internvl": "<IMG_CONTEXT>", "gemma3": "<start_of_image>"}
CROPS = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 32, "pan_and_scan_max_num_crops": 3}
ONE_WAY = ("token_type_ids",)  # left out: vLLM's attention on a CPU sees the tokens of a picture one way
SERVED = served({"text", "aligned", "film"})
SEVERAL = {"strategy": "divprune+visionzip", "divprune.keep_ratio": 0.6, "visionzip.keep_tokens": 20}
EARLY = [
    {"strategy": "pixelprune", "threshold": 0.1},
    {"strategy": "vprune+fastervlm", "vprune.chi2_threshold": 40.0, "vprune.cosine_threshold": 0.7}
    | {"fastervlm.keep_ratio": 0.5},
    {"strategy": "l2", "keep_ratio": 0.4, "center": True},
    {"strategy": "divprune", "judge": "before", "keep_ratio": 0.4},
]
CASES = [
    *(("internvl", settings_of(name) | {"positions": "compact"}) for name in SERVED),
    *(("gemma3", settings_of(name)) for name in ("random", "fastervlm", "pooling")),
    *((family, settings) for family in CARTON for settings in (SEVERAL, *EARLY)),
]


def wanted(family: str, settings: dict[str, Any], asked: list[Request]) -> list[dict[str, Any]]:
    return expected(folder_of(family), settings, asked, partial(write, picture=CARTON[family]), ONE_WAY)


@pytest.mark.parametrize(("family", "settings"), CASES, ids=named)
def test_kept_tokens_and_answers_equal_those_of_transformers(family: str, settings: dict[str, Any]):
    asked = requests()
    said = wanted(family, settings, asked)
    with engine(settings, folder_of(family)) as llm:
        outputs = [ask(llm, [request], partial(write, picture=CARTON[family]))[0] for request in asked]
        found = [index.tolist() for event in events(llm) for index in event.kept]
    assert found == [index for want in said for index in want["kept"]]
    left = [sum(map(len, want["kept"][-len(request[0]) :])) for request, want in zip(asked, said, strict=True)]
    assert columns(outputs, IMAGE) == left
    alike(outputs, said)


@pytest.mark.parametrize("settings", [EARLY[0], settings_of("fastervlm")], ids=named)
def test_a_crop_of_pan_and_scan_is_a_picture_of_its_own(settings: dict[str, Any]):
    asked, ask_for = requests(), partial(write, picture=CARTON["gemma3"])
    said = expected(folder_of("gemma3"), settings, asked, ask_for, ONE_WAY, **CROPS)
    with engine(settings, folder_of("gemma3"), max_model_len=1000, mm_processor_kwargs=CROPS) as llm:
        outputs = ask(llm, asked, ask_for)
    assert max(len(want["kept"]) for want in said) > 2
    assert columns(outputs, IMAGE) == [sum(map(len, want["kept"])) for want in said]
    alike(outputs, said)


@pytest.mark.parametrize("family", CARTON)
def test_together_with_caches_requests_answer_as_alone_and_everything_as_unpruned(family: str):
    asked = requests()
    for settings in (EARLY[0], settings_of("visionzip"), {"strategy": "stride", "keep_ratio": 1.0}):
        with engine(settings, folder_of(family), enable_prefix_caching=True, block_size=32) as llm:
            together = ask(llm, asked, partial(write, picture=CARTON[family]))
            assert events(llm)
            again = ask(llm, asked, partial(write, picture=CARTON[family]))
            assert events(llm) == []
        unpruned = settings.get("keep_ratio") == 1.0
        said = wanted(family, {"strategy": "none"} if unpruned else settings, asked)
        alike(together, said)
        alike(again, said)


@pytest.mark.parametrize(("family", "arguments"), [("internvl", {}), ("gemma3", {}), ("gemma3", CROPS)], ids=named)
def test_the_record_counts_what_each_picture_would_have_had(family: str, arguments: dict[str, Any]):
    from vtp_plugin.hosts.lmms_eval.served import Requests

    asked, folder = requests(), folder_of(family)
    ask_for, processor = partial(write, picture=CARTON[family]), reference(folder)[1]
    given = {"mm_processor_kwargs": arguments} if arguments else {}
    with engine(settings_of("stride"), folder, max_model_len=1000, **given) as llm:
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
    ("gemma3", {"strategy": "prumerge", "keep_ratio": 0.5}, "prumerge: Gemma 3 has no"),
    ("gemma3", {"strategy": "fastv"}, "fastv: vLLM fixes its attention metadata"),
]


@pytest.mark.parametrize(("family", "settings", "sentence"), REFUSED, ids=named)
def test_what_cannot_be_served_is_refused_in_one_sentence(family: str, settings: dict[str, Any], sentence: str):
    with pytest.raises(Refused) as refusal, engine(settings, folder_of(family)):
        pass
    assert str(refusal.value).startswith(f"vtp_pruning: {sentence}")
    assert "\n" not in str(refusal.value)
