"""LLaVA-1.5 inside vLLM keeps what the transformers path keeps and says what it says: same weights, fp32."""

from __future__ import annotations

from typing import Any

import pytest
from engines import (
    ANSWER,
    WHOLE,
    Request,
    answers,
    ask,
    columns,
    engine,
    events,
    expected,
    one_each,
    prompt,
    reference,
    scenes,
)

from vtp_plugin import get_strategy, list_strategies
from vtp_plugin.stages import Stage
from vtp_plugin.strategies.unpad import COLORS

LOOSE = {  # what has no budget
    "vprune": {"chi2_threshold": 30, "cosine_threshold": 0.9},
    "pixelprune": {"threshold": 0.2, "distance": "mae"},
    "unpad": {},
}


DEPTH = {"hiprune": {"shallow": 2}, "vscan": {"shallow": 2}}  # the embedded tower has six blocks
ELSEWHERE = {"mmtok", "evs", "vidcom2", "flashvid"}  # refused: embeddings of words, frames (test_refusals)


def settings_of(name: str, keep: float) -> dict[str, Any]:
    """A configuration of that strategy that vLLM can serve, positions as vLLM counts them."""
    strategy = get_strategy(name)
    at = {"at": "projector"} if strategy().stage is Stage.LLM else {}
    budget = {"keep_ratio": keep} if "keep_ratio" in strategy.fields() else LOOSE[name]
    return {"strategy": name, "positions": "compact", **budget, **at, **DEPTH.get(name, {})}


def padded(requests: list[Request]) -> list[Request]:
    """The upper quarter of every picture in the colour that LLaVA pads with."""
    found = []
    for (picture,), question in requests:
        picture = picture.convert("RGB")
        picture.paste(COLORS["clip"], (0, 0, picture.width, picture.height // 4))
        found.append(([picture], question))
    return found


def servable(name: str) -> bool:
    if name in ELSEWHERE:
        return False
    strategy = get_strategy(name)
    early = strategy().stage is not Stage.LLM or "projector" in getattr(strategy, "places", ())
    return early and not strategy().cut_blocks(6)


SERVED = [name for name in list_strategies() if servable(name)]


def test_the_catalogue_is_served_but_for_what_works_inside_blocks_and_between_layers():
    refused = {name: get_strategy(name)() for name in set(list_strategies()) - set(SERVED) - ELSEWHERE}
    assert {"fastv", "pyramiddrop", "sparsevlm", "tome"} <= set(refused)
    assert all(strategy.stage in (Stage.LLM, Stage.VIT) for strategy in refused.values())
    assert len(SERVED) > len(refused)


@pytest.mark.parametrize("name", SERVED)
def test_kept_indices_and_answers_equal_those_of_transformers(name: str):
    settings, requests = settings_of(name, 0.25), padded(one_each()) if name == "unpad" else one_each()
    said, kept = expected(settings, requests)
    with engine(settings) as llm:
        found = []
        for number, request in enumerate(requests):
            outputs = ask(llm, [request])
            assert answers(outputs) == [said[number]]
            found.append([index.tolist() for event in events(llm) for index in event.kept])
            assert columns(outputs) == [len(found[-1][-1])]
            assert columns(outputs)[0] < WHOLE
    assert found == kept


@pytest.mark.parametrize(
    "settings", [{"strategy": "visionzip", "keep_ratio": 1.0}, {"strategy": "l2", "keep_ratio": 1}]
)
def test_a_budget_of_everything_answers_like_the_unpruned_model(settings: dict[str, Any]):
    requests = one_each()
    model, processor = reference()
    said, _ = expected(settings, requests)
    with engine(settings) as llm:
        outputs = ask(llm, requests)
    assert columns(outputs) == [WHOLE] * len(requests)
    assert answers(outputs) == said
    inputs = processor(images=requests[0][0], text=prompt(requests[0]), return_tensors="pt")
    plain = model.generate(**inputs, do_sample=False, max_new_tokens=ANSWER)[0, inputs["input_ids"].shape[1] :]
    assert plain.tolist()[: len(said[0])] == said[0]


def test_strategies_compose():
    settings = {"strategy": "vprune+l2+visionzip", **{f"vprune.{k}": v for k, v in LOOSE["vprune"].items()}}
    settings |= {"l2.keep_ratio": 0.7, "visionzip.keep_ratio": 0.5}
    requests = one_each()
    said, kept = expected(settings, requests)
    with engine(settings) as llm:
        outputs = [ask(llm, [request])[0] for request in requests]
        found = [event.kept[0].tolist() for event in events(llm)]
    assert answers(outputs) == said
    assert found == [index for request in kept for index in request]
    assert len(set(columns(outputs))) > 1  # V-PRUNE leaves every image another number


CACHED = [
    {"strategy": "visionzip", "keep_ratio": 0.25},
    {"strategy": "atp", "keep_ratio": 0.25, "alpha": 0.9},
    {"strategy": "vprune", **LOOSE["vprune"]},
]


@pytest.mark.parametrize("settings", CACHED, ids=lambda settings: settings["strategy"])
@pytest.mark.parametrize("chunk", [None, 64], ids=["whole", "chunked"])
def test_together_with_caches_and_chunks_requests_answer_as_alone(settings: dict[str, Any], chunk: int | None):
    """One image and two questions, two images and one question, two images in one prompt; everything asked twice."""
    (first, one), (second, two) = scenes(2)
    requests = [([first], one[0]), ([first], one[2]), ([second], one[0]), ([first, second], two[0]), ([second], two[1])]
    said, _ = expected(settings, requests)
    limits = {"max_num_batched_tokens": chunk, "enable_chunked_prefill": True} if chunk else {}
    with engine(settings, enable_prefix_caching=True, block_size=32, **limits) as llm:
        together = ask(llm, requests)
        cuts = len(events(llm))
        again = ask(llm, requests)
        if not chunk:  # whose encoder cache is small, too
            assert events(llm) == []  # answered from the encoder cache and the prefix cache
    assert answers(together) == said
    assert answers(again) == said
    assert any(output.num_cached_tokens for output in again)
    assert cuts >= 1


def test_two_questions_about_one_image_keep_different_tokens():
    settings = {"strategy": "atp", "keep_ratio": 0.25, "alpha": 1.0}
    picture, questions = scenes(1)[0]
    requests = [([picture], question) for question in (questions[0], questions[2])]
    _, kept = expected(settings, requests)
    assert kept[0] != kept[1]
    with engine(settings) as llm:
        found = []
        for request in requests:
            ask(llm, [request])
            found.append([index.tolist() for event in events(llm) for index in event.kept])
        ask(llm, requests[:1])  # cached: not judged again
        assert events(llm) == []
    assert found == kept


def test_a_given_question_stands_in_for_the_prompt():
    settings = {"strategy": "atp", "keep_ratio": 0.25, "alpha": 1.0}
    picture, questions = scenes(1)[0]
    _, kept = expected(settings, [([picture], questions[2])])
    with engine(settings) as llm:
        ask(llm, [([picture], questions[0])], mm_processor_kwargs={"vtp_question": questions[2]})
        assert [index.tolist() for event in events(llm) for index in event.kept] == kept[0]


def test_a_question_of_the_same_image_reuses_its_tokens_where_the_strategy_does_not_read_it():
    picture, questions = scenes(1)[0]
    with engine({"strategy": "visionzip", "keep_ratio": 0.25}) as llm:
        ask(llm, [([picture], questions[0])])
        assert len(events(llm)) == 1
        ask(llm, [([picture], questions[1])])
        assert events(llm) == []


def test_without_a_configuration_the_plugin_leaves_no_trace():
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration

    requests = one_each()
    with engine(None) as llm:
        outputs = ask(llm, requests)
        assert llm.apply_model(type) == [LlavaForConditionalGeneration]
    assert columns(outputs) == [WHOLE] * len(requests)
    said, _ = expected({"strategy": "none"}, requests)
    assert answers(outputs) == said
