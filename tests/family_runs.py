"""The tiny families at work: models and prompts made once, what a call kept, and whether it equals the reference."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import families
import torch
from families import FAMILIES, Family, Processor, Prompt
from families_reference import Kept, Reference
from matrix import dear
from torch import Tensor, nn

import vtp_plugin as vtp
from vtp_plugin import PruningStrategy, Selection, Stage, VisualTokens

SHALLOW: dict[str, dict[str, Any]] = {  # the layers that models of four have
    "pyramiddrop": {"layers": "2 3"},
    "fitprune": {"start": 2, "keep_ratio": 0.75},
    "hiprune": {"shallow": 1},
    "vscan": {"shallow": 1},
    "coreprune": {"layer": 3},
}
NEW = 4
NO_PICTURE = [[families.IMAGE], [families.VIDEO]]  # placeholders that no picture fills, in an answer
LAYOUTS = ("single", "batch", "video")
STRATEGIES = {  # per stage: what cuts there, and what keeps everything
    "pixels": [("vprune", {"chi2_threshold": 40.0, "cosine_threshold": 0.2})],
    "vit": [("l2", {"keep_ratio": 0.5})],
    "projector": [("atp", {"alpha": 0.0, "keep_ratio": 0.4}), ("stride", {"keep_ratio": 0.6})],
    "llm": [("fastv", {"layer": 2, "keep_ratio": 0.4})],
}


@dataclass(kw_only=True)
class Shifted(PruningStrategy):
    """Keep every second row with the values of the next: values that are not the row's own, as merging makes them."""

    name, stage, paper = "shifted", Stage.PROJECTOR, "none"

    def select(self, visual: VisualTokens) -> Selection:
        source = torch.arange(0, visual.tokens.shape[1] - 1, 2)
        keep = torch.zeros(visual.tokens.shape[:2], dtype=torch.bool)
        keep[:, source] = True
        rows = tuple(image[source + 1] for image in visual.tokens)
        return Selection(keep, tokens=rows, source=(source,) * len(rows))


# One family for every way in which images are arranged, where a check is dear.
KINDS = ("llava", "llava_hf", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "qwen3_5_moe", "glm4v")
KINDS += ("internvl", "gemma3", "idefics3", "mistral3", "minicpmv4_6", "paligemma")


def by_kind(names: Iterable[str]) -> list[str]:
    """Those that stand for the others."""
    names = list(names)
    return dear(names, set(KINDS) & set(names))


# What promises are shown at, where a family is not among FAMILIES.
BLIP2_STAGES = families.STAGES[:3]
ANYRES_STAGES = families.STAGES
ENCODER_STRATEGIES = ("l2", "vprune")
MERGING: list[tuple[Any, dict[str, Any]]] = [(Shifted(), {})]


@cache
def model_of(name: str, attention: str) -> nn.Module:
    return (FAMILIES | families.VARIANTS)[name].build(attention)


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


@contextmanager
def new_tensors() -> Iterator[list[Tensor]]:
    """Those that were made inside and are alive at its end; what was there before is frozen, now and afterwards."""
    found: list[Tensor] = []
    gc.collect()
    gc.freeze()
    yield found
    gc.collect()
    found += [x for x in gc.get_objects() if issubclass(type(x), Tensor)]


def kept_by_sample(events: list[Any], prompts: tuple[Prompt, ...], stage: str, positions: str = "") -> list[Kept]:
    """The decisions of the events, sample by sample."""
    kept = {number: k for event in events for number, k in zip(event.images, event.kept, strict=True)}
    field = {"pixels": "units", "vit": "units", "projector": "rows", "llm": "late"}[stage]
    numbers = iter(range(len(kept)))
    merged = any(event.strategy == Shifted.name for event in events)
    layer = next((event.layer for event in events if event.layer is not None), Kept.layer)
    common = {"positions": positions, "shifted": merged, "layer": layer}
    return [Kept(**{field: [kept[next(numbers)] for _ in prompt.totals]}, **common) for prompt in prompts]


def decided(model: nn.Module, family: Family, prompts: tuple[Prompt, ...], name: Any, fields: dict[str, Any]) -> Any:
    with vtp.prune(model, name, processor=Processor(), **fields) as pruned:
        output = generated(model, batched(family, prompts))
        return output, list(pruned.events)


def check_reference(model: Any, family: Family, prompts: Any, stage: str, strategy: Any, fields: Any) -> None:
    """Cached generation of the batch equals the slow reference of every sample; budgets and lengths are exact."""
    output, events = decided(model, family, prompts, strategy, fields)
    inputs, decisions = batched(family, prompts), kept_by_sample(events, prompts, stage, fields.get("positions", ""))
    assert torch.equal(output.sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    for row, (prompt, kept) in enumerate(zip(prompts, decisions, strict=True)):
        alone = batched(family, (prompt,))
        reference = Reference(model, alone, prompt.totals, kept, family.later)
        check_lengths(output.past_key_values, reference, kept, len(prompts) == 1)
        answer = output.sequences[row, inputs["input_ids"].shape[1] :].tolist()
        expected = reference.logits(answer)
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
    """The KV cache of every layer has the prompt's columns that this layer sees, and the new tokens but the last.

    A layer with a window holds the last of them, one less than the window.
    """
    for number, layer in enumerate(reference.parts.layers):
        if hasattr(layer, "linear_attn"):  # recurrent: its state has one size
            continue
        hidden = int(reference.hidden.sum()) if number >= kept.layer else 0
        wanted = len(reference.columns) - hidden + NEW - 1
        wanted = min(wanted, getattr(cache.layers[number], "sliding_window", wanted + 1) - 1)
        have = cache.layers[number].keys.shape[2]
        assert have == wanted if alone else have >= wanted


def _kept(kept: Kept) -> list[Tensor]:
    return kept.units or kept.rows or kept.late


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


@cache
def blip2() -> nn.Module:
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        OPTConfig,
    )

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = Blip2VisionConfig(**families.VISION, patch_size=4, image_size=16)
    former = Blip2QFormerConfig(
        **sizes, vocab_size=50, intermediate_size=48, encoder_hidden_size=32, cross_attention_frequency=2
    )
    text = OPTConfig(
        **sizes, vocab_size=200, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64, pad_token_id=0
    )
    config = Blip2Config(
        vision_config=vision.to_dict(),
        qformer_config=former.to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=6,
        image_token_index=families.IMAGE,
    )
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(config).eval()
    nn.init.normal_(model.query_tokens)
    return model


def blip2_inputs() -> dict[str, Tensor]:
    ids = torch.tensor([[families.IMAGE] * 6 + families.words(4, seed) for seed in (1, 2)])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": families.pixels(2, 3, 16, 16, seed=3),
    }


def anyres_model(folder: str) -> nn.Module:
    """The authors' LLaVA-1.6; its tower is written to `folder`, where the package loads it from."""
    from llava.model.language_model import llava_llama as language
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    from vtp_plugin.hosts.llava import frozen
    from vtp_plugin.surgery.undo import Undo

    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**families.VISION, patch_size=4, image_size=16)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    config = language.LlavaConfig(**families.TEXT)
    facts = {
        "mm_vision_tower": folder,
        "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": families.PINPOINTS,
        "tokenizer_padding_side": "left",
    }
    for name, value in facts.items():
        setattr(config, name, value)
    model = language.LlavaLlamaForCausalLM(config).eval()
    torch.nn.init.normal_(model.get_model().image_newline)  # the package leaves it as the memory was
    model.get_vision_tower().load_model()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    frozen.serve(model, Undo())  # unpruned, too: by itself the package runs up to transformers 5.23
    return model


ANYRES_SIZES = [(30, 20), (16, 30), (16, 16)]  # width, height


def anyres_inputs(rows: slice) -> dict[str, Any]:
    tiles = [families.pixels(n, 3, 16, 16, seed=n) for n in (5, 3, 3)]
    first = [*families.words(3, 1), -200, *families.words(4, 2), -200, *families.words(3, 3)]
    second = [*families.words(3, 5), -200, *families.words(3, 6)]
    ids = torch.tensor([first, [0] * (len(first) - len(second)) + second])[rows]
    mask = torch.tensor([[1] * len(first), [0] * (len(first) - len(second)) + [1] * len(second)]).bool()[rows]
    images = {0: slice(0, 2), 1: slice(2, 3)}[rows.start] if rows.start is not None else slice(None)
    return {"inputs": ids, "attention_mask": mask, "images": tiles[images], "image_sizes": ANYRES_SIZES[images]}
