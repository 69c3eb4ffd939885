"""What strategies are shown, against what the host computes itself with eager attention."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import reference
import torch
from models import FAMILIES, GRID, PATCH, SIDE, N, Tiny, picture, prompts, tiny
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from vtp_plugin import Selection, Stage, VisualTokens, get_strategy
from vtp_plugin.strategies.stride import Stride
from vtp_plugin.surgery.pixels import Pixels, patches
from vtp_plugin.surgery.question import question_of

IMAGES = [part for row in prompts("batch") for part in row if isinstance(part, Tensor)]


class Probe(Stride):
    """Remembers what it is shown, and keeps every other token."""

    name = "probe"
    needs = ("cls", "cls_attention", "keys", "aligned", "text", "fingerprint")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.shown: list[VisualTokens] = []
        self.block: int | None = None
        self.checkpoint = ""

    @property
    def tower_layer(self) -> int | None:
        return self.block

    @property
    def clip_checkpoint(self) -> str:
        return self.checkpoint

    def select(self, visual: VisualTokens) -> Selection:
        self.shown.append(visual)
        return super().select(visual)


@pytest.fixture(params=FAMILIES)
def host(request) -> Iterator[Tiny]:
    if request.param == "llava":
        pytest.importorskip("llava")
    with torch.no_grad():
        yield tiny(request.param, "sdpa")


def probed(host: Tiny, rows: list[list[Any]], block: int | None = None, also: str = "") -> list[VisualTokens]:
    probe = Probe()
    probe.block, probe.checkpoint = block, str(host.clip)
    with host.prune([probe, *([also] if also else [])]):
        host.forward(rows)
    return probe.shown


def eager_tower(host: Tiny, images: list[Tensor]) -> Any:
    tower = tiny(host.family, "eager").tower
    return tower(host.normalise(images), output_attentions=True, output_hidden_states=True)


@pytest.mark.parametrize("block", [None, -1, -2, 0, 2])
def test_signals_of_the_tower_are_those_of_its_eager_attention(host: Tiny, block: int | None):
    (shown,) = probed(host, [row for row in prompts("batch") if any(isinstance(part, Tensor) for part in row)], block)
    eager, number = eager_tower(host, IMAGES), -2 if block is None else block
    hidden = (eager.hidden_states[1:])[number]
    assert torch.allclose(shown.tokens, eager.hidden_states[-2][:, 1:], atol=1e-5)
    assert torch.allclose(shown.cls_attention, eager.attentions[number][:, :, 0, 1:].mean(1), atol=1e-6)
    assert torch.allclose(shown.cls, eager.hidden_states[-2][:, 0], atol=1e-5)
    inner = getattr(host.tower, "vision_model", host.tower)
    attention = inner.encoder.layers[number].self_attn
    normed = inner.encoder.layers[number].layer_norm1(eager.hidden_states[:-1][number])
    keys = attention.k_proj(normed).unflatten(-1, (4, -1)).mean(2)[:, 1:]
    assert torch.allclose(shown.keys, keys, atol=1e-5)
    clip = CLIPModel.from_pretrained(host.clip)
    assert torch.allclose(shown.aligned, clip.visual_projection(inner.post_layernorm(hidden))[:, 1:], atol=1e-5)
    assert shown.grid == (GRID, GRID)
    assert shown.index.tolist() == [list(range(N))] * 3


def test_the_text_is_the_question_of_the_images_own_prompt(host: Tiny):
    rows = [row for row in prompts("batch") if any(isinstance(part, Tensor) for part in row)]
    (shown,) = probed(host, rows)
    clip, tokenizer = CLIPModel.from_pretrained(host.clip), AutoTokenizer.from_pretrained(host.clip)
    first, second = "w1 w5 w9 w10 w11 w41", "w1 w21 w22 w23 w24 w25"
    for embedded, question in zip(shown.text, [first, first, second], strict=True):
        expected = clip.get_text_features(**tokenizer(question, return_tensors="pt"))
        expected = getattr(expected, "pooler_output", expected)[0]
        assert torch.allclose(embedded, expected, atol=1e-5)


def test_a_question_longer_than_the_text_tower_is_truncated(host: Tiny):
    (shown,) = probed(host, [[1, picture(0), *range(10, 60)]])
    assert torch.isfinite(shown.text).all()


@pytest.mark.parametrize("block", [-1, -2])
def test_signals_of_what_an_earlier_stage_left(host: Tiny, block: int):
    """Gathered, and computed without the dropped patches."""
    (shown,) = probed(host, [[1, picture(0, 0.4), 7]], block, also="l2")
    left = shown.index[0].tolist()
    blocks = reference.clip_tower(host.tower, host.normalise([picture(0, 0.4)])[0], left)
    rows = [i + 1 for i in left]
    assert len(left) == N // 2
    assert torch.allclose(shown.tokens[0], blocks[-2].output[rows], atol=1e-5)
    assert torch.allclose(shown.cls_attention[0], blocks[block].attention[:, 0, rows].mean(0), atol=1e-6)
    assert torch.allclose(shown.keys[0], blocks[block].keys[:, rows].mean(0), atol=1e-5)
    assert torch.allclose(shown.cls[0], blocks[-2].output[0], atol=1e-5)


@pytest.mark.parametrize("layer", [1, 2, 3])
@torch.no_grad()
def test_fastv_keeps_what_the_eager_attentions_rank_highest(layer: int):
    """With transformers' model; what it records of the authors' one differs between two calls."""
    rows, host, eager = prompts("single"), tiny("llava_hf", "sdpa"), tiny("llava_hf", "eager")
    attentions = eager.forward(rows, output_attentions=True).attentions
    columns = slice(3, 3 + N)
    expected = reference.best(attentions[layer - 1][0, :, -1, columns].mean(0).tolist(), N // 2)
    for model in (host, eager):
        with model.prune(get_strategy("fastv")(layer=layer)) as pruned:
            model.forward(rows)
        (event,) = pruned.events
        assert (event.stage, event.layer, event.before, event.after) == (Stage.LLM, layer, [N], [N // 2])
        assert event.kept[0].tolist() == expected


def test_no_attention_implementation_is_changed(host: Tiny):
    with host.prune("fastv+visionzip", **{"visionzip.dominant": 5, "visionzip.contextual": 2}):
        assert host.decoder.config._attn_implementation == host.tower.config._attn_implementation == "sdpa"


# -- pixels -----------------------------------------------------------------------------------------------------------


def processor(**options: Any) -> CLIPImageProcessor:
    size = {"height": SIDE, "width": SIDE}
    return CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size, **options)


def photo(seed: int, side: int = 70) -> Image.Image:
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (side, side + 9, 3), generator=draw, dtype=torch.uint8)
    pixels[: side // 2] = torch.randint(240, 256, (side // 2, side + 9, 3), generator=draw, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())  # bright: normalised values above 2 are coarse in bf16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_levels_are_recovered_exactly(dtype: torch.dtype):
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    images = processor()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (images.image_mean, images.image_std))
    assert Pixels.of(images).images(((every / 255 - mean) / std).to(dtype)).equal(every)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("normalise", [True, False])
def test_the_patches_are_those_of_the_processors_image(dtype: torch.dtype, normalise: bool):
    raw = processor(do_normalize=False, do_rescale=False)(photo(0), return_tensors="pt")["pixel_values"].to(torch.uint8)
    images = processor(do_normalize=normalise)
    values = images(photo(0), return_tensors="pt")["pixel_values"].to(dtype)
    assert Pixels.of(images).images(values).equal(raw)
    assert patches(raw, PATCH)[0].equal(reference.patches(raw[0]))


def test_half_of_the_bits_need_a_look_at_the_processor():
    images = processor()
    outputs = [images(photo(s), return_tensors="pt") for s in range(5)]
    raw = [processor(do_normalize=False, do_rescale=False)(photo(s), return_tensors="pt") for s in range(5)]
    pixels = Pixels.of(images)
    coarse = outputs[3]["pixel_values"].to(torch.bfloat16)
    assert not pixels.images(coarse).equal(raw[3]["pixel_values"].to(torch.uint8))
    for output in outputs:
        pixels.remember(output)
    for output, image in zip(outputs, raw, strict=True):
        seen = pixels.images(output["pixel_values"].to(torch.bfloat16))
        assert seen.equal(image["pixel_values"].to(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_vprune_sees_the_image_that_left_the_watched_processor(dtype: torch.dtype):
    """Through a model whose pixel values are rounded to `dtype` on their way."""
    host = tiny("llava_hf")
    shown: list[Tensor] = []

    class Looking(get_strategy("vprune")):
        def select(self, visual: VisualTokens) -> Selection:
            shown.append(visual.pixels)
            return super().select(visual)

    inputs = host.inputs(prompts("single"))
    raw = processor(do_normalize=False, do_rescale=False)(photo(1), return_tensors="pt")["pixel_values"].to(torch.uint8)
    with host.prune(Looking()), torch.no_grad():
        inputs["pixel_values"] = host.images(photo(1), return_tensors="pt")["pixel_values"].to(dtype)
        embeddings = getattr(host.tower, "vision_model", host.tower).embeddings
        weight = embeddings.patch_embedding.weight
        assert weight.dtype is torch.float32
        host.model.forward(**inputs)
    assert shown[0].equal(patches(raw, PATCH))


def test_a_fingerprint_is_the_same_in_single_and_half_precision():
    from vtp_plugin.surgery.pixels import fingerprints

    values = processor()([photo(s) for s in range(6)], return_tensors="pt")["pixel_values"]
    pixels = Pixels.of(processor())
    prints = [fingerprints(pixels.images(values.to(d))) for d in (torch.float32, torch.float16)]
    assert prints[0] == prints[1]
    assert len(set(prints[0])) == 6


# -- the question -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("A chat. USER: <image>\nWhat is it? ASSISTANT:", "What is it?"),
        ("A chat. USER: What is it?\nAnswer yes or no. ASSISTANT: ", "What is it?\nAnswer yes or no."),
        ("USER: first ASSISTANT: one USER: second ASSISTANT:", "second"),
        ("<|im_start|>".join(["", "system\nx\n", "user\nWhy?\n", "assistant\n"]).replace("<|im_start|>", ""), "Why?"),
        ("[INST] <image> Where? [/INST]", "Where?"),
        ("no template at all", "no template at all"),
    ],
)
def test_the_question_is_taken_out_of_the_chat_template(prompt: str, question: str):
    assert question_of(prompt) == question


def test_an_unused_namespace_is_no_processor():
    with pytest.raises(ValueError, match="pass the model's processor"):
        Pixels.of(SimpleNamespace(image_processor=None).image_processor)
