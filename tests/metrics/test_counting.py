"""Counted FLOPs and KV bytes of every family against torch's own counter and the real cache."""

from __future__ import annotations

from functools import cache
from typing import Any

import families
import models
import pytest
import torch
from families import FAMILIES, Processor
from family_runs import Shifted, anyres_inputs, blip2, blip2_inputs, clip, siglip
from torch import nn
from torch_counter import flop_counter

from vtp_plugin import prune
from vtp_plugin.metrics import papers
from vtp_plugin.reporting.record import samples_of

pytestmark = pytest.mark.long

SPECS = {  # strategies that read no signal, so that nothing but the model is counted
    "none": ("none", {}),
    "pixels": ("pixelprune", {"threshold": 0.1}),
    "vit": ("stride", {"at": "vit", "keep_ratio": 0.5}),
    "projector": ("stride", {"keep_ratio": 0.4}),
    "llm": ("stride", {"at": "llm", "layer": 2, "keep_ratio": 0.4}),
    "merging": (Shifted(), {}),
}
NEW = 3
Measured = tuple[int, dict[str, Any], Any]  # torch's FLOPs, the sample's report, what `generate` returned
CASES = [(name, stage) for name, family in FAMILIES.items() for stage in ("none", *family.stages)]
VIDEOS = [(name, s) for name, f in FAMILIES.items() if f.video for s in ("none", *f.video_stages)]


@cache
def model_of(name: str) -> nn.Module:
    return FAMILIES[name].build("sdpa")


def late_of(model: nn.Module) -> int:
    """A decoder layer that may be cut: behind the last that takes up visual features."""
    return max(2, len(getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", None) or ()))


def measured(model: nn.Module, inputs: dict[str, Any], stage: str, new: int = NEW) -> Measured:
    """One generation."""
    spec, fields = SPECS[stage]
    fields = {**fields, **({"layer": late_of(model)} if stage == "llm" else {})}
    calls: list[Any] = []
    model.requires_grad_(False)  # the counter looks for gradients
    with prune(model, spec, processor=Processor(), measure=True, **fields) as pruned:
        pruned.finished.append(calls.append)
        with flop_counter() as counter:
            output = model.generate(**inputs, max_new_tokens=new, do_sample=False, return_dict_in_generate=True)
        (report,) = samples_of(pruned, calls[0])
    return counter.get_total_flops(), report, output


@cache
def unpruned_of(name: str, video: bool = False, new: int = NEW) -> Measured:
    """The unpruned generation of a family, which every stage is compared with."""
    family = FAMILIES[name]
    return measured(model_of(name), family.batch([family.video(3)]) if video else single(family), "none", new)


def check(model: nn.Module, inputs: dict[str, Any], stage: str, before: Measured | None = None) -> dict[str, Any]:
    whole, unpruned, _ = before or measured(model, inputs, "none")
    torchs, report, _ = (whole, unpruned, None) if stage == "none" else measured(model, inputs, stage)
    flops = report["flops"]["after"]
    assert sum(flops.values()) == pytest.approx(torchs, rel=0.01)
    assert sum(unpruned["flops"]["after"].values()) == pytest.approx(whole, rel=0.01)
    assert report["flops"]["before"] == unpruned["flops"]["after"]
    assert report["prefill_flops"]["after"] == sum(flops.values()) - flops["decode"]
    assert (torchs < whole) is (stage != "none")
    return report


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_flops_agree_with_torchs_counter(name: str, stage: str) -> None:
    family = FAMILIES[name]
    check(model_of(name), single(family), stage, unpruned_of(name))


@pytest.mark.parametrize("stage", ["none", "vit"])
@pytest.mark.parametrize("name", families.VARIANTS)
def test_flops_of_structures_that_others_publish(name: str, stage: str) -> None:
    family = families.VARIANTS[name]
    check(family.build("sdpa"), single(family), stage)


def single(family: families.Family) -> dict[str, Any]:
    """One prompt with one image, on a canvas of its own size."""
    inputs = family.batch([family.sample(0, 1)])
    if family.name == "mistral3":
        height, width = inputs["image_sizes"][0].tolist()
        inputs["pixel_values"] = inputs["pixel_values"][..., :height, :width]
    return inputs


@pytest.mark.covering
@pytest.mark.parametrize(("name", "stage"), VIDEOS)
def test_flops_of_videos_agree_with_torchs_counter(name: str, stage: str) -> None:
    family = FAMILIES[name]
    check(model_of(name), family.batch([family.video(3)]), stage, unpruned_of(name, video=True))


@pytest.mark.parametrize("stage", SPECS)
@pytest.mark.parametrize("name", models.FAMILIES)
def test_flops_of_llava_agree_with_torchs_counter(name: str, stage: str) -> None:
    host = models.tiny(name)
    check(host.model, host.inputs(models.prompts("single")), stage)


@pytest.mark.parametrize("stage", ["none", "pixels", "vit", "projector"])
def test_flops_of_blip2_agree_with_torchs_counter(stage: str) -> None:
    check(blip2(), {name: value[:1] for name, value in blip2_inputs().items()}, stage)


@pytest.mark.parametrize("stage", SPECS)
def test_flops_of_anyres_agree_with_torchs_counter(anyres: nn.Module, stage: str) -> None:
    check(anyres, anyres_inputs(slice(1, 2)), stage)


@pytest.mark.parametrize("stage", ["none", "pixels", "vit"])
@pytest.mark.parametrize("build", [clip, siglip])
def test_flops_of_encoders_agree_with_torchs_counter(build: Any, stage: str) -> None:
    model, calls = build().requires_grad_(False), []
    values = families.pixels(1, 3, 16, 16, seed=1)
    with prune(model, SPECS[stage][0], processor=Processor(), **SPECS[stage][1]) as pruned:
        pruned.finished.append(calls.append)
        with flop_counter() as counter:
            model.vision_model(pixel_values=values)
        (report,) = samples_of(pruned, calls[0])
    assert sum(report["flops"]["after"].values()) == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert (report["prefill_flops"]["after"] < report["prefill_flops"]["before"]) is (stage != "none")


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        *(("llava_next", stage) for stage in ("pixels", "merging")),
        *((name, "pixels") for name in ("qwen2_5_vl", "internvl")),
        ("gemma4", "projector"),
    ],
)
def test_a_batch_costs_what_its_samples_cost(name: str, stage: str) -> None:
    """Unequal images and unequal kept counts; padding is not counted, and what a method merged is projected once."""
    family, model, (spec, fields) = FAMILIES[name], model_of(name), SPECS[stage]
    prompts = [family.sample(0, 2), family.sample(1, 1)]

    def reports(chosen: list[Any]) -> list[dict[str, Any]]:
        calls: list[Any] = []
        with prune(model, spec, processor=Processor(), **fields) as pruned:
            pruned.finished.append(calls.append)
            model.generate(**family.batch(chosen), max_new_tokens=1)
            return samples_of(pruned, calls[0])

    together, alone = reports(prompts), [reports([prompt])[0] for prompt in prompts]
    for both, one in zip(together, alone, strict=True):
        assert both["flops"] == one["flops"]
        assert both["prompt_tokens"] == one["prompt_tokens"]


def test_windows_are_counted_as_windows() -> None:
    """An 8 x 12 image in windows of 4 x 4 patches: 16^2 pairs in each of six, all 96^2 in the two full blocks."""
    model = model_of("qwen2_5_vl")
    with prune(model, "none") as pruned:
        (image, *_) = pruned.adapter.images(single(FAMILIES["qwen2_5_vl"]))
        assert list(map(list, pruned.adapter.sequences(image))) == [[16] * 6, [96], [16] * 6, [96]]


def test_reading_the_class_tokens_attention_is_counted() -> None:
    """One query and the keys of all tokens in the block that is projected, beside logits of one row."""
    host, calls = models.tiny("llava_hf"), []
    with host.prune("fastervlm", keep_ratio=0.25) as pruned:
        pruned.finished.append(calls.append)
        host.forward(models.prompts("single"))
        (report,) = samples_of(pruned, calls[0])
    width, tokens = models.VISION["hidden_size"], models.N + 1
    assert report["flops"]["after"]["selector"] == 2 * ((tokens + 1) * width**2 + tokens * width)


# -- the KV cache -----------------------------------------------------------------------------------------------------


def cache_bytes(cache: Any) -> list[int]:
    return [sum(t.numel() * t.element_size() for t in tensors_of(layer)) for layer in cache.layers]


def tensors_of(layer: Any) -> list[Any]:
    """Keys and values, or the states of a recurrent layer."""
    if hasattr(layer, "keys"):
        return [layer.keys, layer.values]
    return [layer.conv_states[0], layer.recurrent_states[0]]


@pytest.mark.parametrize(("name", "stage"), [case for case in CASES if case[1] != "pixels"])
def test_kv_bytes_are_those_of_the_real_cache(name: str, stage: str) -> None:
    """After the prefill; pruning takes exactly the dropped tokens out of every layer that does not see them."""
    model, inputs = model_of(name), single(FAMILIES[name])
    _, _, unpruned = unpruned_of(name, new=1)
    _, report, output = unpruned_of(name, new=1) if stage == "none" else measured(model, inputs, stage, new=1)
    whole, cut = cache_bytes(unpruned.past_key_values), cache_bytes(output.past_key_values)
    assert report["kv_cache_bytes"] == {"before": sum(whole), "after": sum(cut)}
    prompt = report["prompt_tokens"]
    grows = [hasattr(layer, "keys") for layer in output.past_key_values.layers]
    per_token = whole[grows.index(True)] // prompt["before"]
    told = zip(whole, cut, prompt["by_layer"], grows, strict=True)
    assert all(own == (per_token * length if more else before) for before, own, length, more in told)
    dropped = sum(image["before"] - image["after"] for image in report["images"])
    assert whole[-1] - cut[-1] == per_token * dropped
    assert (dropped > 0) is (stage != "none")


def test_kv_bytes_of_half_precision_and_beams() -> None:
    family, model = FAMILIES["llava_next"], FAMILIES["llava_next"].build("sdpa").to(torch.bfloat16)
    inputs = family.batch([family.sample(0, 1)])
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    calls: list[Any] = []
    with prune(model, "stride", keep_ratio=0.5, measure=True) as pruned:
        pruned.finished.append(calls.append)
        output = model.generate(**inputs, max_new_tokens=1, num_beams=3, return_dict_in_generate=True)
        (report,) = samples_of(pruned, calls[0])
    assert report["kv_cache_bytes"]["after"] == sum(cache_bytes(output.past_key_values))


@pytest.mark.parametrize("arguments", [{}, {"use_cache": False}, {"num_beams": 2}])
def test_decoding_is_counted_as_it_runs(arguments: dict[str, Any]) -> None:
    family, model, calls = FAMILIES["llava_next"], model_of("llava_next"), []
    inputs = family.batch([family.sample(0, 1)])
    with prune(model, "stride", at="llm", keep_ratio=0.4, measure=True) as pruned:
        pruned.finished.append(calls.append)
        with flop_counter() as counter:
            model.generate(**inputs, max_new_tokens=5, do_sample=False, **arguments)
        (report,) = samples_of(pruned, calls[0])
    assert sum(report["flops"]["after"].values()) == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert report["latency"]["new_tokens"] == 5


# -- the papers' own formulas -----------------------------------------------------------------------------------------


def trillions(macs: float) -> float:
    return round(macs / 1e12, 2)


def test_the_papers_formulas_give_their_own_numbers() -> None:
    """Printed by the papers and their authors' repositories, as collected from them."""
    assert trillions(papers.visionzip(576)) == 2.99
    assert trillions(papers.pyramiddrop([576] * 32)) == 3.82
    assert trillions(papers.pyramiddrop([576] * 8 + [288] * 8 + [144] * 8 + [72] * 8)) == 1.78
    assert papers.sparsevlm([676] * 32) == pytest.approx(4.49e12, rel=0.002)  # "about 676 tokens"
    assert round(papers.cdpruner(576) / 1e12, 2) == 7.63
    assert round(papers.cdpruner(2880) / 1e12, 1) == 41.7
    assert round(papers.cdpruner(320) / 1e12, 1) == 4.2
    assert round(papers.fastv(576, 0.5, layer=3, text=36), 2) == 0.57
    assert round(papers.fastv(576, 0.5, layer=3), 2) == 0.54


def test_vprunes_ratio_is_what_is_removed() -> None:
    assert papers.vprune(1000, 783) == pytest.approx(0.217)
    assert papers.holov(1 / 3) == pytest.approx(8 / 9)
