"""Random checkpoints that vLLM serves, loud enough that answers depend on what is seen and where; and what they answer.

The reference is the transformers path on the same folder: greedy answers with log-probabilities, kept indices.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import MEANS, VISION_MARKS, template, tokenizer
from engines import ANSWER, Request, answers, logprobs, reference, scenes
from families import GEMMA_LAYERS, GEMMA_ROPE, IMAGE, QWEN_VISION, TEXT, VIDEO, VISION
from safetensors.torch import load_file, save_file
from served_internvl import LARGE, published

from vtp_plugin import get_strategy, list_strategies, prune
from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.vllm.plan import strategies_of
from vtp_plugin.stages import Stage

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LANGUAGE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
MARKS = {"vision_start_token_id": 185, "vision_end_token_id": 186, "image_token_id": IMAGE, "video_token_id": VIDEO}
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
UNIT = 8  # pixels per side of a merge unit
TILE = 48  # pixels per side of a tile
QWEN = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL", "qwen3_vl_moe": "Qwen3VLMoe"}
AXES = {"mrope_section": [4, 6, 6]}
INTERLEAVED = {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "decoder_sparse_step": 1}
EXPERTS |= {"norm_topk_prob": True}
SHARED = {"hidden_size": 64, "intermediate_size": 48, "out_hidden_size": 64, "num_heads": 2}
DEEP = SHARED | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
TOWERS = {  # what is a tower's own
    "qwen2_vl": {"embed_dim": 64, "hidden_size": 64, "mlp_ratio": 1, "num_heads": 2},
    "qwen2_5_vl": SHARED | {"window_size": 2 * UNIT, "fullatt_block_indexes": [1]},
    "qwen3_vl": DEEP,
    "qwen3_vl_moe": DEEP,
}
LANGUAGES = {
    "qwen2_vl": {"rope_parameters": ROPE | AXES},
    "qwen2_5_vl": {"rope_parameters": ROPE | AXES},
    "qwen3_vl": {"rope_parameters": ROPE | INTERLEAVED},
    "qwen3_vl_moe": {"rope_parameters": ROPE | INTERLEAVED, "mlp_only_layers": []} | EXPERTS,
}
INTERN = {"hidden_size": 64, "num_attention_heads": 2, "patch_size": [4, 4], "image_size": [TILE, TILE]}
INTERN |= {"attention_bias": True}
CLOSE = 2e-4  # log-probabilities, fp32 kernels of two hosts


@cache
def folder_of(family: str) -> Path:
    """A random checkpoint with a real processor."""
    config, model, processor = _qwen(family) if family in QWEN else OTHERS[family]()
    torch.manual_seed(0)
    model = model(config).eval()
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            entering = weight.shape[-1] if weight.ndim == 3 else weight[0].numel()
            torch.nn.init.normal_(weight, std=entering**-0.5 * (3 if "proj" in name else 1))
    target = Path(tempfile.mkdtemp(prefix=f"vtp_{family}_"))
    atexit.register(shutil.rmtree, target)
    model.save_pretrained(target)
    processor.save_pretrained(target)
    _as_published(target / "model.safetensors", family)
    return target


def _as_published(file: Path, family: str) -> None:
    """With the shapes and names of published checkpoints, which transformers changes where it reads them.

    Experts are [E, in, out]; a SigLIP has one level more.
    """
    weights = load_file(file)
    if family == "qwen3_vl_moe":
        weights |= {name: weight.mT.contiguous() for name, weight in weights.items() if ".experts." in name}
    if family == "gemma3":
        weights = {n.replace("vision_tower.", "vision_tower.vision_model."): w for n, w in weights.items()}
    save_file(weights, file, metadata={"format": "pt"})


def _qwen(family: str) -> tuple[Any, type, Any]:
    import transformers

    names = QWEN[family]
    vision, text = QWEN_VISION | TOWERS[family], TEXT | LANGUAGE | LANGUAGES[family]
    config = getattr(transformers, f"{names}Config")(vision_config=vision, text_config=text, **MARKS)
    patches = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    size = {"size": {"shortest_edge": 16 * UNIT**2, "longest_edge": 256 * UNIT**2}}
    plain = names.removesuffix("Moe")
    processor = getattr(transformers, f"{plain}Processor")(
        transformers.Qwen2VLImageProcessor(**patches, **MEANS, **size),
        tokenizer(VISION_MARKS | {IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>"}),
        getattr(transformers, f"{plain.replace('2_5_', '2')}VideoProcessor")(**patches, **MEANS, **size),
        chat_template=template(PICTURE, PICTURE.replace("image", "video"), "<|im_start|>"),
    )
    return config, getattr(transformers, f"{names}ForConditionalGeneration"), processor


def _internvl() -> tuple[Any, type, Any]:
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
        Qwen3Config,
    )
    from transformers.models.internvl import InternVLVisionConfig

    vision = InternVLVisionConfig(**VISION | INTERN)
    text = Qwen3Config(**TEXT | LANGUAGE)
    config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    names = {185: "<img>", 186: "</img>", IMAGE: "<IMG_CONTEXT>", VIDEO: "<video>"}
    marks = {"start_image_token": "<img>", "end_image_token": "</img>"}
    marks |= {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    size = {"height": TILE, "width": TILE}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=True, max_patches=4, **MEANS),
        tokenizer(names, **marks),
        InternVLVideoProcessor(size=size, **MEANS),
        image_seq_length=(TILE // UNIT) ** 2,
        chat_template=template("<IMG_CONTEXT>\n", "<video>\n"),
    )
    return config, InternVLForConditionalGeneration, processor


def _gemma3() -> tuple[Any, type, Any]:
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessor,
        Gemma3Processor,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )

    tower = {"hidden_size": 64, "num_attention_heads": 2, "patch_size": 4, "image_size": 48, "vision_use_head": False}
    layers = {"layer_types": GEMMA_LAYERS, "rope_parameters": GEMMA_ROPE, "num_hidden_layers": len(GEMMA_LAYERS)}
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**VISION | tower),
        text_config=Gemma3TextConfig(**TEXT | LANGUAGE | layers, sliding_window=64, query_pre_attn_scalar=32),
        mm_tokens_per_image=36,
        image_token_id=IMAGE,
    )
    marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    newlines = {186 + n: "\n" * n for n in (2, 3)} | {183: "\n" * 4}
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": TILE, "width": TILE}, **MEANS),
        tokenizer(dict(zip((185, 186, IMAGE), marks.values(), strict=True)) | newlines, **marks),
        image_seq_length=36,
        chat_template=template("<start_of_image>"),
    )
    return config, Gemma3ForConditionalGeneration, processor


OTHERS: dict[str, Callable[[], tuple[Any, type, Any]]] = {
    "internvl": _internvl,
    "internvl_chat": partial(published, "Qwen2", TEXT | LANGUAGE, VISION | INTERN),  # as in InternVL3
    "internvl_chat_6b": partial(published, "Qwen3", TEXT | LANGUAGE, VISION | INTERN | LARGE),  # InternVL3.5-38B
    "gemma3": _gemma3,
}


def write(request: Request, picture: str = PICTURE) -> str:
    """A prompt, by default of a Qwen-VL."""
    images, question = request
    return "<|im_start|>" + picture * len(images) + question + "\nAnswer:"


def requests(
    sizes: Sequence[tuple[int, int]] = ((144, 72), (56, 112), (88, 104), (64, 96), (120, 40)),
) -> list[Request]:
    """Five pictures of as many sizes; the last request has two of them."""
    pictures = [picture.resize(size) for (picture, _), size in zip(scenes(5), sizes, strict=True)]
    asked = [questions[number % len(questions)] for number, (_, questions) in enumerate(scenes(4))]
    return [
        *(([picture], question) for picture, question in zip(pictures, asked[:3], strict=False)),
        (pictures[3:], asked[3]),
    ]


# -- transformers ------------------------------------------------------------------------------------------------------


def expected(
    folder: Path,
    settings: Mapping[str, Any],
    asked: Sequence[Request],
    write: Callable[[Request], str] = write,
    without: Sequence[str] = (),
    **arguments: Any,
) -> list[dict[str, Any]]:
    """Answer, its log-probabilities, kept indices, and positions of all tokens, per request; `without` some inputs.

    `arguments` are the processor's.
    """
    model, processor = reference(folder)
    hyper = {name: value for name, value in settings.items() if name != "strategy"}
    found = []
    with prune(model, settings["strategy"], processor=processor, **hyper) as pruned:
        for request in asked:
            pruned.events.clear()
            given = processor(images=list(request[0]), text=write(request), return_tensors="pt", **arguments)
            inputs = {name: value for name, value in given.items() if name not in without}
            seen, hook = watched(rotary(model), lambda args, kwargs: args[1])
            greedy = {"do_sample": False, "return_dict_in_generate": True, "output_scores": True}
            output = model.generate(**inputs, max_new_tokens=ANSWER, **greedy)
            hook.remove()
            ids = output.sequences[0, -len(output.scores) :]
            scores = torch.stack(output.scores)[:, 0].log_softmax(-1).gather(1, ids[:, None])[:, 0]
            kept = [index.tolist() for event in pruned.events for index in event.kept]
            positions = torch.cat([table[:, 0] for table in seen], dim=1) if seen[0].ndim == 3 else None
            found.append({"ids": ids.tolist(), "logprobs": scores.tolist(), "kept": kept, "positions": positions})
    return found


def rotary(model: Any) -> Any:
    """Where a language model gets its angles."""
    return next(m for name, m in model.named_modules() if name.endswith("rotary_emb") and "language_model" in name)


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


@contextmanager
def rows_of(llm: Any) -> Iterator[list[int]]:
    """How many patches enter the first block of a Qwen-VL's tower inside vLLM, per pass."""
    attention = llm.apply_model(lambda model: model.visual.blocks[0].attn)[0]
    entered: list[int] = []
    hook = attention.register_forward_pre_hook(lambda module, args: entered.append(len(args[0])))
    try:
        yield entered
    finally:
        hook.remove()


def alike(outputs: Sequence[Any], wanted: Sequence[Mapping[str, Any]]) -> None:
    """Tokens and their probabilities."""
    assert answers(outputs) == [want["ids"] for want in wanted]
    for found, want in zip(logprobs(outputs), wanted, strict=True):
        assert found == pytest.approx(want["logprobs"], abs=CLOSE)


# -- what is served ----------------------------------------------------------------------------------------------------

DEPTH = {"hiprune": {"shallow": 1}, "vscan": {"shallow": 1}}  # the tiny towers have few blocks


def settings_of(name: str, keep: float = 0.25) -> dict[str, Any]:
    at = {"at": "projector"} if "projector" in getattr(get_strategy(name), "places", ()) else {}
    return {"strategy": name, "keep_ratio": keep, **at, **DEPTH.get(name, {})}


def servable(name: str, absent: set[str]) -> bool:
    """Whether a strategy has a setting of the projector stage that needs none of these signals."""
    strategy = get_strategy(name)
    if strategy.text_encoder == "llm":  # the language model's embeddings are not possible inside vLLM
        return False
    try:
        strategies = strategies_of(settings_of(name))
    except PruningError:
        return False
    return strategy().budgeted and strategies[0].stage is Stage.PROJECTOR and not absent & set(strategies[0].needs)


def served(absent: set[str]) -> list[str]:
    return [name for name in list_strategies() if servable(name, absent)]


def named(case: Any) -> str:
    return case if isinstance(case, str) else "-".join(map(str, case.values()))
