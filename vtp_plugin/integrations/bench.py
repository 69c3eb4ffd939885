"""Speed without checkpoints: random weights in a real model's shape, pruned against unpruned and against the ideal.

The ideal is the same model given exactly K visual tokens by hand, with no plugin at all: the tower's blocks run on K
patches (pixels, vit), the projector gets K rows (projector), or the decoder layers change length at layer K (llm).
All sides use the same attention kernel, are warmed up, run in turn, and are timed with the device synchronised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.errors import unknown
from vtp_plugin.metrics.latency import clock
from vtp_plugin.pruning import prune
from vtp_plugin.reporting.record import samples_of
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery.call import Call

QUESTION_TOKENS = 75  # text tokens around the image: system prompt, question and tail of a usual request


def _vision(width: int, layers: int, image: int) -> dict[str, int]:
    """A CLIP tower with patches of 14 pixels and heads of 64."""
    heads = width // 64
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": image,
        "patch_size": 14,
        "projection_dim": 768,
    }


def _text(width: int, mlp: int, layers: int, vocabulary: int = 32064) -> dict[str, int]:
    """A LLaMA with heads of 128."""
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 128,
        "vocab_size": vocabulary,
    }


SHAPES = {
    "llava-1.5-7b": {"vision": _vision(1024, 24, 336), "text": _text(4096, 11008, 32)},
    "llava-1.5-13b": {"vision": _vision(1024, 24, 336), "text": _text(5120, 13824, 40)},
    "small": {"vision": _vision(128, 4, 168), "text": _text(256, 512, 4)},  # to try the command itself
}


@dataclass(frozen=True)
class Timing:
    """One strategy at one budget and batch size."""

    strategy: str
    keep: float | None
    batch: int
    tokens_before: int
    tokens_after: float  # mean over images
    flops_ratio: float
    ttft_seconds: float  # median
    unpruned_seconds: float
    ideal_seconds: float
    selector_seconds: float
    peak_bytes: int | None  # CUDA only

    @property
    def ttft_ratio(self) -> float:
        return self.ttft_seconds / self.unpruned_seconds

    @property
    def over_ideal(self) -> float:
        return self.ttft_seconds / self.ideal_seconds

    @property
    def realised(self) -> float | None:
        """Share of the theoretical gain in FLOPs that arrives as time."""
        gain = 1 - self.flops_ratio
        return (1 - self.ttft_ratio) / gain if gain > 0 else None

    @property
    def break_even(self) -> float | None:
        """Visual tokens from which pruning pays, if saving and overhead stay what they are per token and per call."""
        overhead = max(0.0, self.ttft_seconds - self.ideal_seconds)
        saving = (self.unpruned_seconds - self.ideal_seconds) / self.tokens_before
        return overhead / saving if saving > 0 else None

    def as_json(self) -> dict[str, Any]:
        derived = ("ttft_ratio", "over_ideal", "realised", "break_even")
        return asdict(self) | {name: getattr(self, name) for name in derived}


def build(shape: str, layers: int | None, device: torch.device, dtype: torch.dtype, attention: str) -> nn.Module:
    """A LLaVA of that shape with random weights; `layers` cuts the language model short."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    if shape not in SHAPES:
        raise unknown("shape", shape, SHAPES)
    sizes = SHAPES[shape]
    text = dict(sizes["text"], pad_token_id=0)
    text["num_hidden_layers"] = layers or text["num_hidden_layers"]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes["vision"]),
        text_config=LlamaConfig(**text),
        image_token_id=32000,
        attn_implementation=attention,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(default)


def inputs_of(model: nn.Module, batch: int) -> dict[str, Tensor]:
    """Random pictures and prompts of one image each."""
    vision, device = model.config.vision_config, next(model.parameters()).device
    visual = (vision.image_size // vision.patch_size) ** 2
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 30000, (batch, QUESTION_TOKENS + visual), generator=generator)
    ids[:, QUESTION_TOKENS // 2 : QUESTION_TOKENS // 2 + visual] = model.config.image_token_id
    pixels = torch.randn(batch, 3, vision.image_size, vision.image_size, generator=generator)
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "pixel_values": pixels.to(device, model.dtype),
    }


def compare(
    model: nn.Module, strategies: Sequence[PruningStrategy], processor: Any, batch: int, repeats: int
) -> list[Timing]:
    """Time every strategy against the unpruned model and its ideal, in turn."""
    inputs = inputs_of(model, batch)
    return [_timing(model, strategy, processor, inputs, repeats) for strategy in strategies]


def _timing(
    model: nn.Module, strategy: PruningStrategy, processor: Any, inputs: dict[str, Tensor], repeats: int
) -> Timing:
    calls: list[Call] = []
    device = inputs["input_ids"].device
    with prune(model, strategy, processor=processor) as pruned:
        pruned.finished.append(calls.append)
        _first_token(model, inputs)
        reports = samples_of(pruned, calls[-1])
        images = [image for report in reports for image in report["images"]]
        before, after = images[0]["before"], sum(image["after"] for image in images) / len(images)
        flops = [report["prefill_flops"] for report in reports]
    kept = round(after)

    def with_plugin() -> None:
        _first_token(model, inputs)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds: dict[str, list[float]] = {"unpruned": [], "ideal": [], "pruned": []}
    for repeat in range(repeats + 1):
        unpruned = _timed(lambda: _first_token(model, inputs), device)
        best = _timed(lambda: ideal(model, inputs, kept, strategy), device)
        with prune(model, strategy, processor=processor):
            took = _timed(with_plugin, device)
        if repeat:  # the first round warms up
            for name, value in (("unpruned", unpruned), ("ideal", best), ("pruned", took)):
                seconds[name].append(value)
    return Timing(
        strategy=strategy.name,
        keep=strategy.keep_ratio,
        batch=len(inputs["input_ids"]),
        tokens_before=before,
        tokens_after=after,
        flops_ratio=sum(f["after"] for f in flops) / sum(f["before"] for f in flops),
        ttft_seconds=median(seconds["pruned"]),
        unpruned_seconds=median(seconds["unpruned"]),
        ideal_seconds=median(seconds["ideal"]),
        selector_seconds=calls[-1].seconds.get("selector", 0.0),
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    started = clock(device)
    with torch.no_grad():
        run()
    return clock(device) - started


def _first_token(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs, use_cache=True, logits_to_keep=1).logits


def ideal(model: nn.Module, inputs: dict[str, Tensor], kept: int, strategy: PruningStrategy) -> Tensor:
    """The first token of the same model with exactly `kept` visual tokens, by hand and without any plugin."""
    early = strategy.stage in (Stage.PIXELS, Stage.VIT)
    late = strategy.stage is Stage.LLM
    core = model.model
    features = _tower(core, inputs["pixel_values"], kept if early else None)
    features = core.multi_modal_projector(features if late else features[:, :kept])  # [B, K, D]
    text = core.get_input_embeddings()(inputs["input_ids"][:, :QUESTION_TOKENS])
    half = QUESTION_TOKENS // 2
    embeds = torch.cat([text[:, :half], features, text[:, half:]], dim=1)
    hidden = _two_lengths(core, embeds, kept, strategy) if late else _language(core, embeds)
    return model.lm_head(hidden[:, -1:])


def _tower(core: nn.Module, pixels: Tensor, kept: int | None) -> Tensor:
    """Features of the projected layer, the blocks running on the first `kept` patches."""
    tower = getattr(core.vision_tower, "vision_model", core.vision_tower)
    hidden = tower.embeddings(pixels)
    hidden = tower.pre_layrnorm(hidden if kept is None else hidden[:, : kept + 1])
    layers = list(tower.encoder.layers)
    for number, layer in enumerate(layers):
        output = layer(hidden, attention_mask=None)
        hidden = output[0] if isinstance(output, tuple) else output
        if number == len(layers) + core.config.vision_feature_layer:
            features = hidden
    return features[:, 1:]


def _language(core: nn.Module, embeds: Tensor) -> Tensor:
    return core.language_model(inputs_embeds=embeds, use_cache=True).last_hidden_state


def _two_lengths(core: nn.Module, embeds: Tensor, kept: int, strategy: PruningStrategy) -> Tensor:
    """The decoder layers, the later ones on a shorter sequence."""
    from transformers import DynamicCache

    language, length = core.language_model, embeds.shape[1]
    half, dropped = QUESTION_TOKENS // 2, length - QUESTION_TOKENS - kept
    columns = torch.cat([torch.arange(half + kept), torch.arange(half + kept + dropped, length)]).to(embeds.device)
    positions = torch.arange(length, device=embeds.device)[None]
    tables, hidden = language.rotary_emb(embeds, position_ids=positions), embeds
    cache = DynamicCache(config=language.config)
    for number, layer in enumerate(language.layers):
        if number == strategy.decoder_layer:
            hidden, tables = hidden[:, columns], tuple(table[:, columns] for table in tables)
        output = layer(hidden, attention_mask=None, position_embeddings=tables, past_key_values=cache, use_cache=True)
        hidden = output[0] if isinstance(output, tuple) else output
    return language.norm(hidden)
