"""A model that is nearly one of a family is told what is missing, and left as it was."""

from __future__ import annotations

from typing import Any

import families
import pytest
from internvl_chat import InternVLChatModel
from models import build_authors, build_hf
from torch import nn

import vtp_plugin as vtp
from vtp_plugin import plugins
from vtp_plugin.errors import PruningError
from vtp_plugin.promises.state import state

LATER = {"minicpmv4_6", "minicpmv4_7"} - families.FAMILIES.keys()  # than the installed release
FACTS = [
    (adapter.family, path) for adapter in plugins.adapters() for path in adapter.facts if adapter.family not in LATER
]
OTHER = {"vision_feature_layer": [-2, -1], "vision_feature_select_strategy": "cls"}  # else a tower of another kind


def built(family: str) -> nn.Module:
    if family == "internvl_chat":
        return InternVLChatModel(families.FAMILIES["internvl"].build("sdpa"))
    return build_hf("sdpa").model if family == "llava_hf" else families.FAMILIES[family].build("sdpa")


@pytest.mark.parametrize(("family", "path"), FACTS)
def test_a_fact_that_differs_is_named(family: str, path: str):
    model = built(family)
    *inner, last = path.split(".")
    config = model.config
    for part in inner:
        config = getattr(config, part)
    value = OTHER.get(path, "dinov3_vit")
    object.__setattr__(config, last, value)
    before = state(model)
    with pytest.raises(PruningError) as error:
        vtp.prune(model, "stride")
    message = str(error.value)
    assert message.startswith(f"this {type(model).__name__} is nearly what ")
    assert f"{path}={value!r}, only " in message
    assert "\n" not in message
    assert state(model) == before


def test_a_llava_with_another_tower():
    """LLaVA with Pixtral: transformers loads it into the class of LLaVA-1.5. Every LLaVA says what differs."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PixtralVisionConfig

    vision = PixtralVisionConfig(**families.VISION, patch_size=4, image_size=16)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**families.TEXT), vision_feature_layer=-1)
    with pytest.raises(PruningError) as error:
        vtp.prune(LlavaForConditionalGeneration(config), "fastervlm")
    for tower in ("clip_vision_model", "siglip_vision_model"):
        assert f"vision_config.model_type='pixtral', only '{tower}' is" in str(error.value)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda m: setattr(m.get_vision_tower(), "is_loaded", False), "its vision tower is not loaded: call model.get"),
        (
            lambda m: setattr(m.get_vision_tower(), "select_feature", "cls_patch"),
            "it projects mm_vision_select_feature='cls_",
        ),
        (lambda m: setattr(m.config, "image_aspect_ratio", "anyres_max_9"), "image_aspect_ratio is 'anyres_max_9'"),
        (lambda m: setattr(m.model, "vision_tower", nn.Identity()), "its vision tower is Identity, only CLIPVisionTow"),
        (lambda m: setattr(type(m), "__name__", "LlavaMistralForCausalLM"), "only LLaMA is possible yet"),
    ],
)
def test_the_authors_package(spoil: Any, said: str, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("llava")
    model = build_authors("sdpa").model
    model.__class__ = type(type(model).__name__, (type(model),), {})  # a class of its own, which may be renamed
    spoil(model)
    with pytest.raises(PruningError, match=rf"^this {type(model).__name__} is nearly what LLaVA-1.5") as error:
        vtp.prune(model, "stride")
    assert said in str(error.value)
    assert "\n" not in str(error.value)
