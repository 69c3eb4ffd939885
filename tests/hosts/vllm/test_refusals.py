"""What cannot be served is refused before anything is loaded, in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engines import WHOLE, engine
from transformers import AutoConfig

from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.vllm import Refused
from vtp_plugin.hosts.vllm.plan import Plan, strategies_of
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.tiny.checkpoint import resolve
from vtp_plugin.tokens import Selection, VisualTokens

SENTENCES = [
    ({"strategy": "visonzip"}, "unknown strategy 'visonzip'. Did you mean 'visionzip'?"),
    ({"strategy": "visionzip", "keep_ratio": 2}, "visionzip: keep_ratio must be in (0, 1], got 2"),
    ({"strategy": "visionzip", "keep_radio": 0.5}, "unknown field 'keep_radio'"),
    ({"strategy": "fastv"}, "fastv: vLLM fixes its attention metadata"),
    ({"strategy": "atp+fastv"}, "fastv: vLLM fixes its attention metadata"),
    ({"strategy": "prumerge"}, "prumerge: vLLM reserves the prompt's columns before the vision tower runs"),
    ({"strategy": "divprune", "budget": "total"}, "divprune: budget=total is not possible inside vLLM"),
    ({"strategy": "atp", "layer": 9}, "atp: layer must be in -6 ... 5 for this model, got 9"),
    ({"strategy": "vprune+downsample"}, "downsample: no strategy may drop patches before it"),
    ({"strategy": "tome"}, "tome: merging inside the tower's blocks is not possible inside vLLM"),
    ({"strategy": "l2", "positions": "original"}, "l2: vLLM counts positions by columns of the prompt"),
    ({"strategy": "cdpruner", "text_encoder": "llm"}, "cdpruner: text_encoder=llm is not possible inside vLLM"),
    ({"strategy": "mmtok"}, "mmtok: the language model's embeddings of a question are not possible inside vLLM"),
    ({"strategy": "evs"}, "evs: the frames of a video are not shown inside vLLM, where only pictures are pruned"),
    ({"keep_ratio": 0.5}, "expected {'strategy': NAME, ...}"),
]


@pytest.mark.parametrize(("settings", "sentence"), SENTENCES, ids=lambda value: str(value)[:40])
def test_a_bad_configuration_is_refused_in_one_sentence(settings: dict[str, Any], sentence: str):
    with pytest.raises(Refused) as refusal, engine(settings):
        pass
    assert str(refusal.value).startswith(f"vtp_pruning: {sentence}")
    assert "\n" not in str(refusal.value)


def test_an_architecture_without_support_is_refused(tmp_path: Path):
    """A language model: the configuration would otherwise do nothing, in silence."""
    config = AutoConfig.from_pretrained(resolve("vtp-tiny", "hf")).text_config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    from vllm.config import ModelConfig

    with pytest.raises(Refused, match=r"LlamaForCausalLM cannot be pruned inside vLLM\. Supported: Llava"):
        ModelConfig(str(tmp_path), tokenizer=str(resolve("vtp-tiny", "hf")), hf_overrides=hf({"strategy": "l2"}))


def test_another_tower_of_a_supported_architecture_is_refused(tmp_path: Path):
    config = json.loads((resolve("vtp-tiny", "hf") / "config.json").read_text())
    config["vision_config"] |= {"model_type": "siglip_vision_model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    from vllm.config import ModelConfig

    with pytest.raises(Refused, match="models with a CLIP tower"):
        ModelConfig(str(tmp_path), tokenizer=str(resolve("vtp-tiny", "hf")), hf_overrides=hf({"strategy": "l2"}))


def test_a_method_whose_number_follows_from_features_is_found_out():
    class Fickle(PruningStrategy):
        name, stage, paper = "fickle", Stage.PROJECTOR, "none"

        def select(self, visual: VisualTokens) -> Selection:
            return Selection(visual.tokens[..., 0] > 0.5)

    with pytest.raises(PruningError, match="fickle: how many tokens it keeps depends on the image"):
        Plan([Fickle()], (12, 12), 14, 6)


@pytest.mark.parametrize(
    ("settings", "number"),
    [
        ({"strategy": "visionzip", "keep_tokens": 20}, 20),
        ({"strategy": "l2+divprune", "l2.keep_tokens": 100, "divprune.keep_ratio": 0.5}, 50),
        ({"strategy": "dart", "at": "projector", "keep_tokens": 32, "pivots_extra": True}, 36),
        ({"strategy": "vprune", "bins": 4}, WHOLE),
    ],
)
def test_the_number_of_columns_is_what_the_strategies_leave(settings: dict[str, Any], number: int):
    """V-PRUNE's is unknown before it sees the image: as many as there can be."""
    assert Plan(strategies_of(settings), (12, 12), 14, 6).count(WHOLE) == number


def test_registering_again_changes_nothing():
    from vllm.model_executor.models import ModelRegistry

    from vtp_plugin.hosts.vllm import register

    register()
    before = ModelRegistry.inspect_model_cls
    register()
    assert ModelRegistry.inspect_model_cls is before
    assert not hasattr(before._vtp, "_vtp")


def test_a_model_without_a_configuration_is_not_looked_at():
    from vtp_plugin.hosts.vllm import _inspecting

    answer, config = object(), SimpleNamespace(hf_config=SimpleNamespace(architectures=["Anything"]))
    assert _inspecting(lambda *given: answer, ["Anything"], config) is answer
    assert config.hf_config.architectures == ["Anything"]


def hf(settings: dict[str, Any]) -> dict[str, Any]:
    return {"vtp_pruning": settings}
