"""What cannot be done is said in one sentence, and the model is as it was: every family, when attaching and in a call.

And `vtp list --models` says the same: where it says yes strategies attach, and a promise is tested; where it gives a
reason every strategy is refused with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import pytest
import torch
from families import FAMILIES, IMAGE, Processor
from family_runs import (
    ANYRES_STAGES,
    BLIP2_STAGES,
    ENCODER_STRATEGIES,
    STRATEGIES,
    batched,
    blip2,
    clip,
    generated,
    logits_of,
    model_of,
    prompts_of,
    siglip,
)
from internvl_chat import InternVLChatModel
from models import tiny
from promises import CASES
from torch import nn

import vtp_plugin as vtp
from vtp_plugin import Stage, get_strategy, plugins, pruning
from vtp_plugin.cli.list import families
from vtp_plugin.errors import PruningError
from vtp_plugin.promises.state import state

OTHERS: dict[str, Callable[[], nn.Module]] = {
    "blip2": blip2,
    "clip": cache(clip),
    "siglip": cache(siglip),
    "llava_hf": lambda: tiny("llava_hf").model,
    "llava": lambda: tiny("llava").model,
    "internvl_chat": cache(lambda: InternVLChatModel(model_of("internvl", "sdpa"))),
}
EVERY = [*FAMILIES, *OTHERS, "llava_anyres"]
ADAPTER = {"smolvlm": "idefics3"}  # where it is not the family's own name


@pytest.fixture(params=EVERY)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(name: str, request: pytest.FixtureRequest) -> nn.Module:
    """A checkpoint of the family, called once: hosts put things in place in their first call."""
    if name in ("llava", "llava_anyres"):
        pytest.importorskip("llava")
    if name == "llava_anyres":
        return request.getfixturevalue("anyres")
    return model_of(name, "sdpa") if name in FAMILIES else OTHERS[name]()


@contextmanager
def refused(model: nn.Module, match: str) -> Any:
    """The block raises one sentence, and leaves model and processor as they were."""
    processor = Processor()
    before = state(model, processor.image_processor)
    with pytest.raises(PruningError, match=match) as error:
        yield processor
    assert state(model, processor.image_processor) == before
    one_sentence(str(error.value))


def one_sentence(message: str) -> None:
    assert "\n" not in message
    assert not re.search(r"\w\. ", message)
    assert len(message.split()) > 5


# -- when attaching ---------------------------------------------------------------------------------------------------


def test_a_part_of_a_model_is_no_model(model: nn.Module) -> None:
    """Nearly a model that an adapter knows: its language model, or its text tower, without the rest."""
    part = next(p for n in ("lm_head", "text_model", "language_model") if (p := getattr(model, n, None)) is not None)
    before = state(model)
    with pytest.raises(PruningError, match=rf"no adapter knows the model {type(part).__name__}\. Supported: .*LLaVA"):
        vtp.prune(part, "stride")
    assert state(model) == before


@pytest.mark.parametrize("stage", list(Stage))
def test_a_stage_that_a_family_lacks(name: str, model: nn.Module, stage: Stage, monkeypatch: Any) -> None:
    """Behind strategies that it can do; a reason is made up for a family that has the stage."""
    with vtp.prune(model, "none") as pruned:
        adapter = type(pruned.adapter)
    reason = adapter.stages[stage] or "nobody has built one yet"
    monkeypatch.setattr(adapter, "stages", {**adapter.stages, stage: reason})
    able = [s.value for s in Stage if not adapter.stages[s]]
    chosen = "+".join(BY_STAGE[s.value] for s in Stage if s.value in able or s is stage)
    said = re.escape(f"{BY_STAGE[stage.value]}: {adapter.models} has no {stage.value} stage: {reason}; possible here: ")
    with refused(model, said) as processor:
        vtp.prune(model, chosen, processor=processor)


BY_STAGE = {"pixels": "vprune", "vit": "l2", "projector": "stride", "llm": "fastv"}


def late(name: str, chosen: str) -> dict[str, int]:
    """A decoder layer that the family lets be cut."""
    return {"fastv.layer": FAMILIES[name].late} if name in FAMILIES and "fastv" in chosen else {}


def test_an_attachment_that_fails_at_its_last_step(name: str, model: nn.Module, monkeypatch: Any) -> None:
    """Everything is in place by then, and is taken back."""

    def fail(pruned: Any, undo: Any) -> None:
        assert state(pruned.model) != before
        raise PruningError("the last step of attaching went wrong in this test")

    with vtp.prune(model, "none") as pruned:
        stages = pruned.adapter.stages
    before = state(model)
    monkeypatch.setattr(pruning.latency, "watch", fail)
    with refused(model, "the last step") as processor:
        chosen = "+".join(BY_STAGE[s.value] for s in Stage if not stages[s])
        vtp.prune(model, chosen, processor=processor, measure=True, **late(name, chosen))


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        (
            "MllamaForConditionalGeneration",
            "Llama 3.2 Vision cannot be pruned: its language model reads",
        ),
        ("FuyuForCausalLM", "Fuyu cannot be pruned: it has no vision tower"),
        ("ChameleonForConditionalGeneration", "Chameleon cannot be pruned: a picture is words of its vocabulary"),
        ("Florence2ForConditionalGeneration", "Florence-2 cannot be pruned: it is an encoder-decoder"),
    ],
)
@pytest.mark.parametrize("strategy", ["none", "stride", "fastv"])
def test_families_that_cannot_be_pruned(architecture: str, said: str, strategy: str) -> None:
    """Of transformers' own class, which is never called."""
    import transformers

    assert hasattr(transformers, architecture)
    model = type(architecture, (nn.Module,), {})()
    with pytest.raises(PruningError, match=f"^{re.escape(said)}") as error:
        vtp.prune(model, strategy)
    one_sentence(str(error.value))
    assert not hasattr(model, "_vtp_pruned")


# -- in a call --------------------------------------------------------------------------------------------------------


def too_few_placeholders(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    first = (inputs["input_ids"][0] == IMAGE).nonzero()[0]
    ids = inputs["input_ids"].clone()
    ids[0, first] = 5
    return inputs | {"input_ids": ids}


def too_many_placeholders(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    ids = inputs["input_ids"].clone()
    ids[0, -1] = IMAGE
    return inputs | {"input_ids": ids}


def a_cache_of_the_caller(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    with torch.no_grad():
        words = model(input_ids=torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 3, dtype=torch.long))
    return inputs | {"past_key_values": words.past_key_values}


BAD: dict[str, tuple[Callable[..., dict[str, Any]], str]] = {
    "too few placeholders": (too_few_placeholders, r"the prompt has \d+ image placeholders, its images make \d+ token"),
    "too many placeholders": (too_many_placeholders, r"the prompt has \d+ image placeholders, its images make"),
    "a cache": (a_cache_of_the_caller, "pruning cannot add images behind a filled cache of the caller"),
}


@pytest.mark.covering("name call", "bad call")
@pytest.mark.parametrize("name", FAMILIES, indirect=True)
@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("bad", BAD)
def test_a_call_that_cannot_be_pruned(name: str, bad: str, call: str) -> None:
    """Refused while a strategy of every stage is attached; the next call is right, and nothing stays behind."""
    family, model = FAMILIES[name], model_of(name, "sdpa")
    inputs, (spoil, said) = partial(batched, family, prompts_of(name, "single")), BAD[bad]
    run = logits_of if call == "forward" else generated
    plain, broken = logits_of(model, inputs()), spoil(model, inputs())
    generated(model, inputs())
    before, chosen = state(model), "+".join(BY_STAGE[stage] for stage in family.stages if stage != "pixels")
    with vtp.prune(model, chosen, **late(name, chosen)) as pruned:
        right = logits_of(model, inputs())
        attached, events = state(model), len(pruned.events)
        with pytest.raises(PruningError, match=said) as error:
            run(model, broken)
        assert pruned.call is None
        assert len(pruned.events) == events
        assert state(model) == attached
        assert logits_of(model, inputs()).equal(right)
    one_sentence(str(error.value))
    assert state(model) == before
    assert logits_of(model, inputs()).equal(plain)


# -- what `vtp list --models` says ------------------------------------------------------------------------------------


def promised(name: str) -> set[str]:
    """The stages at which the promises of a family are tested."""
    if name in FAMILIES:
        return set(FAMILIES[name].stages)
    if name in ("llava", "llava_hf"):
        return {get_strategy(s)(**fields).stage.value for case in CASES.values() for s, fields in case}
    stages = {"blip2": BLIP2_STAGES, "llava_anyres": ANYRES_STAGES, "internvl_chat": list(STRATEGIES)}
    encoders = [get_strategy(strategy)().stage.value for strategy in ENCODER_STRATEGIES]
    return set(stages.get(name, encoders))


def test_the_matrix_is_what_works(name: str, model: nn.Module) -> None:
    """Every cell, with every registered strategy of its stage."""
    table = families()
    rows = {row[0]: dict(zip(("family", "models", *Stage, "inside vLLM"), row, strict=True)) for row in table.rows}
    row, able = rows[ADAPTER.get(name, name)], set()
    for stage in Stage:
        said = [refusal(model, s) for s, cls in plugins.strategies().items() if cls().stage is stage]
        able |= {stage.value} if "" in said else set()
        if row[stage] != "yes":
            reason = table.notes[int(row[stage].removeprefix("no [").removesuffix("]")) - 1]
            assert all(f" has no {stage.value} stage: {reason}; possible here: " in message for message in said)
    assert able == {stage.value for stage in Stage if row[stage] == "yes"} == promised(name)


def refusal(model: nn.Module, strategy: str) -> str:
    """The sentence with which a strategy is refused, "" if it can be attached."""
    try:
        vtp.prune(model, strategy, processor=Processor()).detach()
    except PruningError as error:
        message = str(error)
        one_sentence(message)
        return message
    return ""


def test_the_matrix_has_every_family() -> None:
    refused = {cls.family for cls in plugins.adapters() if cls.refused}
    assert {row[0] for row in families().rows} == {ADAPTER.get(name, name) for name in EVERY} | refused
