"""The promises, over families x stages x attention kernels x layouts."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import families
import family_runs
import pytest
import torch
from families import FAMILIES, Family, Processor, Prompt
from families_reference import Reference
from family_runs import (
    ANYRES_STAGES,
    BLIP2_STAGES,
    LAYOUTS,
    MERGING,
    NEW,
    NO_PICTURE,
    STRATEGIES,
    anyres_inputs,
    batched,
    blip2,
    blip2_inputs,
    check_reference,
    clip,
    decided,
    generated,
    kept_by_sample,
    logits_of,
    model_of,
    prompts_of,
    siglip,
)
from matrix import dear
from torch import Tensor, nn

import vtp_plugin as vtp
from vtp_plugin.adapters import v5_17
from vtp_plugin.errors import PruningError

pytestmark = pytest.mark.long

torch.set_num_threads(min(2, torch.get_num_threads()))


def strategies(family: Family, stage: str) -> list[tuple[Any, dict[str, Any]]]:
    """What cuts at a stage of a family."""
    later = {"layer": family.late} if stage == "llm" else {}
    return [(name, {**fields, **later}) for name, fields in STRATEGIES[stage]]


def combinations() -> list[Any]:
    """All that there are: videos only at the stages of families that take them."""
    found = [
        (family.name, stage, attention, layout)
        for family in FAMILIES.values()
        for stage in family.stages
        for attention, layout in product(("eager", "sdpa"), LAYOUTS)
        if layout != "video" or (family.video is not None and stage in family.video_stages)
    ]
    return [pytest.param(*each, id="-".join(each)) for each in found]


@pytest.mark.covering("name stage", "name layout", "stage attention layout")
@pytest.mark.parametrize(("name", "stage", "attention", "layout"), combinations())
def test_promises(name: str, stage: str, attention: str, layout: str) -> None:
    family, model, prompts = FAMILIES[name], model_of(name, attention), prompts_of(name, layout)
    before = logits_of(model, batched(family, prompts))
    attributes = set(vars(model)) | set(vars(model.model))
    for strategy, fields in strategies(family, stage) + MERGING * (stage == "projector"):
        check_reference(model, family, prompts, stage, strategy, fields)
        if "keep_ratio" in fields:
            with vtp.prune(model, strategy, processor=Processor(), **{**fields, "keep_ratio": 1.0}):
                assert torch.equal(logits_of(model, batched(family, prompts)), before), "keep_ratio=1"
    assert torch.equal(logits_of(model, batched(family, prompts)), before), "detached"
    assert set(vars(model)) | set(vars(model.model)) == attributes


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


def test_budgets_that_nothing_would_obey_are_refused() -> None:
    with pytest.raises(PruningError, match="the llm stage cuts per image"):
        vtp.prune(model_of("llava_next", "sdpa"), "fastv", budget="per_tile")
    for model, name in ((model_of("llava_next", "sdpa"), "l2"), (blip2(), "stride")):
        with pytest.raises(PruningError, match=r"budget=total is not possible at the (vit|projector) stage"):
            vtp.prune(model, name, budget="total", processor=Processor())


MODES = {
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 2},
    "returned": {"num_beams": 3, "num_return_sequences": 2},
    "uncached": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "lookup": {"prompt_lookup_num_tokens": 2},
    "assisted": {},
}
PREFIX = ("paligemma", "paligemma2")  # an assistant's first candidates are taken for a part of the prefix by the host


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", dear(FAMILIES, ["llava_next", "qwen2_5_vl", "gemma3"]))
def test_generation_modes(name: str, mode: str) -> None:
    """Modes run on a shortened prompt; the greedy ones agree with plain greedy search."""
    family, model = FAMILIES[name], model_of(name, "sdpa")
    inputs = batched(family, prompts_of(name, "single"))
    arguments = dict(MODES[mode]) | ({"assistant_model": assistant_of(name)} if mode == "assisted" else {})
    with vtp.prune(model, "stride", keep_ratio=0.5):
        if model._is_stateful and mode in ("lookup", "assisted"):
            with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
                generated(model, dict(inputs), **arguments)
            return
        plain = generated(model, dict(inputs)).sequences
        if v5_17.is_host() and (name, mode) == ("gemma3", "assisted"):
            arguments = {"assistant_model": assistant_of(name, window=64)}  # 5.17 fails with one that is too short
        if (name, mode) == ("paligemma2", "static"):
            with pytest.raises(AttributeError, match="'dict' object has no attribute 'ndim'"):
                generated(model, dict(inputs), **arguments)
            return
        found = generated(model, dict(inputs), **arguments).sequences
    assert found.shape[1] == plain.shape[1]
    if mode in ("uncached", "static", "lookup", "assisted") and (name not in PREFIX or mode != "assisted"):
        assert torch.equal(found, plain)


@pytest.mark.parametrize("name", dear(PREFIX, ["paligemma2"]))
def test_candidates_in_the_prefix(name: str) -> None:
    """With an assistant the host itself does not say what greedy search says, without a strategy, too."""
    model, inputs = model_of(name, "sdpa"), batched(FAMILIES[name], prompts_of(name, "single"))
    plain, found = (generated(model, dict(inputs), **more) for more in ({}, {"assistant_model": assistant_of(name)}))
    assert (found.logits[0] - plain.logits[0]).abs().max() > 1e-3


def test_a_static_cache_that_fails_in_the_host() -> None:
    """Without a strategy, too."""
    model, inputs = model_of("paligemma2", "sdpa"), batched(FAMILIES["paligemma2"], prompts_of("paligemma2", "single"))
    with pytest.raises(AttributeError, match="'dict' object has no attribute 'ndim'"):
        generated(model, dict(inputs), **MODES["static"])


def test_types_of_a_prompt_with_candidates_behind_it() -> None:
    """Gemma 4's host says what is a picture for the prompt alone, when candidates of an assistant follow it."""
    model, inputs = model_of("gemma4", "sdpa"), batched(FAMILIES["gemma4"], prompts_of("gemma4", "single"))
    for keep in (0.3, 0.5, 0.8):
        with vtp.prune(model, "stride", keep_ratio=keep):
            plain = generated(model, dict(inputs))
            found = generated(model, dict(inputs), assistant_model=assistant_of("gemma4"))
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(plain.logits))


def test_an_assistant_that_fails_in_the_host_is_refused() -> None:
    """In transformers 5.17 an assistant with a window that is shorter than prompt and answer; later it is right."""
    family, model = FAMILIES["gemma3"], model_of("gemma3", "sdpa")
    inputs = batched(family, prompts_of("gemma3", "single"))
    with vtp.prune(model, "stride", keep_ratio=0.5):
        plain = generated(model, dict(inputs)).sequences
        if v5_17.is_host():
            with pytest.raises(PruningError, match=r"sliding window \(24 tokens, .* take transformers 5.18 or later"):
                generated(model, dict(inputs), assistant_model=assistant_of("gemma3"))
        else:
            found = generated(model, dict(inputs), assistant_model=assistant_of("gemma3")).sequences
            assert torch.equal(found, plain)
        assert torch.equal(generated(model, dict(inputs)).sequences, plain)


@cache
def assistant_of(name: str, window: int | None = None) -> nn.Module:
    """Another random checkpoint of the family: hosts pass it the arguments of the main model."""
    model = FAMILIES[name].build("sdpa")
    if window is not None:
        model.config.text_config.sliding_window = window
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
def test_beams_under_none_score_as_the_host_does(name: str) -> None:
    """Every returned sequence against a plain forward of the unpruned host: each beam saw its own sample's images."""
    family, model, prompts = FAMILIES[name], model_of(name, "sdpa"), prompts_of(name, "batch")
    settings = {"num_beams": 2, "num_return_sequences": 2, "bad_words_ids": NO_PICTURE}
    with vtp.prune(model, "none"):
        found = generated(model, batched(family, prompts), **settings)
    for number, (answer, score) in enumerate(zip(found.sequences[:, -NEW:], found.sequences_scores, strict=True)):
        inputs = batched(family, (prompts[number // 2],))
        for key, padding in {
            "input_ids": None,
            "attention_mask": 1,
            "mm_token_type_ids": 0,
            "token_type_ids": int(name.startswith("paligemma")),  # where 0 is the prompt
        }.items():
            if key in inputs:
                more = answer[None] if padding is None else torch.full_like(answer[None], padding)
                inputs[key] = torch.cat([inputs[key], more], 1)
        with torch.no_grad():
            logits = model(**inputs).logits[0, -NEW - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, answer[:, None]).mean()
        torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("name", [n for n in FAMILIES if not n.startswith("llava_next")])
def test_text_similarity_is_refused_without_a_text_tower(name: str) -> None:
    with pytest.raises(PruningError, match="has no CLIP text encoder that matches its vision tower"):
        vtp.prune(model_of(name, "sdpa"), "atp", processor=Processor())


@pytest.mark.parametrize("layout", ["single", "batch"])
def test_text_similarity_judges_every_row_of_the_tiles(layout: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """ATP with a CLIP text tower beside a LLaVA-NeXT; what it keeps gives the answers of the slow reference."""
    from models import clip_text_of

    family, model, prompts = FAMILIES["llava_next"], model_of("llava_next", "sdpa"), prompts_of("llava_next", layout)
    folder = clip_text_of(model.config.vision_config, tmp_path_factory.mktemp("clip"))
    kept = {}
    for alpha in (0.0, 0.5, 1.0):
        fields = {"alpha": alpha, "keep_ratio": 0.4, "clip": str(folder)}
        check_reference(model, family, prompts, "projector", "atp", fields)
        _, events = decided(model, family, prompts, "atp", fields)
        kept[alpha] = [rows.tolist() for rows in events[-1].kept]
    assert kept[0.0] != kept[0.5] != kept[1.0] != kept[0.0]


def test_text_similarity_in_the_authors_package(anyres: nn.Module, tmp_path: Path) -> None:
    from models import clip_text_of

    folder = clip_text_of(anyres.get_vision_tower().config, tmp_path)
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with vtp.prune(anyres, "atp", processor=Processor(), clip=str(folder), alpha=1.0, keep_ratio=0.4):
        together = torch.stack(anyres.generate(**anyres_inputs(slice(None)), **settings).logits)
        parts = (slice(0, 1), slice(1, 2))
        singles = torch.cat([torch.stack(anyres.generate(**anyres_inputs(p), **settings).logits) for p in parts], 1)
    torch.testing.assert_close(together, singles, rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("layout", ["batch", "video"])
@pytest.mark.parametrize("name", [f.name for f in FAMILIES.values() if f.mrope])
def test_positions_are_the_hosts(name: str, layout: str) -> None:
    """What reaches the rotary embedding is the full prompt's table, gathered."""
    family, model = FAMILIES[name], model_of(name, "sdpa")
    prompts = prompts_of(name, layout)
    inputs = batched(family, prompts)
    names = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    names += ("target_sizes", "target_sizes_videos")
    told = {k: inputs[k] for k in names if k in inputs}
    if "video_second_per_grid" in inputs:
        told["second_per_grids"] = inputs["video_second_per_grid"]
    table, _ = model.model.get_rope_index(inputs["input_ids"], **told)
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


def shapes(features: Any) -> Any:
    """Containers and shapes of features, whatever holds them."""
    if isinstance(features, Tensor):
        return tuple(features.shape)
    return type(features), [shapes(part) for part in features]


def rows_of(features: Any) -> int:
    if isinstance(features, Tensor):
        return features.shape[:-1].numel()
    return sum(map(rows_of, features))


@pytest.mark.covering("name spec", "name layout")
@pytest.mark.parametrize("spec", ["none", "all", "half"])
@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for name, layout in product(FAMILIES, LAYOUTS) if layout != "video" or FAMILIES[name].video],
)
def test_features_are_given_out_as_the_host_does(name: str, layout: str, spec: str) -> None:
    """In the same containers; in the same shapes where nothing was dropped, else the rows that are left."""
    family, model = FAMILIES[name], model_of(name, "sdpa")
    fields = {"none": {}, "all": {"keep_ratio": 1.0}, "half": {"keep_ratio": 0.5}}[spec]
    prompts, field = prompts_of(name, layout), "video_outputs" if layout == "video" else "image_outputs"
    if layout == "batch":
        connected = name in ("idefics3", "smolvlm")  # whose pixels have a row for every sample
        silent = family.sample(5, 0) if connected else Prompt(families.words(9, 5))
        prompts = (prompts[0], silent, prompts[1])
    with torch.no_grad():
        host = model(**batched(family, prompts)).get(field)
        with vtp.prune(model, "stride" if fields else "none", **fields) as pruned:
            ours = model(**batched(family, prompts)).get(field)
    if host is None:  # which gives out none of a video
        assert ours is None
        return
    kept = sum(count for event in pruned.events for count in event.after)
    for key in ("pooler_output", "deepstack_features"):
        theirs, given = host.get(key), ours.get(key)
        if spec == "half":
            assert type(theirs) is type(given)
            levels = len(given or ()) if key == "deepstack_features" else 1
            assert given is None or rows_of(given) <= kept * levels + rows_of(theirs) / 4  # newlines stay
            assert given is None or rows_of(given) >= kept * levels
        else:
            assert theirs is given is None or shapes(theirs) == shapes(given)


# -- encoders ---------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("build", [clip, siglip])
@torch.no_grad()
def test_encoders_show_states_and_attentions_of_unequal_images(build: Any) -> None:
    """Those of every image are its own, with zeros behind them."""
    model, values = build(), families.pixels(3, 3, 16, 16, seed=1)
    values[1] = 0  # one colour
    model.set_attn_implementation("eager")
    wanted = {"output_hidden_states": True, "output_attentions": True}
    with vtp.prune(model, "vprune", processor=Processor(), **STRATEGIES["pixels"][0][1]) as pruned:
        together = model.vision_model(pixel_values=values, **wanted)
        assert len({count for event in pruned.events for count in event.after}) > 1
        alone = [model.vision_model(pixel_values=one[None], **wanted) for one in values]
    for name in ("hidden_states", "attentions"):
        for layer, found in enumerate(together[name]):
            for number, answer in enumerate(alone):
                own = answer[name][layer][0]
                short = [longest - size for longest, size in zip(found.shape[1:], own.shape, strict=True)]
                filled = nn.functional.pad(own, [side for count in reversed(short) for side in (0, count)])
                torch.testing.assert_close(found[number], filled, rtol=1e-4, atol=1e-5)


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


SOUNDS = {"qwen2_5_omni": (5, 16), "qwen3_omni_moe": (3, 8)}  # tokens of the audio, and those of the video before it


def heard(prompt: Prompt, ids: list[int], **more: Tensor) -> Prompt:
    """A prompt with a bit of audio among its ids."""
    sound = torch.randn(1, 8, 20, generator=torch.Generator().manual_seed(2))
    audio = {"input_features": sound, "feature_attention_mask": torch.ones(1, 20, dtype=torch.long)}
    return Prompt(ids, prompt.images | audio | more, prompt.totals)


def spoken(name: str, where: str) -> Prompt:
    """Audio in front of a picture, or between the frames of a video that it belongs to."""
    family, (begin, end), marks, (length, first) = FAMILIES[name], families.SPOKEN, families.MARKS, SOUNDS[name]
    said = [families.AUDIO] * length
    if where == "before":
        picture = family.sample(0, 1)
        return heard(picture, [9, 8, begin, *said, end, *picture.ids])
    video = family.video(3)  # of three frames, the last more than two seconds behind the first
    frames = [families.VIDEO] * first, [families.VIDEO] * (24 - first)
    ids = [9, 8, marks[0], begin, *frames[0], *said, *frames[1], end, marks[1], 7, 6, 5]
    return heard(video, ids, video_second_per_grid=torch.tensor([1.2]), use_audio_in_video=torch.tensor([True]))


@pytest.mark.parametrize("where", ["before", "between"])
@pytest.mark.parametrize("stage", families.STAGES)
@pytest.mark.parametrize("name", [name for name in SOUNDS if name in FAMILIES])
def test_audio_stays_where_it_is(name: str, stage: str, where: str) -> None:
    """What is said is heard by the slow reference, too."""
    family, model, prompt = FAMILIES[name], model_of(name, "eager"), spoken(name, where)
    silent = {**prompt.images, "input_features": torch.zeros_like(prompt.images["input_features"])}
    inputs = batched(family, (prompt,))
    assert not torch.equal(logits_of(model, dict(inputs)), logits_of(model, inputs | silent))
    for strategy, fields in strategies(family, stage):
        check_reference(model, family, (prompt,), stage, strategy, fields)


def test_a_thinker_of_an_older_release_is_told() -> None:
    older = type("Qwen2_5OmniThinkerForConditionalGeneration", (nn.Module,), {})()
    older.visual, older.model = nn.Identity(), nn.Identity()
    with pytest.raises(
        PruningError, match=r"is nearly what Qwen2.5-Omni \(thinker\) is known as, but up to transformers 5"
    ):
        vtp.prune(older, "stride")


def test_the_model_that_speaks_names_its_thinker() -> None:
    whole = type("Qwen2_5OmniForConditionalGeneration", (nn.Module,), {})()
    with pytest.raises(
        PruningError, match=r"^Qwen-Omni as a whole cannot be pruned: .*: prune its `thinker`, and let it"
    ):
        vtp.prune(whole, "stride")


@pytest.mark.parametrize("strategy", ["stride", "fastv"])
def test_encoders_refuse_what_they_lack(strategy: str) -> None:
    with pytest.raises(PruningError, match=r"CLIP encoders has no (projector|llm) stage: an encoder has no"):
        vtp.prune(clip(), strategy)


# -- composition, labels, refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", dear(FAMILIES, ["llava_next", "qwen2_5_vl", "internvl"]))
def test_stages_compose(name: str) -> None:
    """Each stage sees what the one before left."""
    family, model = FAMILIES[name], model_of(name, "sdpa")
    methods = {"vit": "l2", "projector": "stride", "llm": "fastv"}
    chosen = "+".join(method for stage, method in methods.items() if stage in family.stages)
    fields = {"fastv.layer": family.late} if "llm" in family.stages else {}
    with vtp.prune(model, chosen, processor=Processor(), **fields) as pruned:
        logits_of(model, batched(family, prompts_of(name, "batch")))
    counts = [(sum(e.before), sum(e.after)) for s in chosen.split("+") for e in pruned.events if e.strategy == s]
    assert {e.strategy for e in pruned.events} == set(chosen.split("+"))
    assert all(after < before for before, after in counts if before > len(pruned.events[0].before))
    projector = next(e for e in pruned.events if e.strategy == "stride")
    late = [e for e in pruned.events if e.strategy == "fastv"]
    assert [before for e in late for before in e.before] == (projector.after if late else [])


@pytest.mark.parametrize(
    ("name", "strategy"),
    [*((n, "stride") for n in FAMILIES), *((n, "fastv") for n, family in FAMILIES.items() if "llm" in family.stages)],
)
def test_labels_and_full_length_logits(name: str, strategy: str) -> None:
    family, model = FAMILIES[name], model_of(name, "sdpa")
    inputs = batched(family, prompts_of(name, "single"))
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    with vtp.prune(model, strategy, **({"layer": family.late} if strategy == "fastv" else {})), torch.no_grad():
        output = model(**inputs, labels=labels)
    assert output.logits.shape[:2] == labels.shape
    predicted = output.logits[0, -3:-1].log_softmax(-1).gather(1, labels[0, -2:, None])
    torch.testing.assert_close(output.loss, -predicted.mean(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arguments", [{"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}])
def test_modes_that_do_not_fit_decoder_cuts(arguments: dict[str, Any]) -> None:
    family, model = FAMILIES["qwen2_5_vl"], model_of("qwen2_5_vl", "sdpa")
    inputs = batched(family, prompts_of("qwen2_5_vl", "single"))
    with vtp.prune(model, "fastv"), pytest.raises(PruningError, match="fastv: "):
        generated(model, inputs, **arguments)


def test_deepstack_layers_cannot_be_cut() -> None:
    said = r"^fastv: layer must be in 3 \.\.\. 11 for this model, got 2: its first 3 decoder layers .* \(deepstack\)$"
    with pytest.raises(PruningError, match=said):
        vtp.prune(model_of("qwen3_vl", "sdpa"), "fastv", layer=2)


@pytest.mark.covering("layer attention", "layer layout")
@pytest.mark.parametrize("layer", [1, 4, 5, 6, 7])
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("layout", ["single", "batch"])
def test_sliding_layers_may_be_cut(attention: str, layout: str, layer: int, positions: str, monkeypatch: Any) -> None:
    """Before and behind the first full layer, with prompts longer than the window and answers that outgrow it."""
    monkeypatch.setattr(family_runs, "NEW", new := 12)
    family, model, prompts = FAMILIES["gemma3"], model_of("gemma3", attention), prompts_of("gemma3", layout)
    window = model.config.text_config.sliding_window
    assert max(len(prompt.ids) for prompt in prompts) + new > window
    assert layout == "single" or max(len(prompt.ids) for prompt in prompts) > window
    fields = {"keep_ratio": 0.4, "layer": layer, "positions": positions}
    check_reference(model, family, prompts, "llm", "fastv", fields)


@pytest.mark.covering("layer layout", "layer positions")
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("layout", ["single", "batch"])
def test_every_other_layer_slides(layout: str, layer: int, positions: str, monkeypatch: Any) -> None:
    """PaliGemma 2: cuts in front of layers that slide and of full ones, answers that outgrow the window."""
    monkeypatch.setattr(family_runs, "NEW", new := 12)
    family, model, prompts = FAMILIES["paligemma2"], model_of("paligemma2", "eager"), prompts_of("paligemma2", layout)
    assert model.config.text_config.layer_types == ["sliding_attention", "full_attention"] * 2
    assert max(len(prompt.ids) for prompt in prompts) + new > model.config.text_config.sliding_window
    fields = {"keep_ratio": 0.4, "layer": layer, "positions": positions}
    check_reference(model, family, prompts, "llm", "fastv", fields)


@dataclass(kw_only=True)
class Rows(vtp.PruningStrategy):
    """Keeps everything, and the rows of attention that it saw."""

    name, stage, paper, budgeted = "rows", vtp.Stage.LLM, "none", False
    needs = ("last_query_attention", "text_attention", "head_attention", "self_attention", "next_query_attention")
    layer: int
    seen: list[vtp.VisualTokens] = field(default_factory=list)

    @property
    def decoder_layer(self) -> int:
        return self.layer

    def select(self, visual: vtp.VisualTokens) -> vtp.Selection:
        self.seen.append(visual)
        return vtp.Selection.everything(visual.index)


@pytest.mark.parametrize("layer", [1, 2, 3])
@torch.no_grad()
def test_rows_of_attention_whose_logits_are_bounded(layer: int) -> None:
    """PaliGemma 2: every way in which rows are recomputed bends the logits as the host does."""
    family, model = FAMILIES["paligemma2"], model_of("paligemma2", "eager")
    inputs, strategy = batched(family, (family.sample(0, 1),)), Rows(layer=layer)
    with vtp.prune(model, strategy):
        model(**inputs)
    (seen,), maps = strategy.seen, model(**inputs, output_attentions=True).attentions
    image = (inputs["input_ids"][0] == families.IMAGE).nonzero().flatten()
    text, own, behind = (
        torch.arange(int(image[-1]) + 1, inputs["input_ids"].shape[1]),
        maps[layer - 1][0],
        maps[layer][0],
    )
    expected = {
        "last_query_attention": own[:, -1, image].mean(0),
        "next_query_attention": behind[:, -1, image].mean(0),
        "head_attention": own[:, text][:, :, image],
        "text_attention": own[:, text][:, :, image].mean(0),
        "self_attention": own[:, image][:, :, image].amax(0).mean(0),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(seen, name)[0], value, rtol=1e-4, atol=1e-6, msg=name)
    unbounded, strategy = FAMILIES["paligemma2"].build("eager"), Rows(layer=layer)
    for decoder in unbounded.model.language_model.layers:
        decoder.self_attn.attn_logit_softcapping = None
    with vtp.prune(unbounded, strategy):
        unbounded(**inputs)
    assert not torch.allclose(strategy.seen[0].head_attention, seen.head_attention, rtol=1e-2)  # the bound matters here


def test_the_attention_of_a_sliding_layer_ends_at_its_window() -> None:
    """The row that FastV reads, in front of a cut behind a sliding layer, is the host's own."""
    family, model, seen = FAMILIES["gemma3"], model_of("gemma3", "eager"), []
    inputs = batched(family, (family.sample(0, 2),))
    image = (inputs["input_ids"][0] == families.IMAGE).nonzero().flatten()
    strategy = vtp.get_strategy("fastv")(layer=4, keep_ratio=0.5)
    score = strategy.score
    strategy.score = lambda visual: seen.extend(visual.last_query_attention) or score(visual)
    with torch.no_grad(), vtp.prune(model, strategy):
        model(**inputs)
    with torch.no_grad():
        row = model(**inputs, output_attentions=True).attentions[3][0, :, -1].mean(0)
    assert (row[image] == 0).any()
    torch.testing.assert_close(torch.cat(seen), row[image], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [f.name for f in FAMILIES.values() if f.video and "vit" in f.video_stages])
def test_a_frame_of_which_nothing_is_left(name: str) -> None:
    """Two tokens of a video of three frames stay: at least one frame is gone from the tower."""
    family, model = FAMILIES[name], model_of(name, "sdpa")
    check_reference(model, family, (family.video(3),), "vit", "l2", {"keep_ratio": 0.1})


@pytest.mark.parametrize("layer", [2, 3, 4, 5])
def test_the_last_row_of_a_layer_that_rotates_nothing(layer: int) -> None:
    """Aya Vision: behind layer 3 (full attention, no rotation) and behind layers that slide, the host's own row."""
    family, model, seen = FAMILIES["aya_vision"], model_of("aya_vision", "eager"), []
    inputs = batched(family, (family.sample(0, 2),))
    image = (inputs["input_ids"][0] == families.IMAGE).nonzero().flatten()
    strategy = vtp.get_strategy("fastv")(layer=layer, keep_ratio=0.5)
    strategy.score = lambda visual: seen.extend(visual.last_query_attention) or visual.last_query_attention
    with torch.no_grad(), vtp.prune(model, strategy):
        model(**inputs)
    with torch.no_grad():
        row = model(**inputs, output_attentions=True).attentions[layer - 1][0, :, -1].mean(0)
    torch.testing.assert_close(torch.cat(seen), row[image], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["paligemma", "paligemma2"])
def test_a_prefix_attends_both_ways(name: str, attention: str) -> None:
    """What text sees behind it changes its first column's logits; the next layer's row is the host's."""
    family, model, seen = FAMILIES[name], model_of(name, attention), []
    inputs = batched(family, (family.sample(0, 1),))
    with torch.no_grad():
        changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
        changed["input_ids"][0, -1] = 7
        assert not torch.equal(model(**inputs).logits[0, 0], model(**changed).logits[0, 0])
        maps = model_of(name, "eager")(**inputs, output_attentions=True).attentions[1][0]
    image = (inputs["input_ids"][0] == families.IMAGE).nonzero().flatten()
    strategy = vtp.get_strategy("fitprune")(start=2, keep_ratio=0.9)
    strategy.cut_layers = lambda depth: (2,)
    strategy.score = lambda visual: seen.append(visual) or visual.self_attention
    with torch.no_grad(), vtp.prune(model, strategy):
        model(**inputs)
    own = maps[:, image][:, :, image].amax(0)
    torch.testing.assert_close(seen[0].self_attention[0], own.mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("layer", [2, 6])
def test_signals_see_what_the_tokens_of_an_image_see(layer: int, attention: str) -> None:
    """Both ways inside an image of Gemma 3, behind a sliding layer and behind a full one: the host's own maps."""
    family, seen = FAMILIES["gemma3"], []
    model = model_of("gemma3", attention)
    inputs = batched(family, (family.sample(0, 2), family.sample(1, 1)))
    strategy = vtp.get_strategy("fitprune")(start=layer, keep_ratio=0.9)
    strategy.cut_layers = lambda depth: (layer,)
    strategy.score = lambda visual: seen.extend(visual.self_attention) or visual.self_attention
    with torch.no_grad(), vtp.prune(model, strategy):
        model(**inputs)
    with torch.no_grad():
        maps = model_of("gemma3", "eager")(**inputs, output_attentions=True).attentions[layer - 1]
    images = [(0, columns) for columns in _images(inputs["input_ids"][0])]
    images += [(1, columns) for columns in _images(inputs["input_ids"][1])]
    for (row, image), received in zip(images, seen, strict=True):
        own = maps[row][:, image][:, :, image].amax(0)
        assert own.triu(1).any()  # a token sees what comes behind it
        torch.testing.assert_close(received, own.mean(0), rtol=1e-4, atol=1e-6)


def _images(ids: Tensor) -> tuple[Tensor, ...]:
    """The columns of every image of a prompt [L], whose images are equally long."""
    return (ids == families.IMAGE).nonzero().flatten().split(16)


@pytest.mark.parametrize(
    ("name", "stage"), [(n, stage) for n, one in families.VARIANTS.items() for stage in one.stages]
)
def test_structures_that_others_publish(name: str, stage: str) -> None:
    family = families.VARIANTS[name]
    model, prompts = model_of(name, "sdpa"), (family.sample(0, 2), family.sample(1, 1))
    for strategy, fields in strategies(family, stage):
        check_reference(model, family, prompts, stage, strategy, fields)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name.startswith("minicpmv")])
def test_a_call_that_merges_otherwise_is_refused(name: str) -> None:
    """What a token is was read from the configuration; a call that says the same is like one that says nothing."""
    family, model = FAMILIES[name], model_of(name, "sdpa")
    inputs = batched(family, prompts_of(name, "single"))
    with vtp.prune(model, "l2", processor=Processor()):
        expected = generated(model, dict(inputs)).sequences
        assert torch.equal(generated(model, dict(inputs), downsample_mode="16x").sequences, expected)
        with pytest.raises(PruningError, match=rf"^{name}: it was pruned with downsample_mode=16x, this call says 4x"):
            generated(model, dict(inputs), downsample_mode="4x")


def test_a_tower_of_pictures_of_one_size_is_told() -> None:
    """Up to transformers 5.18."""
    old = sys.modules.setdefault("an_older_minicpmv", ModuleType("an_older_minicpmv"))
    old.get_vision_merged_shape = None
    model = type("MiniCPMV4_6ForConditionalGeneration", (nn.Module,), {"__module__": old.__name__})()
    with pytest.raises(
        PruningError, match=r"is nearly what MiniCPM-V 4.6 is known as, but up to transformers 5.18 its"
    ):
        vtp.prune(model, "stride")


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
@pytest.mark.parametrize("stage", ["projector", "llm"])
def test_tiles_without_text_between_them(name: str, stage: str) -> None:
    family, model = FAMILIES[name], model_of(name, "sdpa")
    prompt = family.sample(0, 2)
    words = [i for i in prompt.ids if i != families.IMAGE]
    prompt.ids = [*words[:3], *[families.IMAGE] * sum(prompt.totals), *words[3:]]
    for strategy, fields in strategies(family, stage):
        check_reference(model, family, (prompt, family.sample(1, 1)), stage, strategy, fields)


def test_text_only_sample_in_a_batch() -> None:
    for name in ("llava_next", "qwen2_5_vl", "internvl"):
        family, model = FAMILIES[name], model_of(name, "sdpa")
        prompts = (family.sample(0, 1), Prompt(families.words(9, 5)))
        with vtp.prune(model, "stride", keep_ratio=0.5):
            together = generated(model, batched(family, prompts))
        alone = generated(model, batched(family, prompts[1:]))
        actual = torch.stack([step[1] for step in together.logits])
        torch.testing.assert_close(actual, torch.cat(alone.logits), rtol=1e-4, atol=1e-4)


# -- BLIP-2 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", BLIP2_STAGES)
def test_blip2(stage: str) -> None:
    """The Q-Former sees what is left: its output equals that of a Q-Former that is given these tokens by hand."""
    model, inputs = blip2(), blip2_inputs()
    whole = logits_of(model, inputs)
    seen: list[Tensor] = []
    handle = model.qformer.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
    for strategy, fields in STRATEGIES[stage]:
        with vtp.prune(model, strategy, processor=Processor(), **fields) as pruned:
            cut = logits_of(model, inputs)
            kept = [k for event in pruned.events for k in event.kept]
        assert not torch.equal(cut, whole)
        found = seen[-1]
        for number, patches in enumerate(kept):
            expected = blip2_by_hand(model, inputs["pixel_values"][number : number + 1], patches, stage)
            torch.testing.assert_close(found[number], expected, rtol=1e-4, atol=1e-5)
    handle.remove()
    assert torch.equal(logits_of(model, inputs), whole)


def blip2_by_hand(model: nn.Module, values: Tensor, patches: Tensor, stage: str) -> Tensor:
    with torch.no_grad():
        hidden = model.vision_model.embeddings(values)
        chosen = torch.cat([torch.zeros(1, dtype=torch.long), patches + 1])
        hidden = hidden if stage == "projector" else hidden[:, chosen]
        for layer in model.vision_model.encoder.layers:
            hidden = layer(hidden)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        hidden = model.vision_model.post_layernorm(hidden)
        hidden = hidden[:, chosen] if stage == "projector" else hidden
        return model.qformer(query_embeds=model.query_tokens, encoder_hidden_states=hidden).last_hidden_state[0]


def test_blip2_keeps_everything_and_refuses_the_decoder() -> None:
    model, inputs = blip2(), blip2_inputs()
    whole = logits_of(model, inputs)
    for name in ("l2", "stride"):
        with vtp.prune(model, name, keep_ratio=1.0, processor=Processor()):
            assert torch.equal(logits_of(model, inputs), whole)
    with pytest.raises(PruningError, match="BLIP-2 has no llm stage"):
        vtp.prune(model, "fastv")


# -- the authors' LLaVA-1.6 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ANYRES_STAGES)
def test_authors_anyres(anyres: nn.Module, stage: str) -> None:
    """keep_ratio=1 and detaching are exact, a batch equals its samples, dropped rows are gone from the prompt."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}

    def run(rows: slice = slice(None)) -> Tensor:
        return torch.stack(anyres.generate(**anyres_inputs(rows), **settings).logits)  # [NEW, B, V]

    whole = run()
    for strategy, fields in STRATEGIES[stage]:
        with vtp.prune(anyres, strategy, processor=Processor(), **fields) as pruned:
            assert pruned.adapter.family == "llava_anyres"
            together = run()
            singles = torch.cat([run(slice(0, 1)), run(slice(1, 2))], 1)
        torch.testing.assert_close(together, singles, rtol=1e-4, atol=1e-5)
        assert not torch.equal(together, whole)
        if "keep_ratio" in fields:
            with vtp.prune(anyres, strategy, processor=Processor(), **{**fields, "keep_ratio": 1.0}):
                assert torch.equal(run(), whole)
    assert torch.equal(run(), whole)


def test_authors_anyres_against_the_hosts_own_merge(anyres: nn.Module) -> None:
    """Rows that a projector strategy drops are taken out of the host's embeddings; newlines stay."""
    inputs = anyres_inputs(slice(1, 2))
    arguments = (None, inputs["attention_mask"], None, None, inputs["images"], inputs["image_sizes"])
    with torch.no_grad():
        embeds = anyres.prepare_inputs_labels_for_multimodal(inputs["inputs"], *arguments)[4]
        embeds = embeds[:, -(embeds.shape[1]) :]
        start = 3
        total = embeds.shape[1] - 6
        with vtp.prune(anyres, "stride", keep_ratio=0.5, budget="per_tile") as pruned:
            found = anyres.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True, output_logits=True)
            (kept,) = pruned.events[-1].kept
        keep = torch.ones(embeds.shape[1], dtype=torch.bool)
        newline = (embeds[0, start : start + total] == anyres.model.image_newline).all(-1)
        keep[start : start + total] = newline
        keep[start + kept] = True
        expected = anyres(inputs_embeds=embeds[:, keep]).logits[:, -1]
    assert int(newline.sum()) > 0
    torch.testing.assert_close(found.logits[0], expected, rtol=1e-4, atol=1e-5)
