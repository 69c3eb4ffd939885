"""A setting that does not fit a model: refused from its configuration before weights are loaded, or when attaching."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from models import tiny

import vtp_plugin as vtp
from vtp_plugin import config, fits
from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.transformers import checkpoints


def refusal(call: Any, *arguments: Any, **named: Any) -> str:
    with pytest.raises(PruningError) as error:
        call(*arguments, **named)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_layer_that_the_model_does_not_have_is_known_from_its_configuration() -> None:
    model = {"text_config": {"num_hidden_layers": 4}, "vision_config": {"num_hidden_layers": 6}}
    fits.refuse(config.resolve("fastv+atp"), model)
    said = refusal(fits.refuse, config.resolve("fastv", {"layer": 99}), model)
    assert said == "fastv: layer must be in 1 ... 3 for this model, got 99: its language model has 4 layers"
    said = refusal(fits.refuse, config.resolve("atp", {"layer": 9}), model)
    assert said == "atp: layer must be in -6 ... 5 for this model, got 9: its vision tower has 6 blocks"
    said = refusal(fits.refuse, config.resolve("hiprune"), model)
    assert said == "hiprune: shallow must be in -6 ... 5 for this model, got 8: its vision tower has 6 blocks"
    fits.refuse(config.resolve("coreprune"), model)  # at a quarter of any depth
    said = refusal(fits.refuse, config.resolve("coreprune", {"layer": 8}), model)
    assert said == "coreprune: layer must be in 1 ... 3 for this model, got 8: its language model has 4 layers"
    fits.refuse(config.resolve("fastv", {"layer": 99}), {"num_hidden_layers": True})


FIXED = {"image_size": 24, "patch_size": 4}  # 36 tokens


@pytest.mark.parametrize(
    ("model", "tokens"),
    [
        ({"architectures": ["LlavaForConditionalGeneration"], "vision_config": FIXED}, 36),
        ({"architectures": ["LlavaLlamaForCausalLM"], "vision_config": FIXED, "image_aspect_ratio": "pad"}, 36),
        ({"architectures": ["LlavaLlamaForCausalLM"], "vision_config": FIXED, "image_aspect_ratio": "anyres"}, None),
        ({"architectures": ["Gemma3ForConditionalGeneration"], "mm_tokens_per_image": 256}, 256),
        ({"architectures": ["Qwen2VLForConditionalGeneration"], "vision_config": FIXED}, None),
        ({"architectures": ["LlavaNextForConditionalGeneration"], "vision_config": FIXED}, None),
        ({"architectures": ["Unheard"], "vision_config": FIXED}, None),
        ({"architectures": "odd", "vision_config": []}, None),
        ({"architectures": ["LlavaForConditionalGeneration"], "vision_config": {"image_size": "24"}}, None),
    ],
    ids=str,
)
def test_more_tokens_than_an_image_has_are_known_from_the_configuration(
    model: dict[str, Any], tokens: int | None
) -> None:
    fits.refuse(kept_of(tokens or 100_000), model)
    fits.refuse(kept_of(100_000, budget="total"), model)
    if tokens is not None:
        said = refusal(fits.refuse, kept_of(tokens + 1), model)
        assert said == f"stride: keep_tokens must be at most {tokens}, the tokens of an image here, got {tokens + 1}"


def kept_of(kept: int, **fields: Any) -> Any:
    return config.resolve("stride", {"keep_tokens": kept, **fields})


def test_a_checkpoint_is_asked_with_its_defaults_written_out(tmp_path: Path) -> None:
    """A published configuration leaves out what is its class's default; the authors' name their tower."""
    path = tmp_path / "config.json"
    vision = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}
    said = {"model_type": "llava", "text_config": {"model_type": "llama"}, "vision_config": vision}
    path.write_text(json.dumps(said | {"architectures": ["LlavaForConditionalGeneration"]}))
    late = config.resolve("fastv", {"layer": 32})
    assert "1 ... 31 for this model" in refusal(checkpoints.refuse_checkpoint, late, tmp_path)
    assert "at most 576" in refusal(checkpoints.refuse_checkpoint, kept_of(577), tmp_path)
    checkpoints.refuse_checkpoint(kept_of(576), tmp_path)
    checkpoints.refuse_checkpoint(kept_of(577), tmp_path / "nowhere")
    checkpoints.refuse_checkpoint(kept_of(577), "")
    authors = tmp_path / "authors"
    authors.mkdir()
    own = {"model_type": "none", "architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": str(tmp_path)}
    (authors / "config.json").write_text(json.dumps(own))
    assert "at most 576" in refusal(checkpoints.refuse_checkpoint, kept_of(577), authors)
    path.write_text("{")
    assert "half-written" in refusal(checkpoints.refuse_checkpoint, kept_of(577), tmp_path)


@pytest.mark.parametrize("at", ["vit", "projector", "llm"])
def test_more_tokens_than_an_image_has_are_refused_when_attaching(at: str) -> None:
    model = tiny("llava_hf").model
    fields = {"at": at} | ({"layer": 1} if at == "llm" else {})
    said = refusal(vtp.prune, model, "stride", keep_tokens=37, **fields)
    assert said == "stride: keep_tokens must be at most 36, the tokens of an image here, got 37"
    with vtp.prune(model, "stride", keep_tokens=36, **fields):
        pass
