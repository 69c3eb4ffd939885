"""The promises, for every strategy x model family x {eager, sdpa} x {one prompt, batches}."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import reference
import torch
from models import NEW, N, Row, Tiny, picture, prompts, tiny
from promises import (
    CASES,
    CLOSE,
    Lengths,
    check_answer,
    check_kept,
    expected,
    kept,
    make,
    strategies,
    where_it_matters,
)
from torch import Tensor, nn

from vtp_plugin import get_strategy
from vtp_plugin.errors import PruningError
from vtp_plugin.promises.state import state
from vtp_plugin.strategies.stride import Stride

FEW = ["l2", "vprune", "visionzip", "fastv", "vprune+atp+fastv"]
EVERYTHING: dict[str, dict[str, Any]] = {
    name: {"keep_ratio": 1.0} for name in ("l2", "tome", "visionzip", "fastv", "stride")
}
EVERYTHING |= {"random": {"keep_tokens": N}, "atp": {"keep_ratio": 1.0}, "vprune": {}}


# -- 1: everything kept is bit-identical ------------------------------------------------------------------------------


@pytest.mark.covering("name kind", "name host", "kind host family")
@pytest.mark.parametrize("kind", ["single", "batch", "even"])
@pytest.mark.parametrize("name", [*EVERYTHING, "none"])
@torch.no_grad()
def test_keeping_everything_changes_no_bit(host: Tiny, name: str, kind: str):
    rows = prompts(kind)
    if name == "vprune":  # keeps everything of noise only
        rows = [[picture(i, 0.0) if isinstance(part, Tensor) else part for i, part in enumerate(row)] for row in rows]
    before, answer = host.forward(rows).logits, host.generate(rows)
    with host.prune("none" if name == "none" else make(host, name, **EVERYTHING[name])) as pruned:
        after, again = host.forward(rows).logits, host.generate(rows)
        for images in kept(pruned.events).values():
            assert all(images[n] == list(range(N)) for row in host.numbers(rows) for n in row)
    same = torch.equal
    if name == "vprune" and kind != "single":  # its images pass the tower one by one, which rounds differently
        same = partial(torch.allclose, **CLOSE)
    real = mask_of(rows, before.shape[1])
    assert same(before[real], after[real])
    assert answer.sequences.equal(again.sequences)
    assert all(same(a, b) for a, b in zip(answer.logits, again.logits, strict=True))


def mask_of(rows: list[Row], length: int) -> Tensor:
    """Which columns of the full, left-padded prompts are not padding."""
    sizes = [sum(N if isinstance(part, Tensor) else 1 for part in row) for row in rows]
    return torch.arange(length) >= length - torch.tensor(sizes)[:, None]


def test_an_empty_run_of_text_passes_through(sdpa: Tiny):
    before = sdpa.generate([[1, 17, 18, 19]])
    with sdpa.prune(strategies(sdpa, "fastv")):
        after = sdpa.generate([[1, 17, 18, 19]])
    assert before.sequences.equal(after.sequences)
    assert all(a.equal(b) for a, b in zip(before.logits, after.logits, strict=True))


# -- 2: nothing is left behind ----------------------------------------------------------------------------------------


@pytest.fixture
def untouched(host: Tiny) -> Iterator[None]:
    rows = prompts("batch")
    with torch.no_grad():
        logits, answer = host.forward(rows).logits, host.generate(rows).sequences
        before = state(host.model, host.images)
        yield
        assert state(host.model, host.images) == before
        assert host.forward(rows).logits.equal(logits)
        assert host.generate(rows).sequences.equal(answer)


@pytest.mark.covering("case kernel family", kernel=where_it_matters)
@pytest.mark.parametrize("case", FEW)
def test_detaching_gives_the_model_back(host: Tiny, case: str, untouched: None):
    pruned = host.prune(strategies(host, case), measure=True)
    host.generate(prompts("batch"))
    pruned.detach()
    pruned.detach()


class Fragile(Stride):
    """Raises at its first decision."""

    name = "fragile"
    broken = True

    def select(self, visual: Any) -> Any:
        if self.broken:
            self.broken = False
            raise ZeroDivisionError("in the middle")
        return super().select(visual)


@pytest.mark.parametrize("at", ["vit", "projector", "llm"])
def test_an_exception_in_the_middle_leaves_nothing(host: Tiny, at: str, untouched: None):
    with pytest.raises(ZeroDivisionError), host.prune(Fragile(at=at)):
        host.generate(prompts("batch"))


@pytest.mark.parametrize("at", ["vit", "projector", "llm"])
@torch.no_grad()
def test_the_call_after_a_failed_one_is_right(host: Tiny, at: str):
    rows = prompts("batch")
    with host.prune(Stride(at=at)):
        right = host.generate(rows).sequences, host.forward(rows).logits
    with host.prune(Fragile(at=at)) as pruned:
        with pytest.raises(ZeroDivisionError):
            host.forward(rows)
        assert isinstance(pruned.failure, ZeroDivisionError)
        assert pruned.call is None
        assert not pruned.events
        assert host.generate(rows).sequences.equal(right[0])
        assert host.forward(rows).logits.equal(right[1])


def test_a_refused_attachment_leaves_nothing(host: Tiny, untouched: None):
    layers = len(host.decoder.layers)
    with pytest.raises(
        ValueError, match=rf"fastv: layer must be in 1 \.\.\. {layers - 1} for this model, got {layers}"
    ):
        host.prune([make(host, "l2"), make(host, "fastv", layer=layers)])
    with pytest.raises(ValueError, match=r"no-such-folder"):
        host.prune([make(host, "l2"), get_strategy("atp")(clip="no-such-folder")])


def test_models_may_share_a_processor(untouched: None, host: Tiny):
    other = tiny("llava_hf", "eager" if host.decoder.config._attn_implementation == "sdpa" else "sdpa")
    from vtp_plugin import prune

    first, second = host.prune("vprune"), prune(other.model, "vprune", processor=host.processor)
    first.detach()
    second.detach()


def test_a_second_attachment_is_refused_and_the_first_stays(sdpa: Tiny):
    with sdpa.prune("l2+fastv") as pruned:
        before = state(sdpa.model, sdpa.images)
        with pytest.raises(ValueError, match=r"already pruned by l2\+fastv: detach it first"):
            sdpa.prune("stride")
        assert state(sdpa.model, sdpa.images) == before
        sdpa.generate(prompts("single"))
        assert set(kept(pruned.events)) == {"l2", "fastv"}
    with sdpa.prune("none"), pytest.raises(ValueError, match="already pruned by none"):
        sdpa.prune("stride")


# -- 3, 4, 6, 7: budgets, cached generation, composition, batches -----------------------------------------------------


@pytest.mark.covering("case kernel", "case kind", "case family", kernel=where_it_matters)
@pytest.mark.parametrize("kind", ["single", "batch", "even"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_cached_generation_equals_the_slow_reference(host: Tiny, case: str, kind: str):
    rows = prompts(kind)
    with host.prune(strategies(host, case)) as pruned, Lengths(host.decoder.layers) as lengths:
        output = host.generate(rows)
    slow = expected(host, case, kind, pruned.events)
    check_kept(host, rows, pruned.events, slow)
    longest = [max(s.lengths[layer] for s in slow) for layer in range(len(host.decoder.layers))]
    assert lengths == longest
    assert [layer.keys.shape[2] for layer in output.past_key_values.layers] == [n + NEW - 1 for n in longest]
    check_answer(output, slow)


@pytest.mark.covering("case kernel", "case kind", "family kind", kernel=where_it_matters)
@pytest.mark.parametrize("kind", ["packed", "packed-even"])
@pytest.mark.parametrize("case", [*FEW, "stride-llm", "fastv+random"])
@torch.no_grad()
def test_the_longest_row_may_lose_most(host: Tiny, case: str, kind: str):
    with host.prune(strategies(host, case)) as pruned:
        output, logits = host.generate(prompts(kind)), host.forward(prompts(kind)).logits
    slow = expected(host, case, kind, pruned.events)
    check_answer(output, slow)
    for r, row in enumerate(slow):
        assert torch.allclose(logits[r, -1], row.logits[0], **CLOSE)


@pytest.mark.parametrize("kind", ["even", "packed-even"])
@pytest.mark.parametrize("case", FEW)
def test_prompts_of_equal_length_need_no_attention_mask(sdpa: Tiny, case: str, kind: str):
    if (sdpa.family, kind) == ("llava", "packed-even"):
        pytest.skip("equally long only after the merge, so that the host itself needs the mask")
    with sdpa.prune(strategies(sdpa, case)) as pruned:
        output = sdpa.generate(prompts(kind), padded=False)
    check_answer(output, expected(sdpa, case, kind, pruned.events))


@pytest.mark.covering("case kind", "kind family")
@pytest.mark.parametrize("case", FEW)
@pytest.mark.parametrize("kind", ["single", "batch", "packed"])
def test_generation_without_a_cache_is_the_same(sdpa: Tiny, case: str, kind: str):
    with sdpa.prune(strategies(sdpa, case)) as pruned:
        output = sdpa.generate(prompts(kind), use_cache=False)
    check_answer(output, expected(sdpa, case, kind, pruned.events))
    assert len(kept(pruned.events)) == len(CASES[case])


@pytest.mark.covering("case sampling", "family sampling")
@pytest.mark.parametrize(
    "sampling", [{"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True}]
)
@pytest.mark.parametrize("case", FEW)
def test_beams_and_samples_have_the_logits_of_the_reference(sdpa: Tiny, case: str, sampling: dict[str, Any]):
    """The probability of every returned sequence is what the cache-free reference gives it."""
    rows = prompts("batch")
    sampling = {"num_return_sequences": 2, "top_k": 0} if "do_sample" in sampling else sampling
    sampling |= {"do_sample": "num_beams" not in sampling, "output_scores": True, "length_penalty": 1.0}
    with sdpa.prune(strategies(sdpa, case)):
        output = sdpa.generate(rows, **sampling)
    scores = sdpa.model.compute_transition_scores(
        output.sequences, output.scores, getattr(output, "beam_indices", None), normalize_logits=True
    )
    each = len(output.sequences) // len(rows)
    assert each == sampling.get("num_return_sequences", 1)
    for i, sequence in enumerate(output.sequences):
        slow = reference.run(sdpa, rows[i // each], CASES[case], answer=sequence.tolist())
        probabilities = slow.logits.log_softmax(-1).gather(1, sequence[:, None])[:, 0]
        assert torch.allclose(scores[i], probabilities, **CLOSE)


def test_the_same_image_keeps_the_same_tokens_in_any_batch(sdpa: Tiny):
    image, other = picture(7), picture(8)
    with sdpa.prune("random") as pruned:
        sdpa.generate([[1, 5, image, 6]])
        (alone,) = kept(pruned.events)["random"].values()
        pruned.events.clear()
        sdpa.generate([[1, other, 7, 8, image, 9], [1, image, 2]])
        a, b, c = (kept(pruned.events)["random"][n] for n in range(3))
    assert alone == b == c != a


# -- plain forward ----------------------------------------------------------------------------------------------------


@pytest.mark.covering("case kind", "kind family")
@pytest.mark.parametrize("kind", ["single", "batch", "even"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_plain_forward_has_the_logits_of_the_reference(sdpa: Tiny, case: str, kind: str):
    rows = prompts(kind)
    full = sdpa.forward(rows).logits.shape
    with sdpa.prune(strategies(sdpa, case)) as pruned:
        logits = sdpa.forward(rows).logits
    for r, row in enumerate(expected(sdpa, case, kind, pruned.events)):
        assert torch.allclose(logits[r, -1], row.logits[0], **CLOSE)
        if sdpa.family == "llava_hf":  # the caller's length; the authors' package decides its length itself
            assert logits.shape == full
            text = [c for c, part in zip(spread(rows[r]), rows[r], strict=True) if not isinstance(part, Tensor)]
            offset = full[1] - sum(N if isinstance(part, Tensor) else 1 for part in rows[r])
            assert torch.allclose(logits[r, [c + offset for c in text]], row.prompt[row.text], **CLOSE)


def spread(row: Row) -> list[int]:
    """The column of the full prompt where every part begins."""
    sizes = [N if isinstance(part, Tensor) else 1 for part in row]
    return [sum(sizes[:i]) for i in range(len(row))]


@pytest.mark.covering("case kind", "kind family")
@pytest.mark.parametrize("kind", ["single", "batch", "even"])
@pytest.mark.parametrize("case", FEW)
def test_the_loss_is_that_of_the_shortened_prompt(sdpa: Tiny, case: str, kind: str):
    rows = prompts(kind)
    inputs = sdpa.inputs(rows)
    ids = inputs.get("input_ids", inputs.get("inputs"))
    labels = ids.masked_fill((ids == -200) | (ids == 90) | (ids == 5) | (ids <= 1), -100)
    with sdpa.prune(strategies(sdpa, case)) as pruned:
        loss = sdpa.forward(rows, labels=labels).loss
    losses = []
    for r, row in enumerate(expected(sdpa, case, kind, pruned.events)):
        own = [part for part in rows[r] if not isinstance(part, Tensor)]
        targets = torch.full((row.length,), -100)
        targets[row.text] = torch.tensor([-100 if token in (1, 5) else token for token in own])
        left = [c for c in range(row.length) if c not in row.hidden]
        logits, targets = row.prompt[left][:-1], targets[left][1:]
        losses += torch.nn.functional.cross_entropy(logits, targets, reduction="none")[targets >= 0].tolist()
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    loss.backward()
    assert sdpa.model.lm_head.weight.grad.abs().sum() > 0
    sdpa.model.zero_grad()


# -- 8: nothing is silent ---------------------------------------------------------------------------------------------


def misplaced(monkeypatch: pytest.MonkeyPatch, host: Tiny, part: str) -> None:
    """An adapter that points to a copy of a part that the model never calls."""
    from copy import deepcopy
    from dataclasses import replace

    from vtp_plugin.plugins import adapters

    (cls,) = (a for a in adapters() if a.family == host.family)
    original = cls.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if part == "embeddings":
            self.tower = replace(self.tower, embeddings=deepcopy(self.tower.embeddings))
        else:
            setattr(self, part, deepcopy(getattr(self, part)))

    monkeypatch.setattr(cls, "__init__", init)


@pytest.mark.parametrize(
    ("part", "case"),
    [
        ("embeddings", "l2"),
        ("embeddings", "vprune"),
        ("projector", "stride"),
        ("projector", "visionzip"),
        ("decoder_layers", "fastv"),
        ("decoder_layers", "stride-llm"),
        ("projector", "l2+stride+fastv"),
    ],
)
@pytest.mark.parametrize("call", ["generate", "forward"])
def test_a_part_that_is_never_called_is_an_error(
    sdpa: Tiny, part: str, case: str, call: str, monkeypatch: pytest.MonkeyPatch
):
    from vtp_plugin.errors import NothingPruned

    misplaced(monkeypatch, sdpa, part)
    name = case.split("+")[part == "projector" and "+" in case].split("-")[0]
    with sdpa.prune(strategies(sdpa, case)), pytest.raises(NothingPruned, match=f"{name}: 1 images went through"):
        getattr(sdpa, call)(prompts("single"))


def one_sentence(error: Any) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert 20 < len(message) < 300


@pytest.mark.parametrize("option", [{"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}])
@pytest.mark.parametrize(("name", "fields"), [("fastv", {}), ("pyramiddrop", {"layers": "1 2 3"})])
def test_caches_of_one_length_do_not_fit(sdpa: Tiny, name: str, fields: dict[str, Any], option: dict[str, Any]):
    with sdpa.prune(name, **fields), pytest.raises(ValueError, match=rf"^{name}: ") as error:
        sdpa.generate(prompts("single"), **option)
    one_sentence(error)


def test_assisted_decoding_does_not_fit_fastv(sdpa: Tiny):
    with sdpa.prune("fastv"), pytest.raises(ValueError, match=r"^fastv: assistant_model is not possible") as error:
        sdpa.generate(prompts("single"), assistant_model=sdpa.model)
    one_sentence(error)


def test_a_static_cache_fits_what_is_cut_before_the_language_model(sdpa: Tiny):
    with sdpa.prune(strategies(sdpa, "l2")) as pruned:
        output = sdpa.generate(prompts("batch"), cache_implementation="static")
    check_answer(output, expected(sdpa, "l2", "batch", pruned.events))


@pytest.mark.parametrize("case", ["l2", "fastv"])
def test_images_behind_a_cache_of_the_caller_are_refused(sdpa: Tiny, case: str):
    cache = sdpa.forward([[1, 17, 18, 19]], use_cache=True).past_key_values
    with sdpa.prune(strategies(sdpa, case)), pytest.raises(ValueError, match="filled cache") as error:
        sdpa.forward(prompts("single"), padded=False, past_key_values=cache)
    one_sentence(error)


@pytest.mark.parametrize("case", ["l2", "fastv"])
def test_an_empty_cache_of_the_caller_is_filled(sdpa: Tiny, case: str):
    from transformers import DynamicCache

    with sdpa.prune(strategies(sdpa, case)) as pruned:
        output = sdpa.generate(prompts("single"), past_key_values=DynamicCache(config=sdpa.decoder.config))
    check_answer(output, expected(sdpa, case, "single", pruned.events))


@pytest.mark.parametrize("case", ["l2", "fastv"])
def test_embeddings_with_images_are_refused(sdpa: Tiny, case: str):
    inputs = sdpa.inputs(prompts("single"), padded=False)
    ids = inputs.pop("input_ids", inputs.pop("inputs", None))
    embeddings = sdpa.decoder.embed_tokens(ids.clamp(min=0))
    with sdpa.prune(strategies(sdpa, case)), pytest.raises(ValueError, match="inputs_embeds") as error:
        sdpa.model(inputs_embeds=embeddings, **inputs)
    one_sentence(error)


def test_more_images_than_placeholders_are_refused(sdpa: Tiny):
    inputs = sdpa.inputs(prompts("single"))
    pixels = "pixel_values" if "pixel_values" in inputs else "images"
    inputs[pixels] = inputs[pixels].repeat(2, 1, 1, 1)
    with sdpa.prune("l2"), pytest.raises(ValueError, match=r"placeholders|images") as error:
        sdpa.model.generate(**inputs, max_new_tokens=2)
    one_sentence(error)


@pytest.mark.parametrize("layer", [4, 99, -5])
def test_a_layer_that_the_tower_does_not_have_is_refused(sdpa: Tiny, layer: int):
    with pytest.raises(ValueError, match=f"^atp: layer .*got {layer}"):
        sdpa.prune(make(sdpa, "atp", layer=layer))


@pytest.mark.parametrize("strategy", ["atp", "vprune", "random"])
def test_a_strategy_without_its_processor_is_refused(strategy: str):
    from vtp_plugin import prune

    host = tiny("llava_hf")
    with pytest.raises(ValueError, match="pass the model's processor"), prune(host.model, make(host, strategy)):
        host.generate(prompts("single"))


def test_a_model_of_no_family_is_refused():
    from vtp_plugin import prune

    with pytest.raises(ValueError, match=r"no adapter knows the model Linear\. Supported: .*LLaVA-1\.5"):
        prune(nn.Linear(2, 2), "l2")


# -- what the caller gets back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FEW)
def test_transformers_answers_behind_the_callers_prompt(case: str):
    host, rows = tiny("llava_hf"), prompts("batch")
    inputs = host.inputs(rows)
    length = inputs["input_ids"].shape[1]
    with host.prune(strategies(host, case)):
        ids = host.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        answer = host.generate(rows, max_new_tokens=3).sequences
        limited = host.model.generate(**inputs, max_length=length + 2, do_sample=False)
    assert ids[:, :length].equal(inputs["input_ids"])
    assert ids[:, length:].equal(answer)
    assert limited.equal(ids[:, : length + 2])


@pytest.mark.parametrize("case", ["l2", "fastv"])
def test_a_limit_in_the_generation_config_means_the_callers_prompt(case: str):
    from transformers import GenerationConfig

    host = tiny("llava_hf")
    inputs = host.inputs(prompts("single"))
    length = inputs["input_ids"].shape[1] + 2
    limits = GenerationConfig(max_length=length, do_sample=False, pad_token_id=0)
    with host.prune(strategies(host, case)):
        assert host.model.generate(**inputs, generation_config=limits).shape[1] == length


@pytest.mark.parametrize("case", ["l2", "fastv"])
def test_a_tuple_comes_back_where_the_caller_asked_for_one(case: str):
    host, rows = tiny("llava_hf"), prompts("single")
    with host.prune(strategies(host, case)), torch.no_grad():
        named, plain = host.forward(rows), host.forward(rows, return_dict=False)
    assert isinstance(plain, tuple)
    assert plain[0].equal(named.logits)


@pytest.mark.parametrize("case", ["l2", "fastv"])
@torch.no_grad()
def test_the_last_logits_alone(case: str):
    host, rows = tiny("llava_hf"), prompts("batch")
    with host.prune(strategies(host, case)):
        assert host.forward(rows, logits_to_keep=1).logits[:, -1].allclose(host.forward(rows).logits[:, -1], **CLOSE)


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop"])
def test_decoding_that_crops_the_cache_is_refused_for_every_llm_strategy(sdpa: Tiny, name: str):
    strategy = get_strategy(name)(**({"layers": "1 2 3"} if name == "pyramiddrop" else {}))
    with sdpa.prune(strategy), pytest.raises(PruningError, match="prompt_lookup_num_tokens is not possible"):
        sdpa.generate(prompts("single"), prompt_lookup_num_tokens=2)
