"""Qwen-Omni as a whole around a pruned thinker: it answers in text; speech about dropped tokens is refused.

The model that speaks is transformers' own, with the thinker of a tiny family in it and a talker that says when it is
asked for something.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, words
from family_runs import batched, model_of
from torch import nn

import vtp_plugin as vtp
from vtp_plugin.errors import PruningError
from vtp_plugin.promises.state import state

NAMES = [name for name in ("qwen2_5_omni", "qwen3_omni_moe") if name in FAMILIES]
TEXT = {"qwen2_5_omni": {"generation_mode": "text"}, "qwen3_omni_moe": {"return_audio": False}}
STAGES = {"projector": ("stride", {"at": "projector", "keep_ratio": 0.5}), "llm": ("fastv", {"layer": 3})}
SHORT = {"thinker_max_new_tokens": 3, "thinker_do_sample": False}


class Asked(Exception):
    """The talker was asked for something."""


class Talker(nn.Module):
    """Has what the host looks up before its thinker has answered, and nothing that it needs to speak."""

    codec_pad_token = 1

    def __getattr__(self, name: str) -> Any:
        raise Asked(name)


def whole(name: str) -> nn.Module:
    import transformers

    thinker = model_of(name, "sdpa")
    kind = {"qwen2_5_omni": "Qwen2_5Omni", "qwen3_omni_moe": "Qwen3OmniMoe"}[name]
    config = getattr(transformers, f"{kind}Config")(thinker_config=thinker.config.to_dict(), enable_audio_output=False)
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    if name == "qwen2_5_omni":
        model.speaker_map = {"Chelsie": {"bos_token": 3}}
    else:
        config.talker_config.speaker_id, config.talker_config.accept_hidden_layer = {"ethan": 1}, 2
    model.thinker, model.talker, model.has_talker = thinker, Talker(), True
    return model.eval()


def picture(name: str) -> dict[str, Any]:
    return batched(FAMILIES[name], (FAMILIES[name].sample(0, 1),))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_dropped_is_not_spoken_of(name: str, stage: str) -> None:
    """Refused before anything is generated; unpruned, and behind a refusal, the talker is asked."""
    model, inputs = whole(name), picture(name)
    with pytest.raises(Asked):
        model.generate(**inputs, **SHORT)
    before = state(model.thinker)
    strategy, fields = STAGES[stage]
    with vtp.prune(model.thinker, strategy, **fields) as pruned:
        with pytest.raises(
            PruningError, match=r"^speech is made of .*: ask for text \(.*\), or detach first$"
        ) as error:
            model.generate(**inputs, **SHORT)
        assert "\n" not in str(error.value)
        assert not pruned.events
    assert state(model.thinker) == before
    with pytest.raises(Asked):
        model.generate(**inputs, **SHORT)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", NAMES)
def test_the_whole_model_answers_in_text_as_its_thinker_does(name: str, stage: str) -> None:
    """With hidden states, too, where a caller wants to see them: nobody is going to speak of them."""
    model, inputs = whole(name), picture(name)
    strategy, fields = STAGES[stage]
    with vtp.prune(model.thinker, strategy, **fields) as pruned:
        wanted = {"output_hidden_states": True, "return_dict_in_generate": True}
        alone = model.thinker.generate(**inputs, max_new_tokens=3, do_sample=False, **wanted)
        said = model.generate(**inputs, **TEXT[name], **SHORT)
        seen = model.generate(**inputs, **TEXT[name], **SHORT, **{f"thinker_{key}": v for key, v in wanted.items()})
        assert len(pruned.events) == 3
        assert all(event.after[0] < event.before[0] for event in pruned.events)
    assert torch.equal(said, alone.sequences)
    assert torch.equal(seen.sequences, alone.sequences)
    assert all(map(torch.equal, seen.hidden_states[0], alone.hidden_states[0]))


@pytest.mark.parametrize("name", NAMES)
def test_where_nothing_is_dropped_the_model_speaks(name: str) -> None:
    """Of a prompt without a picture, and with nothing attached that prunes."""
    model, alone = whole(name), torch.tensor([words(9, 3)])
    with vtp.prune(model.thinker, "stride", at="projector", keep_ratio=0.5), pytest.raises(Asked):
        model.generate(input_ids=alone, attention_mask=torch.ones_like(alone), **SHORT)
    with vtp.prune(model.thinker, "none"), pytest.raises(Asked):
        model.generate(**picture(name), **SHORT)
