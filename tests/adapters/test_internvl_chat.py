"""InternVL's own code against transformers' InternVL with the same weights: what is kept, and every logit."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES, IMAGE, VARIANTS, Numbers, Prompt, words
from family_runs import SHALLOW, STRATEGIES, batched, generated, new_tensors, prompts_of
from internvl_chat import InternVLChatModel, Words
from torch import nn

import vtp_plugin as vtp
from vtp_plugin import plugins
from vtp_plugin.adapters.internvl import InternVL
from vtp_plugin.adapters.internvl_chat import InternVLChat
from vtp_plugin.errors import PruningError

STRUCTURES = {"internvl": FAMILIES, "internvl3_5": VARIANTS, "internvl_6b": VARIANTS}
CASES = [(name, fields) for stage in STRATEGIES.values() for name, fields in stage]
PROCESSOR = SimpleNamespace(
    image_processor=SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.25] * 3, do_normalize=True), tokenizer=Numbers()
)  # nobody's to watch: pictures are prepared by the caller


@cache
def pair(name: str) -> tuple[nn.Module, InternVLChatModel]:
    """transformers' model and the other, which shares its weights."""
    source = STRUCTURES[name][name].build("sdpa")
    chat = InternVLChatModel(source)
    chat.img_context_token_id = IMAGE
    return source, chat


def answered(model: nn.Module, inputs: dict[str, Any], pruning: Any, **fields: Any) -> tuple[Any, list[Any]]:
    """What `generate` returns, and the decisions."""
    more = {key: fields.pop(key) for key in ("num_beams", "max_length") if key in fields}
    with vtp.prune(model, pruning, processor=PROCESSOR, **fields) as pruned:
        return generated(model, inputs, **more), list(pruned.events)


def check(name: str, layout: str, pruning: str, **fields: Any) -> None:
    source, chat = pair(name)
    prompts = prompts_of("internvl", layout)
    expected, theirs = answered(source, batched(FAMILIES["internvl"], prompts), pruning, **dict(fields))
    actual, ours = answered(chat, batched(FAMILIES["internvl"], prompts), pruning, **dict(fields))
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert (one.before, one.after) == (other.before, other.after)
        assert all(torch.equal(a, b) for a, b in zip(one.kept, other.kept, strict=True))
    prompt = expected.sequences.shape[1] - actual.sequences.shape[1]
    assert torch.equal(actual.sequences, expected.sequences[:, prompt:])
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["single", "batch"])
@pytest.mark.parametrize(("pruning", "fields"), CASES)
@pytest.mark.parametrize("name", STRUCTURES)
def test_every_stage_equals_the_model_of_transformers(
    name: str, pruning: str, fields: dict[str, Any], layout: str
) -> None:
    check(name, layout, pruning, **fields)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("pruning", ["stride", "l2"])
def test_positions(pruning: str, positions: str) -> None:
    check("internvl", "batch", pruning, keep_ratio=0.4, positions=positions)


@pytest.mark.parametrize("pruning", sorted(plugins.strategies()))
def test_every_strategy(pruning: str) -> None:
    """Each keeps what it keeps there, or is refused with the same reason."""
    fields = SHALLOW.get(pruning, {}) | ({"text_encoder": "llm"} if pruning in ("atp", "cdpruner", "mmtok") else {})
    source, chat = pair("internvl")
    refused, ours = (refusal(model, pruning, fields) for model in (source, chat))
    assert ours.replace(InternVLChat.models, InternVL.models) == refused
    if not refused:
        check("internvl", "single", pruning, **fields)


def refusal(model: nn.Module, pruning: str, fields: dict[str, Any]) -> str:
    """The sentence with which a strategy is refused, "" if it can be attached."""
    try:
        vtp.prune(model, pruning, processor=PROCESSOR, **fields).detach()
    except PruningError as error:
        return str(error)
    return ""


def test_beams_and_limits_count_the_whole_prompt() -> None:
    source, chat = pair("internvl")
    inputs = batched(FAMILIES["internvl"], prompts_of("internvl", "batch"))
    length = inputs["input_ids"].shape[1]
    for more in ({"num_beams": 2}, {"max_length": length + 3, "max_new_tokens": None}):
        given = {"keep_ratio": 0.4, **more}
        with vtp.prune(source, "stride", keep_ratio=0.4):
            wanted = generated(source, dict(inputs), **more).sequences[:, length:]
        with vtp.prune(chat, "stride", keep_ratio=given["keep_ratio"]):
            assert torch.equal(generated(chat, dict(inputs), **more).sequences, wanted)


@pytest.mark.parametrize(("pruning", "fields"), CASES)
@torch.no_grad()
def test_text_among_pictures_and_nothing_outlives_its_call(pruning: str, fields: dict[str, Any]) -> None:
    family, (_, chat) = FAMILIES["internvl"], pair("internvl")
    prompts = (family.sample(0, 2), Prompt(words(6, 3)), family.sample(1, 1))
    first = batched(family, prompts)
    with vtp.prune(chat, pruning, processor=PROCESSOR, **fields) as pruned:
        together = torch.stack(generated(chat, dict(first)).logits, 1)
        for row, prompt in enumerate(prompts):
            alone = torch.stack(generated(chat, batched(family, (prompt,))).logits, 1)
            torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-4)
        pruned.events.clear()
        with new_tensors() as left:
            chat.generate(**first, max_new_tokens=2)
            pruned.events.clear()
    assert [tuple(tensor.shape) for tensor in left] == []


def test_chat_is_pruned_and_detaching_brings_back_the_host() -> None:
    _, chat = pair("internvl")
    (prompt,) = prompts_of("internvl", "single")
    values, settings = prompt.images["pixel_values"], {"max_new_tokens": 4, "do_sample": False}

    def ask() -> str:
        return chat.chat(Words(), values, "what is it", dict(settings))

    before = ask()
    with vtp.prune(chat, "none"):
        assert ask() == before
    with vtp.prune(chat, "stride", keep_tokens=3) as pruned:
        ask()
        assert [event.after for event in pruned.events] == [[3]]
        chat.generate(input_ids=torch.tensor([[5, 6]]), attention_mask=torch.ones(1, 2).long(), max_new_tokens=2)
        assert len(pruned.events) == 1
    assert ask() == before
    assert not {"generate", "forward"} & set(vars(chat))


def test_what_is_not_pruned_is_refused() -> None:
    _, chat = pair("internvl")
    inputs = batched(FAMILIES["internvl"], prompts_of("internvl", "single"))
    with vtp.prune(chat, "stride"):
        with pytest.raises(PruningError, match="call its chat, batch_chat or generate"):
            chat(**inputs)
        with pytest.raises(PruningError, match="visual_features were never seen"):
            chat.generate(**inputs, visual_features=torch.zeros(9, 56))
        with pytest.raises(PruningError, match="2 image placeholders"):
            chat.generate(**inputs | {"input_ids": torch.tensor([[IMAGE, IMAGE, 5]])})


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [({"ps_version": "v1"}, "ps_version='v1'"), ({"select_layer": -4}, "select_layer=-4")],
)
def test_near_misses(facts: dict[str, Any], sentence: str) -> None:
    chat = InternVLChatModel(pair("internvl")[0])
    vars(chat.config).update(facts)
    with pytest.raises(PruningError, match=sentence):
        vtp.prune(chat, "stride")


def test_a_language_model_with_code_of_its_own_is_refused() -> None:
    chat = InternVLChatModel(pair("internvl")[0])
    chat.language_model = type("InternLM2ForCausalLM", (nn.Module,), {})()
    with pytest.raises(PruningError, match="InternLM2ForCausalLM has code of its own"):
        vtp.prune(chat, "stride")
