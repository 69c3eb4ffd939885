"""The Qwen-VLs inside vLLM keep what the transformers path keeps, where it does, and say what it says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engines import ANSWER, LEAVES_MEMORY, ask, columns, engine, events, reference
from families import IMAGE
from served import (
    CLOSE,
    QWEN,
    UNIT,
    alike,
    expected,
    folder_of,
    named,
    positions_of,
    requests,
    rows_of,
    served,
    settings_of,
    write,
)

from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.vllm import Refused
from vtp_plugin.hosts.vllm.plan import SMALL, Plan, strategies_of
from vtp_plugin.hosts.vllm.plan import kept as kept_of
from vtp_plugin.hosts.vllm.serving import serving

ABSENT = {"text", "aligned", "class_query", "film"}  # signals that only towers of CLIP have, and those of videos
FRAMES = {"fps": 2.0, "duration": 1.0, "total_num_frames": 2, "frames_indices": [0, 1], "video_backend": "opencv"}
VIDEO_FRAMES = [(np.zeros((2, 16, 16, 3), np.uint8), FRAMES)]


@pytest.fixture(scope="module")
def folder() -> Path:
    return folder_of("qwen2_5_vl")


# -- the same ----------------------------------------------------------------------------------------------------------

SERVED = served(ABSENT)
SETTINGS = [
    *map(settings_of, SERVED),
    # few picks: near the end of a greedy search two distances are the same up to the rounding of two hosts
    {"strategy": "divprune+visionzip", "divprune.keep_ratio": 0.3, "visionzip.keep_tokens": 20},
    {"strategy": "visionzip", "keep_ratio": 0.25, "positions": "compact"},
]
RANDOM = settings_of("random")
CASES = [
    *(("qwen2_5_vl", settings) for settings in SETTINGS),
    *((family, settings) for family in QWEN if family != "qwen2_5_vl" for settings in (RANDOM, *SETTINGS[-2:])),
]


def test_the_catalogue_of_the_projector_stage_is_served():
    assert {"divprune", "fastervlm", "random", "scope", "stride", "visionzip", "vispruner"} <= set(SERVED)


@pytest.mark.parametrize(("family", "settings"), CASES, ids=named)
def test_kept_tokens_positions_and_answers_equal_those_of_transformers(family: str, settings: dict[str, Any]):
    asked, folder = requests(), folder_of(family)
    wanted = expected(folder, settings, asked)
    with engine(settings, folder) as llm:
        for request, want in zip(asked, wanted, strict=True):
            with positions_of(llm) as seen:
                outputs = ask(llm, [request], write)
            assert [index.tolist() for event in events(llm) for index in event.kept] == want["kept"]
            assert torch.equal(torch.cat(seen, dim=1), want["positions"])
            assert columns(outputs, IMAGE) == [sum(map(len, want["kept"][-len(request[0]) :]))]
            alike(outputs, [want])


def test_answers_depend_on_what_is_kept_and_where(folder: Path):
    """Otherwise the comparisons would say little."""
    asked = requests()
    settings = [{"strategy": "none"}, SETTINGS[-1], SETTINGS[-1] | {"positions": "original"}]
    whole, compact, original = (expected(folder, each, asked) for each in settings)
    for one, other in ((whole, compact), (whole, original), (compact, original)):
        first = [abs(a["logprobs"][0] - b["logprobs"][0]) for a, b in zip(one, other, strict=True)]
        assert min(first) > 10 * CLOSE


EARLY = [
    ("qwen2_vl", {"strategy": "pixelprune", "threshold": 0.1}),
    ("qwen2_vl", {"strategy": "l2", "keep_ratio": 0.4}),
    ("qwen2_5_vl", {"strategy": "vprune", "chi2_threshold": 40.0, "cosine_threshold": 0.7}),
    ("qwen2_5_vl", {"strategy": "l2", "keep_ratio": 0.4, "center": True}),
    ("qwen2_5_vl", {"strategy": "pixelprune+visionzip", "pixelprune.threshold": 0.1, "visionzip.keep_ratio": 0.5}),
    ("qwen2_5_vl", {"strategy": "l2", "at": "projector", "judge": "before", "keep_ratio": 0.4}),
    ("qwen3_vl", {"strategy": "pixelprune", "threshold": 0.1, "positions": "compact"}),
    ("qwen3_vl", {"strategy": "l2+fastervlm", "l2.keep_ratio": 0.6, "fastervlm.keep_ratio": 0.5}),
    ("qwen3_vl_moe", {"strategy": "vprune", "chi2_threshold": 40.0, "cosine_threshold": 0.7}),
]


@pytest.mark.parametrize(("family", "settings"), EARLY, ids=named)
def test_what_is_dropped_before_the_tower_never_enters_it(family: str, settings: dict[str, Any]):
    asked, folder = requests(), folder_of(family)
    wanted = expected(folder, settings, asked)
    with engine(settings, folder) as llm, rows_of(llm) as entered:
        outputs = [ask(llm, [request], write)[0] for request in asked]
        found = [index.tolist() for event in events(llm) for index in event.kept]
    assert found == [index for want in wanted for index in want["kept"]]
    early = settings.get("at") != "projector"
    before = [len(pictures) for pictures, _ in asked]
    firsts = [first for want, n in zip(wanted, before, strict=True) for first in want["kept"][:n]]
    sizes = [picture.size for pictures, _ in asked for picture in pictures]
    whole = [width // UNIT * (height // UNIT) for width, height in sizes]
    assert sum(entered) == 4 * sum(map(len, firsts) if early else whole)
    assert sum(map(len, firsts)) < sum(whole)
    alike(outputs, wanted)


def test_pixels_are_known_where_the_processor_normalises_them():
    """By default vLLM leaves that to the tower, and the processor answers with grey levels."""
    (family, settings), asked = EARLY[0], requests()
    with engine(settings, folder_of(family), mm_device_do_normalize=False) as llm:
        alike(ask(llm, asked, write), expected(folder_of(family), settings, asked))


@pytest.mark.parametrize("family", QWEN)
def test_a_budget_of_everything_answers_like_the_unpruned_model(family: str):
    asked, folder = requests(), folder_of(family)
    with engine({"strategy": "visionzip", "keep_ratio": 1.0}, folder) as llm, positions_of(llm) as seen:
        outputs = ask(llm, asked, write)
    wanted = expected(folder, {"strategy": "none"}, asked)
    alike(outputs, wanted)
    assert sum(table.shape[1] for table in seen) == sum(want["positions"].shape[1] for want in wanted)


CACHED = [
    ("qwen2_5_vl", settings_of("fastervlm")),
    ("qwen2_5_vl", settings_of("pooling", 0.6)),
    ("qwen3_vl", settings_of("visionzip", 0.6)),
    ("qwen2_vl", EARLY[0][1]),
]


@pytest.mark.parametrize(("family", "settings"), CACHED, ids=named)
@pytest.mark.parametrize("chunk", [None, 48], ids=["whole", "chunked"])
def test_together_with_caches_and_chunks_requests_answer_as_alone(
    family: str, settings: dict[str, Any], chunk: int | None
):
    """One picture and two questions, two pictures in one prompt, in both orders; everything asked twice."""
    (first, one), (second, two), (third, three), ((fourth, fifth), four) = [
        (images[0] if len(images) == 1 else images, question) for images, question in requests()
    ]
    asked = [([first], one), ([first], two), ([second, first], three), ([fourth, fifth], four), ([fifth, third], one)]
    folder = folder_of(family)
    wanted = expected(folder, settings, asked)
    limits = {"max_num_batched_tokens": chunk, "enable_chunked_prefill": True} if chunk else {}
    with engine(settings, folder, enable_prefix_caching=True, block_size=32, **limits) as llm:
        together = ask(llm, asked, write)
        assert events(llm)
        again = ask(llm, asked, write)
        if not chunk:  # whose encoder cache is small
            assert events(llm) == []
    alike(together, wanted)
    alike(again, wanted)
    assert any(output.num_cached_tokens for output in again)


@LEAVES_MEMORY
def test_two_tensor_parallel_workers_decide_alike(folder: Path, tmp_path: Path):
    """Heads of the tower are spread over them, and attention is a mean over heads."""
    settings, asked = {"strategy": "visionzip", "keep_ratio": 0.25}, requests()[:3]
    options = ["--dtype", "float32", "--max-model-len", "640", "--enforce-eager", "--tensor-parallel-size", "2"]
    more = {"logprobs": True, "return_token_ids": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
        with serving(str(folder), settings, options, tmp_path / "log") as server:
            found = [server.ask(*request, ANSWER, **more)["choices"][0] for request in asked]
    for answer, want in zip(found, expected(folder, settings, asked), strict=True):
        assert answer["token_ids"] == want["ids"]
        assert [one["logprob"] for one in answer["logprobs"]["content"]] == pytest.approx(want["logprobs"], abs=CLOSE)


LARGE = (20, 17)  # merge units


@pytest.mark.parametrize("name", SERVED)
def test_the_number_of_tokens_of_any_size_follows_from_the_budget(name: str):
    """Large images are not made up to count what is left of them; here they are."""
    plan = Plan(strategies_of(settings_of(name, 0.3)), (4, 4), 14, 3, True).at(LARGE)
    assert plan.whole > SMALL
    assert plan.count(plan.whole) == kept_of(plan.strategies[0], plan.whole, LARGE)


def test_a_budget_that_is_not_kept_is_counted_from_noise():
    settings = settings_of("dart", 0.3) | {"pivots_extra": True}
    plan = Plan(strategies_of(settings), LARGE, 14, 3, True)
    assert plan.count(plan.whole) == kept_of(plan.strategies[0], plan.whole, LARGE) != plan.strategies[0].count(340)


def test_places_survive_half_precision():
    from vtp_plugin.hosts.vllm.qwen_tower import channels, places_of

    source = torch.tensor([0, 1, 299, 300, 700 * 300 + 299, -1])
    for dtype in (torch.bfloat16, torch.float16):
        rows, columns = places_of(channels(source, 300).to(dtype).long())
        assert (rows * 300 + columns).tolist() == source.clamp(min=0).tolist()


def test_without_a_configuration_the_plugin_leaves_no_trace(folder: Path):
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

    asked = requests()
    with engine(None, folder) as llm:
        assert llm.apply_model(type) == [Qwen2_5_VLForConditionalGeneration]
        alike(ask(llm, asked, write), expected(folder, {"strategy": "none"}, asked))


REFUSED = [
    ({"strategy": "downsample"}, "downsample: new patches have no place in the vision tower of Qwen2.5-VL"),
    ({"strategy": "fastv"}, "fastv: vLLM fixes its attention metadata"),
    ({"strategy": "atp"}, "atp: Qwen2.5-VL has no CLIP text encoder"),
    ({"strategy": "prumerge", "keep_ratio": 0.5}, "prumerge: Qwen2.5-VL has no CLIP text encoder and no class token"),
    ({"strategy": "mmtok"}, "mmtok: the language model's embeddings of a question are not possible inside vLLM"),
    ({"strategy": "divprune", "budget": "total"}, "divprune: budget=total is not possible inside vLLM"),
    (
        {"strategy": "divprune+stride", "divprune.positions": "original", "stride.positions": "compact"},
        "strategies that cut the same prompt share one numbering",
    ),
]


@pytest.mark.parametrize(("settings", "sentence"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_served_is_refused_in_one_sentence(folder: Path, settings: dict[str, Any], sentence: str):
    with pytest.raises(Refused) as refusal, engine(settings, folder):
        pass
    assert str(refusal.value).startswith(f"vtp_pruning: {sentence}")
    assert "\n" not in str(refusal.value)


def test_refused_requests_and_counts_of_the_record(folder: Path):
    from vtp_plugin.hosts.lmms_eval.served import Requests

    asked, processor = requests(), reference(folder)[1]
    with engine(CACHED[0][1], folder) as llm:
        with pytest.raises(PruningError, match="the prompt ends with a picture"):
            ask(llm, asked[:1], lambda request: "<|image_pad|>")
        with pytest.raises(PruningError, match="takes no videos inside vLLM"):
            llm.generate({"prompt": "<|video_pad|>", "multi_modal_data": {"video": VIDEO_FRAMES}}, use_tqdm=False)
        counted = Requests(SimpleNamespace(client=llm, generate_until=lambda requests: None))
        left = columns(ask(llm, asked, write), IMAGE)
        counted.detach()
    whole = [processor(images=list(r[0]), text=write(r))["input_ids"][0].count(IMAGE) for r in asked]
    for side, totals in (("before", whole), ("after", left)):
        assert [sum(image[side] for image in sample["images"]) for sample in counted.samples] == totals
