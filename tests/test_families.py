"""The promises, over families x stages x attention kernels x layouts.

A deterministic part of the combinations runs by default; VTP_FULL_MATRIX=1 runs all of them.
"""

from __future__ import annotations

import os
import zlib
from functools import cache
from typing import Any

import families
import pytest
import torch
from families import FAMILIES, Family, Processor, Prompt
from reference import Kept, Reference
from torch import Tensor, nn

import vtp_plugin as vtp
from vtp_plugin.errors import PruningError

NEW = 4
LAYOUTS = ("single", "batch", "video")
STRATEGIES = {  # per stage: what cuts there, and what keeps everything
    "pixels": [("vprune", {"chi2_threshold": 40.0, "cosine_threshold": 0.2})],
    "vit": [("l2", {"keep_ratio": 0.5})],
    "projector": [("atp", {"alpha": 0.0, "keep_ratio": 0.4}), ("stride", {"keep_ratio": 0.6})],
    "llm": [("fastv", {"layer": 2, "keep_ratio": 0.4})],
}
FULL = bool(os.environ.get("VTP_FULL_MATRIX"))

torch.set_num_threads(min(2, torch.get_num_threads()))


def combinations() -> list[Any]:
    found = []
    for family in FAMILIES.values():
        for stage in family.stages:
            for attention in ("eager", "sdpa"):
                for layout in LAYOUTS:
                    possible = layout != "video" or (family.video is not None and stage in family.video_stages)
                    name = f"{family.name}-{stage}-{attention}-{layout}"
                    if possible and (FULL or zlib.crc32(name.encode()) % 2 == 0):
                        found.append(pytest.param(family.name, stage, attention, layout, id=name))
    return found


@cache
def model_of(name: str, attention: str) -> nn.Module:
    return FAMILIES[name].build(attention)


@cache
def prompts_of(name: str, layout: str) -> tuple[Prompt, ...]:
    family = FAMILIES[name]
    if layout == "video":
        return (family.video(3),)
    return (family.sample(0, 1),) if layout == "single" else (family.sample(0, 2), family.sample(1, 1))


def batched(family: Family, prompts: tuple[Prompt, ...]) -> dict[str, Any]:
    return {k: v.clone() for k, v in family.batch(list(prompts)).items()}


def logits_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Logits of the real columns."""
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


def generated(model: nn.Module, inputs: dict[str, Any], **kwargs: Any) -> Any:
    settings = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "output_scores": True,
    }
    return model.generate(**inputs, **{**settings, **kwargs})


def kept_by_sample(events: list[Any], prompts: tuple[Prompt, ...], stage: str) -> list[Kept]:
    """The decisions of the events, sample by sample."""
    kept = {number: k for event in events for number, k in zip(event.images, event.kept, strict=True)}
    field = {"pixels": "units", "vit": "units", "projector": "rows", "llm": "late"}[stage]
    numbers = iter(range(len(kept)))
    return [Kept(**{field: [kept[next(numbers)] for _ in prompt.totals]}) for prompt in prompts]


def decided(model: nn.Module, family: Family, prompts: tuple[Prompt, ...], name: str, fields: dict[str, Any]) -> Any:
    with vtp.prune(model, name, processor=Processor(), **fields) as pruned:
        output = generated(model, batched(family, prompts))
        return output, list(pruned.events)


@pytest.mark.parametrize(("name", "stage", "attention", "layout"), combinations())
def test_promises(name: str, stage: str, attention: str, layout: str) -> None:
    family, model, prompts = FAMILIES[name], model_of(name, attention), prompts_of(name, layout)
    before = logits_of(model, batched(family, prompts))
    attributes = set(vars(model)) | set(vars(model.model))
    for strategy, fields in STRATEGIES[stage]:
        check_reference(model, family, prompts, stage, strategy, fields)
        if "keep_ratio" in fields:
            with vtp.prune(model, strategy, processor=Processor(), **{**fields, "keep_ratio": 1.0}):
                assert torch.equal(logits_of(model, batched(family, prompts)), before), "keep_ratio=1"
    assert torch.equal(logits_of(model, batched(family, prompts)), before), "detached"
    assert set(vars(model)) | set(vars(model.model)) == attributes


def check_reference(model: Any, family: Family, prompts: Any, stage: str, strategy: str, fields: Any) -> None:
    """Cached generation of the batch equals the slow reference of every sample; budgets and lengths are exact."""
    output, events = decided(model, family, prompts, strategy, fields)
    inputs = batched(family, prompts)
    assert torch.equal(output.sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    for row, (prompt, kept) in enumerate(zip(prompts, kept_by_sample(events, prompts, stage), strict=True)):
        alone = batched(family, (prompt,))
        reference = Reference(model, alone, prompt.totals, kept)
        check_lengths(output.past_key_values, reference, kept, len(prompts) == 1)
        answer = output.sequences[row, inputs["input_ids"].shape[1] :].tolist()
        expected = reference.logits(answer[:-1])[-NEW:]
        actual = torch.stack([step[row] for step in output.logits])
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        if len(prompts) > 1:
            single, again = decided(model, family, (prompt,), strategy, fields)
            for mine, other in zip(_kept(kept), _kept(kept_by_sample(again, (prompt,), stage)[0]), strict=True):
                assert torch.equal(mine, other), "another decision in a batch"
            torch.testing.assert_close(torch.cat(single.logits), actual, rtol=1e-4, atol=1e-4)
    if "keep_ratio" in fields:
        assert all(count < total for event in events for count, total in zip(event.after, event.before, strict=True))


def check_lengths(cache: Any, reference: Reference, kept: Kept, alone: bool) -> None:
    """The KV cache of every layer has the prompt's columns that this layer sees, and the new tokens but the last."""
    for number in range(len(reference.llm.layers)):
        hidden = int(reference.hidden.sum()) if number >= kept.layer else 0
        wanted = len(reference.columns) - hidden + NEW - 1
        have = cache.layers[number].keys.shape[2]
        assert have == wanted if alone else have >= wanted


def _kept(kept: Kept) -> list[Tensor]:
    return kept.units or kept.rows or kept.late


# -- budgets, modes, errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "expected"), [("per_image", [10, 10]), ("per_tile", [50, 30]), ("total", [10])])
def test_budget_policies(budget: str, expected: list[int]) -> None:
    family, model = FAMILIES["llava_next"], model_of("llava_next", "sdpa")
    prompt = family.sample(0, 2)  # 5 and 3 tiles; the crops of the first are unpadded
    with vtp.prune(model, "stride", keep_tokens=10, budget=budget) as pruned:
        logits_of(model, batched(family, (prompt,)))
        after = pruned.events[-1].after
        assert pruned.strategies[0].config()["budget"] == budget
    assert (after if len(expected) > 1 else [sum(after)]) == expected


def test_budget_in_tower_is_per_tile() -> None:
    model = model_of("llava_next", "sdpa")
    with pytest.raises(PruningError, match="keep_tokens counts per tile here: say budget=per_tile"):
        vtp.prune(model, "l2", keep_tokens=8, processor=Processor())
    family = FAMILIES["llava_next"]
    with vtp.prune(model, "l2", keep_tokens=8, budget="per_tile", processor=Processor()) as pruned:
        logits_of(model, batched(family, (family.sample(0, 1),)))
    assert pruned.events[-1].after == [40]


MODES = {
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 2},
    "returned": {"num_beams": 3, "num_return_sequences": 2},
    "uncached": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "lookup": {"prompt_lookup_num_tokens": 2},
    "assisted": {},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "gemma3"] if not FULL else list(FAMILIES))
def test_generation_modes(name: str, mode: str) -> None:
    """Modes run on a shortened prompt; the greedy ones agree with plain greedy search."""
    family, model = FAMILIES[name], model_of(name, "sdpa")
    inputs = batched(family, prompts_of(name, "single"))
    arguments = dict(MODES[mode]) | ({"assistant_model": assistant_of(name)} if mode == "assisted" else {})
    with vtp.prune(model, "stride", keep_ratio=0.5):
        plain = generated(model, dict(inputs)).sequences
        found = generated(model, dict(inputs), **arguments).sequences
    assert found.shape[1] == plain.shape[1]
    if mode in ("uncached", "static", "lookup", "assisted"):
        assert torch.equal(found, plain)


@cache
def assistant_of(name: str) -> nn.Module:
    """Another random checkpoint of the family: hosts pass it the arguments of the main model."""
    model = FAMILIES[name].build("sdpa")
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(1)))
    return model


@pytest.mark.parametrize("name", list(FAMILIES))
def test_beams_of_a_batch_equal_beams_of_its_samples(name: str) -> None:
    """Unequal numbers of images and rows stay with their samples when the host repeats them."""
    family, model, prompts = FAMILIES[name], model_of(name, "sdpa"), prompts_of(name, "batch")
    with vtp.prune(model, "stride", keep_ratio=0.4):
        together = generated(model, batched(family, prompts), num_beams=2, num_return_sequences=2)
        for row, prompt in enumerate(prompts):
            alone = generated(model, batched(family, (prompt,)), num_beams=2, num_return_sequences=2)
            mine = slice(2 * row, 2 * row + 2)
            assert torch.equal(together.sequences[mine, -NEW:], alone.sequences[:, -NEW:])
            torch.testing.assert_close(together.sequences_scores[mine], alone.sequences_scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_mismatch_is_one_sentence(name: str) -> None:
    family, model = FAMILIES[name], model_of(name, "sdpa")
    inputs = batched(family, prompts_of(name, "single"))
    before = logits_of(model, dict(inputs))
    first = (inputs["input_ids"][0] == families.IMAGE).nonzero()[0]
    broken = dict(inputs, input_ids=inputs["input_ids"].clone())
    broken["input_ids"][0, first] = 5
    with vtp.prune(model, "stride"), pytest.raises(PruningError, match="placeholders") as error:
        model(**broken)
    assert str(error.value).count(".") == 0
    assert torch.equal(logits_of(model, dict(inputs)), before)


@pytest.mark.parametrize("name", ["mistral3", "idefics3"])
def test_missing_stage_says_why(name: str) -> None:
    with pytest.raises(PruningError, match=r"l2: .* has no vit stage: .+"):
        vtp.prune(model_of(name, "sdpa"), "l2", processor=Processor())


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "llava_next"])
def test_text_similarity_is_refused_without_a_text_tower(name: str) -> None:
    with pytest.raises(PruningError, match="has no CLIP text encoder that matches its vision tower"):
        vtp.prune(model_of(name, "sdpa"), "atp", processor=Processor())


def test_video_with_interpolation_is_refused_inside_the_tower() -> None:
    family, model = FAMILIES["llava_onevision"], model_of("llava_onevision", "sdpa")
    inputs = batched(family, (family.video(3),))
    with vtp.prune(model, "l2", processor=Processor()), pytest.raises(PruningError, match="interpolates"):
        model(**inputs)


def test_record_names_the_substitute_of_cls_attention() -> None:
    from vtp_plugin.reporting.record import record

    with vtp.prune(model_of("llava_onevision", "sdpa"), "atp", alpha=0.0) as pruned:
        assert record(pruned, [])["model"]["cls_attention"].startswith("received, mean over queries")
    with vtp.prune(model_of("llava_next", "sdpa"), "atp", alpha=0.0) as pruned:
        assert record(pruned, [])["model"]["cls_attention"] == "of the class token"


@pytest.mark.parametrize("name", [f.name for f in FAMILIES.values() if f.mrope])
def test_positions_are_the_hosts(name: str) -> None:
    """What reaches the rotary embedding is the full prompt's table, gathered."""
    family, model = FAMILIES[name], model_of(name, "sdpa")
    prompts = prompts_of(name, "batch")
    inputs = batched(family, prompts)
    names = ("mm_token_type_ids", "image_grid_thw", "attention_mask")
    table, _ = model.model.get_rope_index(inputs["input_ids"], **{k: inputs[k] for k in names})
    seen: list[Tensor] = []
    handle = model.model.language_model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("position_ids", args[1] if len(args) > 1 else None)),
        with_kwargs=True,
    )
    with vtp.prune(model, "stride", keep_ratio=0.5) as pruned:
        generated(model, inputs)
        kept = kept_by_sample(list(pruned.events), prompts, "projector")
    handle.remove()
    for row, (prompt, chosen) in enumerate(zip(prompts, kept, strict=True)):
        reference = Reference(model, batched(family, (prompt,)), prompt.totals, chosen)
        start = inputs["input_ids"].shape[1] - len(reference.ids)
        wanted = table[:, row, reference.columns + start]
        assert torch.equal(seen[0][-3:, row, -wanted.shape[1] :], wanted)
        assert torch.equal(seen[1][-3:, row, 0], table[:, row].amax() + 1 + torch.zeros(3, dtype=torch.long))


# -- encoders ---------------------------------------------------------------------------------------------------------


def clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    vision = families.VISION | {"patch_size": 4, "image_size": 16}
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(vision_config=vision, text_config=families.TEXT, projection_dim=16)).eval()


def siglip() -> nn.Module:
    from transformers import SiglipConfig, SiglipModel

    vision = families.VISION | {"patch_size": 4, "image_size": 16}
    text = families.TEXT | {"projection_size": 32}
    torch.manual_seed(0)
    return SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).eval()


@pytest.mark.parametrize("build", [clip, siglip])
@pytest.mark.parametrize("strategy", ["l2", "vprune"])
def test_encoders(build: Any, strategy: str) -> None:
    model, values = build(), families.pixels(3, 3, 16, 16, seed=1)
    fields = STRATEGIES["pixels"][0][1] if strategy == "vprune" else {}
    with torch.no_grad():
        whole = model.get_image_features(pixel_values=values).pooler_output
        with vtp.prune(model, strategy, processor=Processor(), **fields) as pruned:
            cut = model.get_image_features(pixel_values=values).pooler_output
            kept = [k for event in pruned.events for k in event.kept]
        again = model.get_image_features(pixel_values=values).pooler_output
    assert torch.equal(whole, again)
    assert cut.shape == whole.shape
    assert not torch.allclose(cut, whole)
    for number, patches in enumerate(kept):
        torch.testing.assert_close(
            cut[number], by_hand(model, values[number : number + 1], patches), rtol=1e-4, atol=1e-5
        )


def by_hand(model: nn.Module, values: Tensor, patches: Tensor) -> Tensor:
    """The pooled feature of one image from some of its patches."""
    tower = getattr(model.vision_model, "vision_model", model.vision_model)
    with torch.no_grad():
        hidden = tower.embeddings(values)
        prefix = hidden.shape[1] - 16
        if hasattr(tower, "pre_layrnorm"):
            hidden = tower.pre_layrnorm(hidden)
        hidden = torch.cat([hidden[:, :prefix], hidden[:, prefix:][:, patches]], 1)
        for layer in tower.encoder.layers:
            hidden = layer(hidden, None)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        if not prefix:
            return tower.head(tower.post_layernorm(hidden))[0]
        return model.visual_projection(tower.post_layernorm(hidden[:, 0]))[0]


@pytest.mark.parametrize("strategy", ["stride", "fastv"])
def test_encoders_refuse_what_they_lack(strategy: str) -> None:
    with pytest.raises(PruningError, match=r"CLIP encoders has no (projector|llm) stage: an encoder has no"):
        vtp.prune(clip(), strategy)
