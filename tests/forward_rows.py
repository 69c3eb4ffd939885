"""What `forward` takes and gives by column: one function per row of the table in docs/modes.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import PLACEHOLDER, N, Tiny, prompts, tiny
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import modeling_utils
from transformers.utils import output_capturing

from vtp_plugin.errors import PruningError
from vtp_plugin.surgery import cache

LATE = ("fastv", "pyramiddrop")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
ROWS: dict[str, Callable[[Tiny, str], None]] = {}


def row(name: str) -> Callable:
    return lambda function: ROWS.setdefault(name, function)


def inputs_of(host: Tiny, kind: str = "batch") -> dict[str, Any]:
    return host.inputs(prompts(kind))


def refused(said: str, call: Callable, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(PruningError) as error:
        call(*args, **kwargs)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def close(got: Tensor, wanted: Tensor, real: Tensor | None = None) -> None:
    assert got.shape == wanted.shape
    assert torch.allclose(*(x if real is None else x[real] for x in (got, wanted)), **CLOSE)


def left(host: Tiny, logits: Tensor) -> Tensor:
    """The columns that the last layer saw, [B, L] bool."""
    return logits.abs().sum(-1) > 0


def labels_of(first: dict[str, Any]) -> Tensor:
    """The words, but for the first: padding predicts nothing."""
    ids, real = first["input_ids"], first["attention_mask"].bool()
    return ids.masked_fill((ids == PLACEHOLDER) | (real.cumsum(1) < 2), -100)


def generated(host: Tiny, first: dict[str, Any], **kwargs: Any) -> Tensor:
    return host.model.generate(**first, **{"max_new_tokens": 3, "do_sample": False} | kwargs)


# -- handed in ------------------------------------------------------------------------------------------------------


@row("input_ids, inputs")
def ids(host: Tiny, case: str) -> None:
    first = inputs_of(host)
    given = first.pop("input_ids")
    answer = generated(host, first | {"input_ids": given})
    assert answer[:, : given.shape[1]].equal(given)
    assert host.model.generate(given, **first, max_new_tokens=3, do_sample=False).equal(answer)
    assert generated(host, first | {"inputs": given}).equal(answer)


@row("attention_mask")
def masks(host: Tiny, case: str) -> None:
    first = inputs_of(host)
    mask = first.pop("attention_mask")
    real = mask.bool()
    wanted = host.model(**first, attention_mask=mask).logits
    close(host.model(**first, attention_mask=mask.bool()).logits, wanted, real)
    causal = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril()
    four = (causal & real[:, None]) | torch.eye(mask.shape[1], dtype=torch.bool)  # [B, L, L]
    close(host.model(**first, attention_mask=four[:, None]).logits, wanted, real)
    additive = torch.zeros(four[:, None].shape).masked_fill(~four[:, None], torch.finfo(torch.float32).min)
    close(host.model(**first, attention_mask=additive).logits, wanted, real)


@row("padding on the right")
def right_padding(host: Tiny, case: str) -> None:
    first = inputs_of(host)
    real, told = first["attention_mask"].bool(), labels_of(first)
    order = (~real).int().sort(dim=1, stable=True).indices  # words first
    other = first | {name: first[name].gather(1, order) for name in ("input_ids", "attention_mask")}
    wanted, output = host.model(**first, labels=told), host.model(**other, labels=told.gather(1, order))
    close(output.logits[other["attention_mask"].bool()], wanted.logits[real])
    close(output.loss, wanted.loss)
    close(host.model(**other, logits_to_keep=4).logits, output.logits[:, -4:])


@row("position_ids")
def positions(host: Tiny, case: str) -> None:
    first = inputs_of(host)
    length, real = first["input_ids"].shape[1], first["attention_mask"].bool()
    wanted = host.model(**first).logits
    close(host.model(**first, position_ids=torch.arange(length)[None]).logits, wanted, real)
    counted = (real.cumsum(1) - 1).clamp(min=0)
    close(host.model(**first, position_ids=counted).logits, wanted, real)
    if case in ("l2", "stride"):
        odd = 2 * counted
        refused("comes with its own position_ids", host.model, **first, position_ids=odd)


@row("labels")
def labels(host: Tiny, case: str) -> None:
    first = inputs_of(host)
    told, output = labels_of(first), host.model(**first, labels=labels_of(first))
    there, losses = left(host, output.logits), []
    for logits, row, kept in zip(output.logits, told, there, strict=True):
        losses.append(cross_entropy(logits[kept][:-1], row[kept][1:], reduction="none")[row[kept][1:] >= 0])
    close(output.loss, torch.cat(losses).mean())


@row("shift_labels")
def shift_labels(host: Tiny, case: str) -> None:
    first = inputs_of(host)
    told = labels_of(first)
    shifted = pad(told, (0, 1), value=-100)[:, 1:].contiguous()
    wanted = host.model(**first, labels=told).loss
    close(host.model(**first, labels=told, shift_labels=shifted).loss, wanted)
    doubled = torch.where(shifted < 0, shifted, (shifted + 7) % 80)
    assert not host.model(**first, labels=told, shift_labels=doubled).loss.allclose(wanted)


@row("num_items_in_batch, what else the loss takes")
def loss_arguments(host: Tiny, case: str) -> None:
    first = inputs_of(host)
    told = labels_of(first)
    n = int((told[:, 1:] >= 0).sum())
    alone = host.model(**first, labels=told).loss
    close(host.model(**first, labels=told, num_items_in_batch=4 * n).loss, alone / 4)
    close(host.model(**first, labels=told, num_items_in_batch=torch.tensor(n)).loss, alone)
    close(host.model(**first, labels=told.masked_fill(told < 0, -1), ignore_index=-1).loss, alone)
    shifted = pad(told, (0, 1), value=-1)[:, 1:].masked_fill(pad(told, (0, 1), value=-1)[:, 1:] < 0, -1)
    close(host.model(**first, labels=told, shift_labels=shifted, ignore_index=-1).loss, alone)
    seen = {}

    def loss(logits: Tensor, labels: Tensor, vocab_size: int, weights: Tensor | None = None, **kwargs: Any) -> Tensor:
        seen.update(weights=weights, labels=labels)
        return logits.sum()

    host.model.loss_function = loss
    try:
        host.model(**first, labels=told, weights=told.float())
    finally:
        del host.model._loss_function
    assert seen["weights"].shape[1] >= seen["labels"].shape[1]
    if case not in LATE:
        known = seen["labels"] >= 0
        assert seen["weights"][known].equal(seen["labels"][known].float())


@row("logits_to_keep")
def logits_to_keep(host: Tiny, case: str) -> None:
    first = inputs_of(host)
    full, length = host.model(**first).logits, first["input_ids"].shape[1]
    for count in (1, 4, 20, length, length + 5):
        close(host.model(**first, logits_to_keep=count).logits, full[:, -count:])
    for columns in ([length - 1], [3, 40, -2], [50, 49]):
        close(host.model(**first, logits_to_keep=torch.tensor(columns)).logits, full[:, columns])
    for columns in (torch.tensor(length - 2), torch.arange(length) > 40):
        close(host.model(**first, logits_to_keep=columns).logits, full[:, columns])
    if not hasattr(modeling_utils, "slice_logits_to_keep"):  # the host of 5.17 knows no columns by row
        return
    each = torch.tensor([[5, 60], [70, 77], [40, 41]])
    close(host.model(**first, logits_to_keep=each).logits, full.take_along_dim(each[..., None], 1))
    mask = torch.zeros(full.shape[:2], dtype=torch.bool)
    mask[0, 50], mask[2, 70:] = True, True
    close(host.model(**first, logits_to_keep=mask).logits, full[mask])


@row("labels with logits_to_keep")
def labels_kept(host: Tiny, case: str) -> None:
    first = inputs_of(host, "single")
    told, full = labels_of(first), host.model(**first).logits
    loss = host.model(**first, labels=told[:, -4:], logits_to_keep=4).loss
    kept = full[:, -4:-1].flatten(0, 1)
    close(loss, cross_entropy(kept, told[:, -3:].flatten()))
    columns = torch.arange(told.shape[1] - 3, told.shape[1])
    loss = host.model(**first, labels=told[:, columns], logits_to_keep=columns).loss
    close(loss, cross_entropy(full[:, columns[:-1]].flatten(0, 1), told[:, columns[1:]].flatten()))


@row("packed sequences")
def packed(host: Tiny, case: str) -> None:
    if case != "none":
        ends = torch.tensor([0, 20, 43], dtype=torch.int32)
        refused("packed sequences", host.model, **inputs_of(host, "single"), cu_seq_lens_q=ends, cu_seq_lens_k=ends)


@row("inputs_embeds")
def embeds(host: Tiny, case: str) -> None:
    if case == "none":
        return
    first = inputs_of(host, "single")
    merged = host.decoder.embed_tokens(first.pop("input_ids"))
    refused("pruning needs input_ids", host.model, **first, inputs_embeds=merged)
    del first["pixel_values"]
    refused("pruning needs input_ids", host.model, **first, inputs_embeds=merged)
    refused("pruning needs input_ids", host.model.generate, **first, inputs_embeds=merged)


@row("mm_encoder_outputs")
def features(host: Tiny, case: str) -> None:
    first = inputs_of(host, "single")
    made = host.model.model.get_image_features(first.pop("pixel_values"), return_dict=True)
    if case != "none":
        refused("pruning needs pixels", host.model, **first, mm_encoder_outputs={"image": made})


@row("return_dict=False")
def as_tuple(host: Tiny, case: str) -> None:
    first = inputs_of(host)
    output = host.model(**first, labels=labels_of(first), return_dict=False)
    close(output[1], host.model(**first).logits)


# -- got back -------------------------------------------------------------------------------------------------------


@row("hidden_states")
def hidden_states(host: Tiny, case: str) -> None:
    first = inputs_of(host)
    output = host.model(**first, output_hidden_states=True)
    assert {state.shape[:2] for state in output.hidden_states} == {first["input_ids"].shape}
    there = left(host, output.logits)
    close(host.model.lm_head(output.hidden_states[-1]), output.logits, there)
    embedded = host.decoder.embed_tokens(first["input_ids"])
    text = first["attention_mask"].bool() & (first["input_ids"] != PLACEHOLDER)
    assert output.hidden_states[0][text].equal(embedded[text])
    if hasattr(output_capturing, "selected_hidden_states"):  # older hosts take a flag, or nothing
        some = host.model(**first, output_hidden_states=[0, 3, -1]).hidden_states
        assert [state is not None for state in some] == [True, False, False, True, True]
        assert all(a.equal(b) for a, b in zip(some, output.hidden_states, strict=True) if a is not None)
    answer = generated(host, first, output_hidden_states=True, return_dict_in_generate=True)
    close(answer.hidden_states[0][-1], output.hidden_states[-1], there)


@row("attentions")
def attentions(host: Tiny, case: str) -> None:
    eager, length = tiny("llava_hf", "eager"), inputs_of(host)["input_ids"].shape[1]
    with eager.prune(case, **({"positions": "original"} if case == "stride" else {})):
        output = eager.model(**inputs_of(eager), output_attentions=True)
        answer = generated(eager, inputs_of(eager), output_attentions=True, return_dict_in_generate=True)
    there = left(eager, output.logits)
    for weights in output.attentions:
        assert weights.shape[-2:] == (length, length)
    last = output.attentions[-1].mean(1)
    close(last.sum(-1)[there], torch.ones(int(there.sum())))
    assert not (last * ~there[:, None])[there].any()
    assert [step[-1].shape[-2:] for step in answer.attentions] == [(length, length), (1, length + 1), (1, length + 2)]
    close(answer.attentions[1][-1].sum(-1), torch.ones(answer.attentions[1][-1].shape[:3]))


@row("image_outputs, with hidden states and attentions of the tower")
def image_outputs(host: Tiny, case: str) -> None:
    eager = tiny("llava_hf", "eager")
    first, asked = inputs_of(eager), {"output_hidden_states": True, "output_attentions": True}
    whole = eager.model(**first, **asked)
    with eager.prune(case):
        output = eager.model(**first, **asked)
    if not hasattr(whole, "image_outputs"):  # the host of 5.17
        return
    left = N // 2 if case in ("l2", "stride") else N
    assert [len(rows) for rows in output.image_outputs.pooler_output] == [left] * len(first["pixel_values"])
    inside = 1 + (N // 2 if case == "l2" else N)
    ours, hosts = output.image_outputs, whole.image_outputs
    assert ours.keys() == hosts.keys()
    assert {maps.shape[-2:] for maps in ours.attentions} == {(inside, inside)}
    assert len(ours.hidden_states) == len(hosts.hidden_states)
    assert ours.hidden_states[-1].shape[:2] == (len(first["pixel_values"]), inside)
    if case != "l2":
        assert all(a.equal(b) for a, b in zip(ours.hidden_states, hosts.hidden_states, strict=True))
    passing_singly(eager, first, asked)


def passing_singly(host: Tiny, first: dict[str, Any], asked: dict[str, bool]) -> None:
    """Images that may keep unequal numbers: each as by itself, zeros where another one has more."""
    with host.prune("vprune") as pruned:
        together = host.model(**first, **asked).image_outputs
        after = [count for event in pruned.events for count in event.after]
        alone = host.model(**host.inputs(prompts("batch")[2:]), **asked).image_outputs  # the last image
        (count,) = pruned.events[-1].after
    most = 1 + max(after)
    assert len(set(after)) > 1
    assert [len(rows) for rows in together.pooler_output] == after
    assert {states.shape[:2] for states in together.hidden_states} == {(len(after), most)}
    assert {maps.shape[2:] for maps in together.attentions} == {(most, most)}
    close(together.pooler_output[-1], alone.pooler_output[0])
    for states, own in zip(together.hidden_states, alone.hidden_states, strict=True):
        close(states[-1, : 1 + count], own[0])
    shortest = after.index(min(after))
    assert not together.hidden_states[-1][shortest, 1 + min(after) :].any()


@row("length of the cache")
def length_of_the_cache(host: Tiny, case: str) -> None:
    first = inputs_of(host)
    stored = cache.of_output(host.model(**first, use_cache=True))
    assert stored.get_seq_length() == first["input_ids"].shape[1]
    if case != "none":
        assert stored.layers[-1].keys.shape[2] < first["input_ids"].shape[1]
