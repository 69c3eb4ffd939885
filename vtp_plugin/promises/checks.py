"""What a model family promises, check by check, on a small model of it.

Every check is a function of a `Case` that returns a remark, or raises `Broken` with what failed and why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vtp_plugin.outcomes import Broken, Outcome, outcomes
from vtp_plugin.promises.case import Case
from vtp_plugin.promises.probe import Probe, Ran, dead, entering, generate, noisy, parts_of, placeholders
from vtp_plugin.promises.reference import Dropped, logits
from vtp_plugin.promises.state import state
from vtp_plugin.pruning import prune
from vtp_plugin.reporting.record import samples_of
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import POSITIONS
from vtp_plugin.surgery import cache
from vtp_plugin.tokens import Selection, VisualTokens

CLOSE = {"atol": 2e-4, "rtol": 1e-3}
CUT = 1  # new tokens of a call that is asked for its cuts: these fall before the first


def promises(case: Case) -> Iterator[Outcome]:
    """Every check on the family, one after the other; a model that no family knows gets no further."""
    return outcomes(CHECKS, case, needed=_known)


def _stages(case: Case) -> list[Stage]:
    return [stage for stage, reason in case.adapter.stages.items() if not reason]


def _probe(case: Case, stage: Stage, **fields: Any) -> Probe:
    layer = case.layer or max(2, case.adapter.first_cut)
    return Probe(at=stage.value, layer=layer, **fields)


def _inputs(case: Case) -> list[Mapping[str, Any]]:
    return [*case.prompts, *([case.batch] if case.batch is not None else [])]


def _everywhere(case: Case, stage: Stage, inputs: Mapping[str, Any]) -> list[list[int]]:
    """Per image, the positions that a probe which keeps everything sees."""
    return generate(case, inputs, _probe(case, stage, keep_ratio=1.0), new=CUT).kept


def _forward(case: Case, inputs: Mapping[str, Any]) -> Tensor:
    """Logits of the columns that are not padding, [n, V]."""
    with torch.no_grad():
        found = case.model(**inputs).logits
    mask = inputs.get("attention_mask")
    return found.flatten(0, 1) if mask is None else found[mask.bool()]


# -- the checks -------------------------------------------------------------------------------------------------------


def _known(case: Case) -> str:
    """is known, and says for every stage that it cuts there, or why not"""
    adapter = case.adapter
    if missing := [stage.value for stage in Stage if stage not in adapter.stages]:
        raise Broken(f"stages says nothing of {', '.join(missing)}: '' for yes, or the reason why not")
    if not (able := _stages(case)):
        raise Broken("no stage is possible")
    if Stage.PIXELS in able and case.processor is None:
        raise Broken("pixels are judged with the processor's mean and standard deviation: Case(processor=...)")
    refused = [f"{stage.value}: {reason}" for stage, reason in adapter.stages.items() if reason]
    return "; ".join([f"{adapter.family} at {', '.join(stage.value for stage in able)}", *refused])


def _everything(case: Case) -> str:
    """changes no bit where everything is kept"""
    for inputs in _inputs(case):
        plain, answer = _forward(case, inputs), generate(case, inputs).sequences
        for stage in _stages(case):
            with prune(case.model, _probe(case, stage, keep_ratio=1.0), processor=case.processor):
                if not _forward(case, inputs).equal(plain):
                    raise Broken(f"{stage.value}: keep_ratio=1 gives other logits than the model without pruning")
            if not generate(case, inputs, _probe(case, stage, keep_ratio=1.0)).sequences.equal(answer):
                raise Broken(f"{stage.value}: keep_ratio=1 generates another text")
    return ""


def _undone(case: Case) -> str:
    """gives the model back as it was, also after an exception in the middle of a call"""
    inputs = _inputs(case)[-1]
    plain = _forward(case, inputs)
    before = state(case.model, case.adapter.image_processor)
    for stage in _stages(case):
        with prune(case.model, _probe(case, stage), processor=case.processor):
            _forward(case, inputs)
        _same_state(case, before, f"{stage.value}: detaching")
        failing = _Failing(at=stage.value, layer=_probe(case, stage).layer)
        try:
            with prune(case.model, failing, processor=case.processor):
                _forward(case, inputs)
        except ZeroDivisionError:
            pass
        else:
            raise Broken(f"{stage.value}: an error in a strategy was swallowed, or the strategy was never asked")
        _same_state(case, before, f"{stage.value}: an exception")
    if not _forward(case, inputs).equal(plain):
        raise Broken("the detached model answers with other logits than before")
    return ""


class _Failing(Probe):
    """Raises when it is asked."""

    def select(self, visual: VisualTokens) -> Selection:
        raise ZeroDivisionError("in the middle of a call")


def _same_state(case: Case, before: Mapping[str, Any], what: str) -> None:
    after = state(case.model, case.adapter.image_processor)
    if changed := sorted(key for key in {*before, *after} if before.get(key) != after.get(key)):
        raise Broken(f"{what} leaves {', '.join(changed[:3])} changed")


def _budget(case: Case) -> str:
    """keeps exactly as many as asked, in ascending order, of what a probe that keeps everything sees"""
    said = []
    for stage in _stages(case):
        for inputs in _inputs(case):
            probe = _probe(case, stage)
            whole, cut = _everywhere(case, stage, inputs), generate(case, inputs, probe, new=CUT)
            for number, (all_, kept) in enumerate(zip(whole, cut.kept, strict=True)):
                if kept != sorted(set(kept)) or not set(kept) <= set(all_):
                    raise Broken(f"{stage.value}: image {number} keeps {kept}, which are no ascending part of {all_}")
            _counts(stage, probe, cut)
            said.append(f"{stage.value} {sum(map(len, whole))} -> {sum(map(len, cut.kept))}")
    return ", ".join(dict.fromkeys(said))


def _counts(stage: Stage, probe: Probe, cut: Ran) -> None:
    for event in cut.events:
        for before, after, kept in zip(event.before, event.after, event.kept, strict=True):
            if after != len(kept) or (before > 2 and not 0 < after < before):
                raise Broken(f"{stage.value}: {before} tokens of an image became {after}, {len(kept)} are named")
            if stage is not Stage.VIT and stage is not Stage.PIXELS and after != probe.count(before):
                raise Broken(
                    f"{stage.value}: {probe.count(before)} of {before} tokens were asked for, {after} are left"
                )


def _referenced(case: Case) -> str:
    """generates what a slow reference computes that has no cache and drops nothing on the way"""
    if reason := _no_prompt(case):
        return f"left out: {reason}"
    held = []
    for stage in _stages(case):
        for number, inputs in enumerate(case.prompts):
            if stage is Stage.LLM and _slides(case, inputs):
                held.append("llm left out: hidden columns count in a sliding window that is shorter than the prompt")
                continue
            for positions in _numberings(case, stage, first=number == 0):
                _equals(case, stage, number, positions)
            held.append(stage.value)
    return ", ".join(dict.fromkeys(held))


def _no_prompt(case: Case) -> str:
    if case.adapter.language_model is None or not len(case.adapter.decoder_layers):
        return "the family has no language model of its own layers"
    if not hasattr(case.adapter.language_model, "rotary_emb"):
        return "positions are told to a language model by its rotary embedding"
    return "" if hasattr(case.adapter, "image_token") else "the prompt has no placeholder for every token"


def _slides(case: Case, inputs: Mapping[str, Any]) -> bool:
    """Hidden columns still count in a window, dropped ones do not: only shorter prompts can be compared."""
    config = case.adapter.language_model.config
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    return bool(window and slides) and inputs["input_ids"].shape[1] + 4 >= window


def _numberings(case: Case, stage: Stage, first: bool) -> Sequence[str | None]:
    """The values of `positions` that are compared; None where a family has its own and lets nobody choose."""
    if case.adapter.fixed_positions and stage is not Stage.LLM:
        return (None,)
    return POSITIONS if first else POSITIONS[:1]


def _equals(case: Case, stage: Stage, number: int, positions: str | None) -> None:
    probe, inputs = _probe(case, stage, positions=positions), noisy(case.prompts[number])
    with entering(case) as entered:
        found = generate(case, inputs, probe)
    answer = found.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    said = positions or "original"
    dropped = Dropped(later=case.later, **{"late_positions" if stage is Stage.LLM else "positions": said})
    if stage in (Stage.PIXELS, Stage.VIT):
        with entering(case) as whole:
            generate(case, inputs, new=CUT)
        dropped.tower = dead(whole, entered)
    elif stage is Stage.PROJECTOR:
        dropped.columns = _missing(case, stage, inputs, found)
    else:
        dropped.late, dropped.layer = _missing(case, stage, inputs, found), probe.layer
    slow = logits(case.model, parts_of(case), inputs, dropped, answer)
    if not torch.allclose(found.logits[:, 0], slow, **CLOSE):
        off = (found.logits[:, 0] - slow).abs().max().item()
        raise Broken(
            f"{stage.value}, {said} positions: prompt {number}: logits are {off:.2g} away from the slow reference's"
        )


def _missing(case: Case, stage: Stage, inputs: Mapping[str, Any], found: Ran) -> Tensor:
    """The columns whose tokens were judged and dropped; what nobody judges, such as newlines, stays."""
    judged = _everywhere(case, stage, inputs)
    at = placeholders(case, inputs)
    return torch.cat([c[sorted({*a} - {*k})] for c, a, k in zip(at, judged, found.kept, strict=True)])


def _batched(case: Case) -> str:
    """answers a batch as it answers its samples"""
    if case.batch is None:
        return "left out: Case(batch=...) gives the prompts together"
    for stage in _stages(case):
        together, row, number = generate(case, case.batch, _probe(case, stage)), 0, 0
        for row, inputs in enumerate(case.prompts):
            alone = generate(case, inputs, _probe(case, stage))
            if together.kept[number : number + len(alone.kept)] != alone.kept:
                raise Broken(f"{stage.value}: sample {row} keeps other tokens in a batch than alone")
            number += len(alone.kept)
            if not torch.allclose(together.logits[:, row], alone.logits[:, 0], **CLOSE):
                raise Broken(f"{stage.value}: sample {row} has other logits in a batch than alone")
    return ""


def _composed(case: Case) -> str:
    """cuts at all of its stages in one call, each of what the one before left"""
    probes = [_probe(case, stage, keep_ratio=0.7) for stage in _stages(case)]
    if len(probes) < 2:
        return "left out: there is one stage"
    events = generate(case, _inputs(case)[-1], *probes, new=CUT).events
    cut = {event.stage for event in events}
    if missing := [stage.value for stage in _stages(case) if stage not in cut]:
        raise Broken(f"nothing was cut at {', '.join(missing)}")
    for image in {number for event in events for number in event.images}:
        counts = [n for event in events for number, n in zip(event.images, event.after, strict=True) if number == image]
        if counts != sorted(counts, reverse=True):
            raise Broken(f"image {image} has {counts} tokens behind the cuts: one of them grew again")
    return " -> ".join(f"{event.stage.value} {sum(event.after)}" for event in events)


def _counted(case: Case) -> str:
    """reports the KV cache that there is"""
    if _no_prompt(case):
        return "left out: there is no cache"
    inputs = case.prompts[0]
    for stage in _stages(case):
        calls: list[Any] = []
        with prune(case.model, _probe(case, stage), processor=case.processor) as pruned, torch.no_grad():
            pruned.finished.append(calls.append)
            held = cache.of_output(case.model(**inputs, use_cache=True))
            report = samples_of(pruned, calls[0])[0]["kv_cache_bytes"]["after"]
        found = sum(t.numel() * t.element_size() for layer in held.layers for t in _stored(layer))
        if report != found and not _slides(case, inputs):
            raise Broken(f"{stage.value}: the record says {report} bytes of KV cache, the cache has {found}")
    return ""


def _stored(layer: Any) -> list[Tensor]:
    """What one layer of the cache holds: keys and values, or a recurrent layer's states."""
    if hasattr(layer, "keys"):
        return [layer.keys, layer.values]
    found: list[Tensor] = []
    for value in vars(layer).values():
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        found += [part for part in parts if isinstance(part, Tensor)]
    return found


CHECKS: tuple[Callable[[Case], str], ...] = (
    _known,
    _undone,
    _everything,
    _budget,
    _batched,
    _composed,
    _counted,
    _referenced,
)
