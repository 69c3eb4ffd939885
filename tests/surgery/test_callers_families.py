"""Ways of calling that depend on the family: positions, masks, token types and caches of every one (docs/modes.md)."""

from __future__ import annotations

import copy
import inspect
import threading
from types import MethodType
from typing import Any

import pytest
import torch
from families import FAMILIES, IMAGE, Processor, Prompt, words
from families_reference import Reference
from family_runs import NEW, batched, by_kind, generated, kept_by_sample, model_of, prompts_of
from matrix import dear
from torch import Tensor, nn
from transformers import StaticCache

import vtp_plugin as vtp
from vtp_plugin.errors import PruningError
from vtp_plugin.surgery import cache

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
CASES = {"stride": {"keep_ratio": 0.4}, "fastv": {"keep_ratio": 0.4, "layer": 3}}


def cases() -> list[Any]:
    able = [(name, case) for name in FAMILIES for case in CASES if case != "fastv" or "llm" in FAMILIES[name].stages]
    found = [(*each, positions) for each in able for positions in ("original", "compact")]
    return [pytest.param(*each, id="-".join(each)) for each in found]


def pruned(name: str, case: str, positions: str) -> Any:
    return vtp.prune(model_of(name, "sdpa"), case, processor=Processor(), **CASES[case], positions=positions)


def held(model: nn.Module, stored: Any) -> dict[str, Any]:
    return {cache.name_in(inspect.signature(model.forward).parameters): stored}


def grown(mask: Tensor) -> Tensor:
    return torch.cat([mask, mask.new_ones(len(mask), 1)], 1)


@pytest.mark.covering("name case")
@pytest.mark.parametrize(("name", "case", "positions"), cases())
@torch.no_grad()
def test_a_loop_of_ones_own_and_a_second_turn(name: str, case: str, positions: str) -> None:
    """The logits of `generate`, step by step; another prompt in between does not matter."""
    family, model = FAMILIES[name], model_of(name, "sdpa")
    first, other = (batched(family, prompts_of(name, layout)) for layout in ("batch", "single"))
    with pruned(name, case, positions):
        told = generated(model, dict(first))
        output, mask, seen = model(**first, use_cache=True), first["attention_mask"], []
        stored = cache.of_output(output)
        for _ in range(NEW - 1):
            seen.append(output.logits[:, -1])
            model(**other)
            mask = grown(mask)
            output = model(input_ids=seen[-1].argmax(-1)[:, None], attention_mask=mask, **held(model, stored))
        seen.append(output.logits[:, -1])
        torch.testing.assert_close(torch.stack(seen), torch.stack(told.logits), **CLOSE)
        alone = generated(model, dict(other))
        again = copy.deepcopy(cache.of_output(alone))
        whole = torch.cat([alone.sequences, torch.full((1, 2), 41)], 1)
        mask = torch.ones_like(whole)
        answer = generated(model, {"input_ids": whole, "attention_mask": mask}, **held(model, again), max_new_tokens=2)
        step = model(input_ids=whole[:, -3:], attention_mask=mask, **held(model, cache.of_output(alone)))
        torch.testing.assert_close(answer.logits[0], step.logits[:, -1], **CLOSE)


def bounded(model: nn.Module, logits: Tensor) -> Tensor:
    """Logits as the host bends them behind its output layer."""
    bound = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if bound is None else (logits / bound).tanh() * bound


@pytest.mark.covering("case positions")
@pytest.mark.parametrize(("name", "case", "positions"), cases())
@torch.no_grad()
def test_outputs_and_losses(name: str, case: str, positions: str) -> None:
    family, model = FAMILIES[name], model_of(name, "sdpa")
    first = batched(family, prompts_of(name, "batch"))
    ids = first["input_ids"]
    told = torch.where((ids >= 3) & (ids < 180) & (first["attention_mask"].cumsum(1) > 1), ids, -100)
    with pruned(name, case, positions):
        output = model(**first, labels=told, output_hidden_states=True)
        full, loss, n = output.logits, output.loss, int((told >= 0).sum())
        assert {state.shape[:2] for state in output.hidden_states} == {ids.shape}
        there = full.abs().sum(-1) > 0
        logits = bounded(model, model.lm_head(output.hidden_states[-1]))
        torch.testing.assert_close(logits[there], full[there], **CLOSE)
        again = model(**first, labels=told, num_items_in_batch=4 * n).loss
        torch.testing.assert_close(again, loss / 4, **CLOSE)
        shifted = torch.nn.functional.pad(told, (0, 1), value=-100)[:, 1:].contiguous()
        torch.testing.assert_close(model(**first, labels=told, shift_labels=shifted).loss, loss, **CLOSE)
        for keep in (1, ids.shape[1] - 3, torch.tensor([4, ids.shape[1] - 2])):
            wanted = full[:, keep] if isinstance(keep, Tensor) else full[:, -keep:]
            torch.testing.assert_close(model(**first, logits_to_keep=keep).logits, wanted, **CLOSE)


@pytest.mark.covering("case positions")
@pytest.mark.parametrize(("name", "case", "positions"), cases())
@torch.no_grad()
def test_padding_on_the_right_and_rows_in_another_order(name: str, case: str, positions: str) -> None:
    family, model = FAMILIES[name], model_of(name, "sdpa")
    first = batched(family, prompts_of(name, "batch"))
    ids, real = first["input_ids"], first["attention_mask"].bool()
    order = (~real).int().sort(dim=1, stable=True).indices  # words first
    other = {key: value.gather(1, order) if value.shape[:2] == ids.shape else value for key, value in first.items()}
    with pruned(name, case, positions):
        wanted = model(**first, use_cache=True)
        logits = model(**other).logits[other["attention_mask"].bool()]
        torch.testing.assert_close(logits, wanted.logits[real], **CLOSE)
        stored, mask, token = cache.of_output(wanted), grown(first["attention_mask"]), ids[:, -1:]
        twin, turned = copy.deepcopy(stored), [1, 0]
        step = model(input_ids=token, attention_mask=mask, **held(model, stored)).logits
        twin.reorder_cache(torch.tensor(turned))
        moved = model(input_ids=token[turned], attention_mask=mask[turned], **held(model, twin)).logits
        torch.testing.assert_close(moved, step[turned], **CLOSE)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["llava_next", "gemma3", "idefics3"])  # other hosts fail there by themselves
@torch.no_grad()
def test_tuples_where_the_configuration_wants_them(name: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a prompt and of a step behind it."""
    model = model_of(name, "sdpa")
    first = batched(FAMILIES[name], prompts_of(name, "batch"))
    with pruned(name, case, "compact"):
        wanted = model(**first, use_cache=True)
        stored, twin = cache.of_output(wanted), copy.deepcopy(cache.of_output(wanted))
        step = {"input_ids": first["input_ids"][:, -1:], "attention_mask": grown(first["attention_mask"])}
        logits = model(**step, **held(model, twin)).logits
        monkeypatch.setattr(model.config, "return_dict", False)
        found = model(**first, use_cache=True), model(**step, **held(model, stored))
    assert [type(answer) for answer in found] == [tuple, tuple]
    assert found[0][0].equal(wanted.logits)
    assert found[1][0].equal(logits)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["gemma3", "cohere2_vision", "llava_next"])
@torch.no_grad()
def test_attentions_of_decoding_steps_are_at_the_callers_columns(name: str, case: str) -> None:
    """Rows that sum to one, nothing on what was dropped; a layer with a window sees no further than that."""
    family, model = FAMILIES[name], model_of(name, "eager")
    first = batched(family, prompts_of(name, "batch"))
    length = first["input_ids"].shape[1]
    fields = {"layer": family.late} if case == "fastv" else {}
    with vtp.prune(model, case, processor=Processor(), keep_ratio=0.4, **fields):
        there = model(**first).logits.abs().sum(-1) > 0
        answer = generated(model, first, output_attentions=True)
    cut = fields.get("layer", 0)
    for step, maps in enumerate(answer.attentions[1:], 1):
        for number, weights in enumerate(maps):
            assert weights.shape[-1] == length + step or number < cut  # before it a window's map is the host's
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]), **CLOSE)
        assert not maps[-1][..., :length].abs().sum((1, 2))[~there].any()


@pytest.mark.parametrize("name", by_kind(FAMILIES))
@torch.no_grad()
def test_a_batch_without_a_mask(name: str) -> None:
    """The host's `generate` takes ids of padding for padding."""
    family, model = FAMILIES[name], model_of(name, "sdpa")
    first = batched(family, prompts_of(name, "batch"))
    bare = {key: value for key, value in first.items() if key != "attention_mask"}
    for case in CASES if "llm" in family.stages else ("stride",):
        with pruned(name, case, "compact"):
            wanted, found = (torch.stack(generated(model, dict(given)).logits) for given in (first, bare))
        torch.testing.assert_close(found, wanted, **CLOSE)


def ending(name: str, images: int, seed: int = 0) -> Prompt:
    """A prompt whose last token is a picture's."""
    prompt = FAMILIES[name].sample(seed, images)
    last = max(place for place, token in enumerate(prompt.ids) if token == IMAGE)
    return Prompt(prompt.ids[: last + 1], prompt.images, prompt.totals)


ENDING = [name for name in FAMILIES if "omni" not in name]  # whose hosts fail there by themselves


@pytest.mark.covering("name case", "case positions")
@pytest.mark.parametrize(("name", "case", "positions"), [each for each in cases() if each.values[0] in ENDING])
@torch.no_grad()
def test_a_prompt_that_ends_with_a_picture(name: str, case: str, positions: str) -> None:
    """What is left of it says what comes next: the slow reference's answer, in a loop of one's own, too."""
    family, model, prompts = FAMILIES[name], model_of(name, "sdpa"), (ending(name, 2), ending(name, 1, 1))
    inputs = batched(family, prompts)
    with pruned(name, case, positions) as attached:
        output = generated(model, dict(inputs))
        decisions = kept_by_sample(list(attached.events), prompts, "llm" if case == "fastv" else "projector", positions)
        alike = model(**inputs), model(**inputs, logits_to_keep=1)
    for answer in alike:
        torch.testing.assert_close(answer.logits[:, -1], output.logits[0], **CLOSE)
    agreeing = 1 if family.mrope and (case, positions) != ("stride", "compact") else NEW  # see the next test
    for row, (prompt, kept) in enumerate(zip(prompts, decisions, strict=True)):
        if case == "fastv":  # the last token is kept, and not judged
            kept.late[-1] = torch.cat([kept.late[-1], torch.tensor([prompt.totals[-1] - 1])])
        reference = Reference(model, batched(family, (prompt,)), prompt.totals, kept, family.later)
        expected = reference.logits(output.sequences[row, -NEW:].tolist())[:agreeing]
        torch.testing.assert_close(torch.stack([step[row] for step in output.logits[:agreeing]]), expected, **CLOSE)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("name", [name for name in ENDING if FAMILIES[name].mrope])
@torch.no_grad()
def test_tokens_behind_a_picture_on_several_axes(name: str, positions: str) -> None:
    """The host's `generate` goes on from the picture's last place, axis by axis; candidates are where others are."""
    family, model, seen = FAMILIES[name], model_of(name, "sdpa"), []
    inputs = batched(family, (ending(name, 1),))

    def behind(**kwargs: Any) -> Any:
        seen.clear()
        return generated(model, dict(inputs), **kwargs)

    handle = model.model.language_model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("position_ids", args[-1])[-3:, 0, -1]), with_kwargs=True
    )
    behind()
    places = torch.stack(seen[1:])
    with pruned(name, "stride", positions) as attached:
        plain = behind()
        found = torch.stack(seen[1:])
        if not model._is_stateful:
            drafted = behind(assistant_model=family.build("sdpa"))
            torch.testing.assert_close(torch.stack(drafted.logits), torch.stack(plain.logits), **CLOSE)
        (lost,) = (b - a for b, a in zip(attached.events[0].before, attached.events[0].after, strict=True))
    handle.remove()
    counted = torch.arange(inputs["input_ids"].shape[1], inputs["input_ids"].shape[1] + NEW - 1) - lost
    assert found.equal(places if positions == "original" else counted[:, None].expand(-1, 3))


@pytest.mark.parametrize("name", [family.name for family in FAMILIES.values() if family.mrope])
@torch.no_grad()
def test_one_axis_of_positions_for_several(name: str) -> None:
    """A caller's position ids [1, L] hold for every axis, as in the host: in a prompt, and behind it."""
    family, model = FAMILIES[name], model_of(name, "sdpa")
    inputs = batched(family, prompts_of(name, "single"))
    length = inputs["input_ids"].shape[1]
    one, step = torch.arange(length)[None], torch.tensor([[length]])
    for positions in ("original", "compact"):
        with pruned(name, "stride", positions):
            logits = []
            for axes in ((), (3, -1, -1)):
                output = model(**inputs, position_ids=one.expand(*axes) if axes else one, use_cache=True)
                given = {"position_ids": step.expand(*axes) if axes else step, **held(model, cache.of_output(output))}
                later = model(input_ids=torch.tensor([[41]]), **given)
                logits.append(torch.cat([output.logits, later.logits], 1))
        torch.testing.assert_close(*logits, **CLOSE)


class Standing:
    """Stands in the place of a forward; nobody can refer to it weakly, and it equals its like."""

    __slots__ = ("function",)

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, model: nn.Module, **kwargs: Any) -> Any:
        return self.function(**kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Standing)


@torch.no_grad()
def test_a_forward_that_is_no_function() -> None:
    """Its signature is read, whatever can be done with it."""
    family, model = FAMILIES["llava_next"], FAMILIES["llava_next"].build("sdpa")
    inputs = batched(family, prompts_of("llava_next", "batch"))
    with vtp.prune(model, "stride", keep_ratio=0.4):
        wanted = model(**inputs).logits
    model.forward = MethodType(Standing(model.forward), model)
    with vtp.prune(model, "stride", keep_ratio=0.4):
        assert model(**inputs).logits.equal(wanted)


@torch.no_grad()
def test_generate_behind_a_pruned_prompt_in_a_static_cache_is_refused() -> None:
    model = model_of("llava_next", "sdpa")
    first = batched(FAMILIES["llava_next"], prompts_of("llava_next", "single"))
    fixed = StaticCache(config=model.config.get_text_config(), max_cache_len=300)
    with pruned("llava_next", "stride", "compact"):
        ids = generated(model, dict(first), **held(model, fixed)).sequences
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with pytest.raises(PruningError, match="cannot go on behind a pruned prompt in a static cache"):
            generated(model, whole, **held(model, fixed))
        assert model(ids[:, -1:], attention_mask=whole["attention_mask"], **held(model, fixed)).logits.any()


@pytest.mark.parametrize("name", by_kind(FAMILIES))
@torch.no_grad()
def test_threads(name: str) -> None:
    family, model = FAMILIES[name], model_of(name, "sdpa")
    prompts, found = [family.sample(seed, 1) for seed in range(3)], {}

    def work(number: int) -> None:
        found[number] = generated(model, batched(family, (prompts[number % 3],))).logits

    with vtp.prune(model, "stride", keep_ratio=0.4):
        alone = [generated(model, batched(family, (prompt,))).logits for prompt in prompts]
        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number in range(6):
        torch.testing.assert_close(torch.stack(found[number]), torch.stack(alone[number % 3]), **CLOSE)


@pytest.mark.parametrize("name", list(FAMILIES))
@torch.no_grad()
def test_keeping_everything_is_the_host_bit_for_bit(name: str) -> None:
    """All arguments at once, at keep_ratio=1, against the unpruned model."""
    family, model = FAMILIES[name], model_of(name, "sdpa")
    first = batched(family, prompts_of(name, "batch"))
    ids = first["input_ids"]
    told = torch.where(ids < 180, ids, -100)
    arguments = {"labels": told, "num_items_in_batch": 7, "output_hidden_states": True}
    whole = model(**first, **arguments)
    late, fields = ("fastv", {"layer": 3}) if "llm" in family.stages else ("stride", {})
    with vtp.prune(model, "stride", keep_ratio=1.0), vtp.prune(copy.deepcopy(model), late, keep_ratio=1.0, **fields):
        output = model(**first, **arguments)
    assert output.loss.equal(whole.loss)
    assert output.logits.equal(whole.logits)
    assert all(a.equal(b) for a, b in zip(output.hidden_states, whole.hidden_states, strict=True))


@pytest.mark.parametrize("name", [name for name in FAMILIES if "llm" in FAMILIES[name].stages])
@torch.no_grad()
def test_a_cut_that_keeps_everything_leaves_all_as_the_hosts(name: str) -> None:
    """Also where a column is padding in every row."""
    family, model = FAMILIES[name], model_of(name, "sdpa")
    first = batched(family, prompts_of(name, "batch"))
    for key in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        if key in first:
            first[key] = torch.nn.functional.pad(first[key], (0, 1))
    whole = cache.of_output(model(**first, use_cache=True))
    states = model(**first, output_hidden_states=True)
    with vtp.prune(model, "fastv", keep_ratio=1.0, layer=family.late):
        kept = cache.of_output(model(**first, use_cache=True))
        answer = model(**first, output_hidden_states=True)
        with torch.enable_grad():
            learning = model(**first, output_hidden_states=True)
            learning.hidden_states[-2].retain_grad()
            learning.logits.sum().backward()
    assert learning.hidden_states[-2].grad.any()
    model.zero_grad()
    assert answer.logits.equal(states.logits)
    assert all(a.equal(b) for a, b in zip(answer.hidden_states, states.hidden_states, strict=True))
    for ours, hosts in zip(kept.layers, whole.layers, strict=True):
        there = [(name, value) for name, value in vars(hosts).items() if isinstance(value, Tensor)]
        assert there
        assert all(getattr(ours, name).equal(value) for name, value in there)


@pytest.mark.parametrize("name", by_kind(FAMILIES))
@torch.no_grad()
def test_text_among_pictures_and_beams_over_a_batch(name: str) -> None:
    """Every row as by itself: two images, none, one; logits, and the scores of two beams."""
    family, model = FAMILIES[name], model_of(name, "sdpa")
    prompts = (family.sample(0, 2), Prompt(words(6, 3)), family.sample(1, 1))
    beams = {"num_beams": 2, "num_return_sequences": 2, "output_logits": False}
    with vtp.prune(model, "stride", keep_ratio=0.4):
        first = batched(family, prompts)
        logits, real = model(**first).logits, first["attention_mask"].bool()
        scores = generated(model, first, **beams).sequences_scores
        for row, prompt in enumerate(prompts):
            alone = batched(family, (prompt,))
            torch.testing.assert_close(logits[row][real[row]], model(**alone).logits[0], **CLOSE)
            own = generated(model, alone, **beams).sequences_scores
            torch.testing.assert_close(scores[2 * row : 2 * row + 2], own, **CLOSE)


def to_compile(name: str, layout: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of its own, its prompts, and nothing compiled yet."""
    torch._dynamo.reset()
    family = FAMILIES[name]
    return family.build("sdpa"), batched(family, prompts_of(name, layout))


COMPILED = ("llava_next", "llava_onevision", "internvl", "gemma3", "qwen3_vl")


@pytest.mark.slow
@pytest.mark.parametrize("name", dear(COMPILED, ["llava_onevision"]))
@torch.no_grad()
def test_compiled_before_attaching(name: str) -> None:
    """The logits of a model that is not compiled; detached, the host's."""
    model, first = to_compile(name, "single")
    whole = model(**first).logits
    with pruned_model(model):
        wanted = model(**first).logits
    compiled = torch.compile(model, backend="eager", dynamic=True)
    torch.testing.assert_close(compiled(**first).logits, whole, **CLOSE)
    with pruned_model(compiled) as attached:
        torch.testing.assert_close(compiled(**first).logits, wanted, **CLOSE)
        assert attached.events
    torch.testing.assert_close(compiled(**first).logits, whole, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("name", dear(COMPILED, ["llava_onevision"]))
@torch.no_grad()
def test_compiled_after_attaching(name: str) -> None:
    model, first = to_compile(name, "single")
    with pruned_model(model):
        wanted = model(**first).logits
        later = torch.compile(model, backend="eager", dynamic=True)
        torch.testing.assert_close(later(**first).logits, wanted, **CLOSE)


def pruned_model(model: nn.Module) -> Any:
    return vtp.prune(model, "stride", keep_ratio=0.4)


@pytest.mark.slow
@pytest.mark.parametrize("case", dear(CASES, ["fastv"]))
@torch.no_grad()
def test_layers_that_were_compiled_one_by_one(case: str) -> None:
    model, first = to_compile("llava_next", "batch")
    with vtp.prune(model, case, **CASES[case]):
        wanted = generated(model, dict(first))
    layers = model.model.language_model.layers
    for number, layer in enumerate(layers):
        layers[number] = torch.compile(layer, backend="eager", dynamic=True)
    with vtp.prune(model, case, **CASES[case]) as attached:
        found = generated(model, dict(first))
        assert attached.events
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits), **CLOSE)
