"""Qwen2.5-VL and Qwen3-VL inside vLLM keep what the transformers path keeps, where it does, and say what it says."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import MEANS, VISION_MARKS, template, tokenizer
from engines import ANSWER, Request, answers, ask, columns, engine, events, logprobs, reference, scenes
from families import IMAGE, QWEN_VISION, TEXT, VIDEO

from vtp_plugin import get_strategy, list_strategies, prune
from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.vllm import Refused
from vtp_plugin.hosts.vllm.plan import SMALL, Plan, strategies_of
from vtp_plugin.hosts.vllm.plan import kept as kept_of
from vtp_plugin.hosts.vllm.serving import serving
from vtp_plugin.stages import Stage

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
AXES = {
    "qwen2_5_vl": {"mrope_section": [4, 6, 6]},
    "qwen3_vl": {"mrope_section": [6, 5, 5], "mrope_interleaved": True},
}
LANGUAGE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
MARKS = {"vision_start_token_id": 185, "vision_end_token_id": 186, "image_token_id": IMAGE, "video_token_id": VIDEO}
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
UNIT = 8  # pixels per side of a merge unit
OWN = {
    "qwen2_5_vl": {"window_size": 2 * UNIT, "fullatt_block_indexes": [1]},
    "qwen3_vl": {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
}
ABSENT = {"text", "aligned", "class_query", "film"}  # signals that only towers of CLIP have, and those of videos
FRAMES = {"fps": 2.0, "duration": 1.0, "total_num_frames": 2, "frames_indices": [0, 1], "video_backend": "opencv"}
VIDEO_FRAMES = [(np.zeros((2, 16, 16, 3), np.uint8), FRAMES)]
CLOSE = 2e-4  # log-probabilities, fp32 kernels of two hosts


@cache
def folder_of(family: str) -> Path:
    """A random checkpoint, loud enough that its answers depend on what it sees and where."""
    import transformers

    names = {"qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[family]
    vision = QWEN_VISION | {"hidden_size": 64, "intermediate_size": 48, "out_hidden_size": 64, "num_heads": 2}
    text = TEXT | LANGUAGE | {"rope_parameters": ROPE | AXES[family]}
    config = getattr(transformers, f"{names}Config")(vision_config=vision | OWN[family], text_config=text, **MARKS)
    torch.manual_seed(0)
    model = getattr(transformers, f"{names}ForConditionalGeneration")(config).eval()
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5 * (3 if "proj" in name else 1))
    patches = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    size = {"size": {"shortest_edge": 16 * UNIT**2, "longest_edge": 256 * UNIT**2}}
    processor = getattr(transformers, f"{names}Processor")(
        transformers.Qwen2VLImageProcessor(**patches, **MEANS, **size),
        tokenizer(VISION_MARKS | {IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>"}),
        getattr(transformers, f"{names.replace('2_5_', '2')}VideoProcessor")(**patches, **MEANS, **size),
        chat_template=template(PICTURE, PICTURE.replace("image", "video"), "<|im_start|>"),
    )
    target = Path(tempfile.mkdtemp(prefix=f"vtp-{family}-"))
    atexit.register(shutil.rmtree, target)
    model.save_pretrained(target)
    processor.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def folder() -> Path:
    return folder_of("qwen2_5_vl")


def write(request: Request) -> str:
    images, question = request
    return "<|im_start|>" + PICTURE * len(images) + question + "\nAnswer:"


def requests() -> list[Request]:
    """Five pictures of as many sizes; the last request has two of them."""
    sizes = [(144, 72), (56, 112), (88, 104), (64, 96), (120, 40)]
    pictures = [picture.resize(size) for (picture, _), size in zip(scenes(5), sizes, strict=True)]
    asked = [questions[number % len(questions)] for number, (_, questions) in enumerate(scenes(4))]
    return [
        *(([picture], question) for picture, question in zip(pictures, asked[:3], strict=False)),
        (pictures[3:], asked[3]),
    ]


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


DEPTH = {"hiprune": {"shallow": 1}, "vscan": {"shallow": 1}}  # the tiny towers have few blocks


def servable(name: str) -> bool:
    strategy = get_strategy(name)
    if strategy.text_encoder == "llm":  # the language model's embeddings are not possible inside vLLM
        return False
    try:
        strategies = strategies_of(settings_of(name))
    except PruningError:
        return False
    return strategy().budgeted and strategies[0].stage is Stage.PROJECTOR and not ABSENT & set(strategies[0].needs)


def settings_of(name: str, keep: float = 0.25) -> dict[str, Any]:
    at = {"at": "projector"} if "projector" in getattr(get_strategy(name), "places", ()) else {}
    return {"strategy": name, "keep_ratio": keep, **at, **DEPTH.get(name, {})}


def named(case: Any) -> str:
    return case if isinstance(case, str) else "-".join(map(str, case.values()))


SERVED = [name for name in list_strategies() if servable(name)]
SETTINGS = [
    *map(settings_of, SERVED),
    {"strategy": "divprune+visionzip", "divprune.keep_ratio": 0.6, "visionzip.keep_tokens": 20},
    {"strategy": "visionzip", "keep_ratio": 0.25, "positions": "compact"},
]
CASES = [
    *(("qwen2_5_vl", settings) for settings in SETTINGS),
    ("qwen3_vl", settings_of("random")),
    ("qwen3_vl", SETTINGS[-2]),
    ("qwen3_vl", SETTINGS[-1]),
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


def alike(outputs: Sequence[Any], wanted: Sequence[Mapping[str, Any]]) -> None:
    """Tokens and their probabilities."""
    assert answers(outputs) == [want["ids"] for want in wanted]
    for found, want in zip(logprobs(outputs), wanted, strict=True):
        assert found == pytest.approx(want["logprobs"], abs=CLOSE)


def test_answers_depend_on_what_is_kept_and_where(folder: Path):
    """Otherwise the comparisons would say little."""
    asked = requests()
    settings = [{"strategy": "none"}, SETTINGS[-1], SETTINGS[-1] | {"positions": "original"}]
    whole, compact, original = (expected(folder, each, asked) for each in settings)
    for one, other in ((whole, compact), (whole, original), (compact, original)):
        first = [abs(a["logprobs"][0] - b["logprobs"][0]) for a, b in zip(one, other, strict=True)]
        assert min(first) > 10 * CLOSE


@pytest.mark.parametrize("family", OWN)
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
    from vtp_plugin.hosts.vllm.qwen import channels, places_of

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
    ({"strategy": "l2"}, "l2: of Qwen2.5-VL inside vLLM only the projector stage is served"),
    ({"strategy": "vprune"}, "vprune: of Qwen2.5-VL inside vLLM only the projector stage is served"),
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
