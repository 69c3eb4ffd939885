"""What `generate` and caches take and give by column: one function per row of the table in docs/modes.md."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from forward_rows import LATE, close, generated, inputs_of, refused
from models import Tiny, prompts, tiny
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from vtp_plugin.surgery import cache

ROWS: dict[str, Callable[[Tiny, str], None]] = {}
FULL = {"return_dict_in_generate": True, "output_logits": True}


def row(name: str) -> Callable:
    return lambda function: ROWS.setdefault(name, function)


def past(host: Tiny) -> str:
    """The argument that carries the cache."""
    return cache.name_in(inspect.signature(host.model.forward).parameters)


class Seen(LogitsProcessor, StoppingCriteria, BaseStreamer):
    """Remembers the ids that it is shown."""

    def __init__(self) -> None:
        self.shown: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.shown.append(input_ids.clone())
        return scores

    def put(self, value: Tensor) -> None:
        self.shown.append(value.clone())

    def end(self) -> None:
        pass


class After(Seen):
    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        super().__call__(input_ids, scores)
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@row("stopping_criteria")
def criteria(host: Tiny, case: str) -> None:
    first = inputs_of(host)
    after = After(first["input_ids"].shape[1] + 2)
    answer = generated(host, first, stopping_criteria=[after], max_new_tokens=9)
    assert answer.shape[1] == after.length
    assert all(ids.equal(answer[:, : ids.shape[1]]) for ids in after.shown)


@row("logits_processor, the host's own processors")
def processors(host: Tiny, case: str) -> None:
    first, seen = inputs_of(host), Seen()
    answer = generated(host, first, logits_processor=[seen])
    assert [ids.shape[1] - first["input_ids"].shape[1] for ids in seen.shown] == [0, 1, 2]
    assert all(ids.equal(answer[:, : ids.shape[1]]) for ids in seen.shown)
    alone = inputs_of(host, "single")  # padding is told apart by some releases only
    told = generated(host, alone, repetition_penalty=2.0, no_repeat_ngram_size=1, **FULL, output_scores=True)
    for raw, scores in zip(told.logits[0], told.scores[0], strict=True):
        said = torch.isin(torch.arange(len(raw)), alone["input_ids"])
        assert (scores[said] == float("-inf")).all()
        close(scores[~said], raw[~said])
    told = generated(host, alone, repetition_penalty=2.0, **FULL, output_scores=True)
    said = torch.isin(torch.arange(told.logits[0].shape[1]), alone["input_ids"])
    raw = told.logits[0]
    close(told.scores[0], torch.where(said, torch.where(raw < 0, raw * 2, raw / 2), raw))


@row("prefix_allowed_tokens_fn")
def prefixes(host: Tiny, case: str) -> None:
    first, shown = inputs_of(host), []

    def allowed(number: int, ids: Tensor) -> list[int]:
        shown.append((number, ids.clone()))
        return [ids.shape[0] % 80, 5]

    answer = generated(host, first, prefix_allowed_tokens_fn=allowed)
    assert all(ids.equal(answer[number, : len(ids)]) for number, ids in shown)
    new = answer[:, first["input_ids"].shape[1] :]
    assert all(set(step.tolist()) <= {(answer.shape[1] - 3 + n) % 80, 5} for n, step in enumerate(new.T))


@row("streamer")
def streamer(host: Tiny, case: str) -> None:
    first, seen = inputs_of(host, "single"), Seen()
    answer = generated(host, first, streamer=seen)
    assert seen.shown[0].equal(first["input_ids"])
    assert torch.cat([part.flatten() for part in seen.shown]).equal(answer[0])


@row("max_length, min_length: in the call, the passed configuration, the model's own")
def lengths(host: Tiny, case: str) -> None:
    first = inputs_of(host, "single")
    length, own = first["input_ids"].shape[1], copy.deepcopy(host.model.generation_config)
    limits = {"max_length": length + 4, "do_sample": False, "pad_token_id": 0}
    answer = host.model.generate(**first, **limits)
    assert answer.shape[1] == length + 4
    assert host.model.generate(**first, generation_config=GenerationConfig(**limits)).equal(answer)
    ending = {**limits, "eos_token_id": answer[0, length].item()}
    assert host.model.generate(**first, **ending).shape[1] == length + 1
    later = host.model.generate(**first, **ending, min_length=length + 2)
    assert (later[0, length : length + 2] != answer[0, length]).all()
    freed = host.model.generate(**first, **ending, min_length=length)
    assert freed.shape[1] == length + 1
    try:
        host.model.generation_config.max_length = length + 2
        assert host.model.generate(**first, do_sample=False).shape[1] == length + 2
    finally:
        host.model.generation_config = own


@row("guidance_scale, negative_prompt_ids")
def guidance(host: Tiny, case: str) -> None:
    first = inputs_of(host, "single")
    plain = generated(host, first, **FULL)
    negative = torch.tensor([[1, 17, 18, 19]])
    guided = generated(host, first, guidance_scale=1.7, negative_prompt_ids=negative, output_scores=True, **FULL)
    close(guided.logits[0], plain.logits[0])
    token = guided.sequences[:, first["input_ids"].shape[1], None]
    for step, ids in enumerate((negative, torch.cat([negative, token], 1))):
        with_image, without = guided.logits[step].log_softmax(-1), host.model(ids).logits[:, -1].log_softmax(-1)
        close(guided.scores[step], 1.7 * (with_image - without) + without)


@row("assistant_model, prompt_lookup_num_tokens: wherever they are switched on")
def candidates(host: Tiny, case: str) -> None:
    first, own = inputs_of(host, "single"), host.model.generation_config
    lookup = GenerationConfig(prompt_lookup_num_tokens=2, max_new_tokens=3, do_sample=False, pad_token_id=0)
    calls = [
        lambda: generated(host, first, assistant_model=tiny("llava_hf", "eager").model),
        lambda: generated(host, first, prompt_lookup_num_tokens=2),
        lambda: host.model.generate(**first, generation_config=lookup),
    ]
    wanted = generated(host, first)
    for call in calls:
        if case in LATE:
            refused("not possible when decoder layers cache unequal lengths", call)
        else:
            assert call().equal(wanted)
    own.prompt_lookup_num_tokens = 2
    try:
        if case in LATE:
            refused("not possible when decoder layers cache unequal lengths", generated, host, first)
        else:
            assert generated(host, first).equal(wanted)
    finally:
        own.prompt_lookup_num_tokens = None


@row("prefill_chunk_size, token_healing, continuous batching")
def not_with_images(host: Tiny, case: str) -> None:
    if case == "none":
        return
    first = inputs_of(host, "single")
    refused("prefill_chunk_size", generated, host, first, prefill_chunk_size=8)
    refused("token_healing", generated, host, first, token_healing=True)
    refused("continuous batching", generated, host, first, cache_implementation="paged")
    config = GenerationConfig(prefill_chunk_size=8)
    refused("prefill_chunk_size", host.model.generate, **first, generation_config=config)


@row("custom_generate")
def custom_generate(host: Tiny, case: str) -> None:
    first, shown = inputs_of(host), []

    def own(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
        shown.append(ids)
        return type(model)._sample(model, ids, **kwargs)

    assert generated(host, first, custom_generate=own).equal(generated(host, first))
    assert shown[0].equal(first["input_ids"])


# -- caches ---------------------------------------------------------------------------------------------------------


def grown(mask: Tensor, count: int = 1) -> Tensor:
    return torch.cat([mask, mask.new_ones(len(mask), count)], 1)


def filled(host: Tiny, kind: str, **kwargs: Any) -> tuple[Any, Tensor, Tensor]:
    """The cache of a prompt, its mask, and its last logits."""
    first = inputs_of(host, kind)
    output = host.model(**first, **kwargs, use_cache=True)
    return cache.of_output(output), first["attention_mask"], output.logits[:, -1]


@row("a decoding loop of one's own")
def own_loop(host: Tiny, case: str) -> None:
    for kind in ("single", "batch"):
        wanted = torch.stack(generated(host, inputs_of(host, kind), **FULL).logits)
        for counted in (False, True):
            given = inputs_of(host, kind)["attention_mask"]
            positions = {"position_ids": (given.cumsum(1) - 1).clamp(min=0)} if counted else {}
            stored, mask, logits = filled(host, kind, **positions)
            seen = [logits]
            for _ in range(2):
                mask, token = grown(mask), seen[-1].argmax(-1)[:, None]
                where = {"position_ids": mask.sum(1, keepdim=True) - 1} if counted else {}
                output = host.model(token, attention_mask=mask, **{past(host): stored}, **where)
                seen.append(output.logits[:, -1])
            close(torch.stack(seen), wanted)


@row("a second turn: forward")
def second_turn(host: Tiny, case: str) -> None:
    new = torch.tensor([[41, 42, 43]])
    for kind in ("single", "batch"):
        stored, mask, _ = filled(host, kind)
        again, one = copy.deepcopy(stored), mask
        together = host.model(new.expand(len(mask), -1), attention_mask=grown(mask, 3), **{past(host): stored}).logits
        for number, token in enumerate(new[0]):
            one = grown(one)
            step = host.model(token.expand(len(mask), 1), attention_mask=one, **{past(host): again}).logits
            close(step[:, 0], together[:, number])


@row("a second turn: generate, with the whole conversation or what is new")
def second_generate(host: Tiny, case: str) -> None:
    first = inputs_of(host, "single")
    told = generated(host, first, **FULL)
    new = torch.tensor([[41, 42, 43]])
    whole = torch.cat([told.sequences, new], 1)
    mask, stored = torch.ones_like(whole), cache.of_output(told)
    copies = [copy.deepcopy(stored) for _ in range(3)]
    want = host.model(
        torch.cat([told.sequences[:, -1:], new], 1), attention_mask=mask, **{past(host): copies[0]}
    ).logits[:, -1]
    for ids, held in ((whole, copies[1]), (whole[:, -4:], copies[2])):
        answer = host.model.generate(
            ids, attention_mask=mask, **{past(host): held}, do_sample=False, max_new_tokens=2, **FULL
        )
        close(answer.logits[0], want)
        assert answer.sequences[:, : ids.shape[1]].equal(ids)


@row("a copy of a cache")
def copied(host: Tiny, case: str) -> None:
    stored, mask, logits = filled(host, "batch")
    twin, token = copy.deepcopy(stored), logits.argmax(-1)[:, None]
    answers = [host.model(token, attention_mask=grown(mask), **{past(host): one}).logits for one in (stored, twin)]
    close(*answers)


@row("rows of a cache moved, taken or repeated: `reorder_cache` and its like")
def regrouped(host: Tiny, case: str) -> None:
    rows = {
        "reorder_cache": (torch.tensor([2, 0, 1]), [2, 0, 1]),
        "batch_select_indices": (torch.tensor([2, 1]), [2, 1]),
        "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2]),
    }
    stored, mask, logits = filled(host, "batch")
    token, mask = logits.argmax(-1)[:, None], grown(mask)
    wanted = host.model(token, attention_mask=mask, **{past(host): copy.deepcopy(stored)}).logits
    for name, (given, chosen) in rows.items():
        twin = copy.deepcopy(stored)
        getattr(twin, name)(given)
        close(host.model(token[chosen], attention_mask=mask[chosen], **{past(host): twin}).logits, wanted[chosen])
    twin = copy.deepcopy(stored)
    twin.batch_repeat_interleave(2)
    twin.reorder_cache(torch.tensor([5, 4, 0, 1, 2, 2]))
    again, chosen = copy.deepcopy(twin), [2, 2, 0, 0, 1, 1]
    close(host.model(token[chosen], attention_mask=mask[chosen], **{past(host): again}).logits, wanted[chosen])
    answer = generated(host, inputs_of(host), num_beams=2, num_return_sequences=2, **FULL)  # a cache of six rows
    whole = torch.cat([inputs_of(host)["attention_mask"].repeat_interleave(2, 0), torch.ones(6, 3).long()], 1)
    last, held = answer.sequences[:, -1:], cache.of_output(answer)
    if held.get_seq_length() + 1 != whole.shape[1]:
        return
    wanted = host.model(last, attention_mask=whole, **{past(host): copy.deepcopy(held)}).logits
    held.reorder_cache(torch.tensor([4, 5, 0, 1, 2, 3]))
    moved = [4, 5, 0, 1, 2, 3]
    close(host.model(last[moved], attention_mask=whole[moved], **{past(host): held}).logits, wanted[moved])


@row("a cropped cache")
def cropped(host: Tiny, case: str) -> None:
    stored, mask, logits = filled(host, "single")
    token = logits.argmax(-1)[:, None]
    one = {"attention_mask": grown(mask), past(host): stored}
    wanted = host.model(token, **one).logits
    stored.crop(-1)
    close(host.model(token, **one).logits, wanted)
    stored.crop(-1 - 10)
    if case != "none":
        refused("cropped into what is left of an image", host.model, token, **one)


@row("images behind a filled cache")
def images_behind(host: Tiny, case: str) -> None:
    text = host.model(torch.tensor([[1, 17, 18, 19]]), use_cache=True)
    first = host.inputs(prompts("single"), padded=False)
    if case == "none":
        return
    for stored in (cache.of_output(text), filled(host, "single")[0]):
        refused("behind a filled cache", host.model, **first, **{past(host): stored})


@row("a cache of another attachment, a mask of what is left")
def strangers(host: Tiny, case: str) -> None:
    if case == "none":
        return
    stored, mask, logits = filled(host, "single")
    token = logits.argmax(-1)[:, None]
    short = grown(mask[:, :20])
    refused("speaks of the whole prompt", host.model, token, attention_mask=short, **{past(host): stored})
    stored._vtp_turn.owner = -1
    refused("pruned otherwise", host.model, token, attention_mask=grown(mask), **{past(host): stored})


@row("an empty cache, one that was emptied")
def emptied(host: Tiny, case: str) -> None:
    stored, first = DynamicCache(config=host.decoder.config), inputs_of(host, "single")
    wanted = generated(host, first)
    assert generated(host, first, **{past(host): stored}).equal(wanted)
    text, empty = torch.tensor([[1, 17, 18, 19]]), DynamicCache(config=host.decoder.config)
    for layer, fresh in zip(stored.layers, empty.layers, strict=True):
        layer.__dict__ = dict(fresh.__dict__)
    close(host.model(text, **{past(host): stored}).logits, host.model(text).logits)
    close(
        host.model(text[:, -1:], **{past(host): stored}).logits[:, -1],
        host.model(torch.cat([text, text[:, -1:]], 1)).logits[:, -1],
    )


@row("a cache that cannot say its length")
def unknown_cache(host: Tiny, case: str) -> None:
    if case == "none":  # the host's own sentence
        return
    pair, first = torch.zeros(1, 4, 5, 8), inputs_of(host, "single")
    for stored in (((pair, pair),) * 4, object()):
        refused("needs a cache of transformers", host.model, **first, **{past(host): stored})
        refused("needs a cache of transformers", host.model.generate, **first, **{past(host): stored})
