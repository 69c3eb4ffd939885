"""The traps of the hosts: what goes wrong in silence, the guard against it, and the test that fails without the guard.

Every test that `TRAPS` names, and every test below, was seen to fail with its guard taken out of the code.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from families import FAMILIES, pixels
from family_runs import batched, clip, generated, model_of, prompts_of
from models import built
from paths import TESTS
from torch import nn

import vtp_plugin as vtp
from vtp_plugin import Stage, clock, get_strategy
from vtp_plugin.bench import rounds as bench
from vtp_plugin.bench import selectors as selector_cost
from vtp_plugin.bench import timing
from vtp_plugin.hosts.transformers import shapes
from vtp_plugin.metrics import latency
from vtp_plugin.surgery.undo import Undo

TRAPS = {  # trap -> (guard, test)
    "a part of the model that is never called: nothing is cut": (
        "Pruned._prove",
        "surgery/test_promises.py::test_a_part_that_is_never_called_is_an_error",
    ),
    "a whole run that cuts nothing": (
        "proof.check",
        "hosts/lmms_eval/test_cache.py::test_a_failed_run_leaves_nothing_to_serve",
    ),
    "the host answers an exception with an empty text": (
        "Pruned.failure",
        "hosts/lmms_eval/test_lmms_eval.py::test_an_error_that_the_host_swallows_fails_the_run",
    ),
    "the host exits with 0 after a failed run": (
        "lmms_eval._exit_code",
        "hosts/lmms_eval/test_lmms_eval.py::test_failed_runs_end_with_their_reason_and_without_results",
    ),
    "the response cache answers for another configuration": (
        "evaluation.Run._mark_cache",
        "hosts/lmms_eval/test_cache.py::test_only_the_same_configuration_hits",
    ),
    "gapped position ids are read as packed sequences": (
        "OriginalPositions, in front of the rotary embedding",
        "surgery/test_positions.py::test_the_host_counts_without_gaps",
    ),
    "a budget that holds on average, or on paper, is not the one that was spent": (
        "metrics.counting, from what every layer cached",
        "metrics/test_counting.py::test_kv_bytes_are_those_of_the_real_cache",
    ),
    "a random control that shuffles the tokens it keeps": (
        "Selection.sources, in the order of the mask",
        "strategies/test_strategies.py::test_kept_tokens_are_ascending_and_untouched",
    ),
    "the first call, which warms up, among the times": (
        "Call.warmup",
        "hosts/lmms_eval/test_lmms_eval.py::test_time_to_first_token_is_measured_per_sample",
    ),
}
STAGES = {"vit": "l2", "projector": "stride", "llm": "fastv"}


@pytest.mark.parametrize("trap", TRAPS)
def test_the_test_of_a_trap_exists(trap: str) -> None:
    file, name = TRAPS[trap][1].split("::")
    assert f"def {name}(" in (TESTS / file).read_text()


# -- positions, hooks, arguments --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if "llm" in family.stages])
def test_decoder_layers_are_told_positions_without_gaps(name: str) -> None:
    """Flash attention takes the position ids that a layer is given for the borders of packed sequences."""
    model, seen = model_of(name, "sdpa"), []

    def listen(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["position_ids"])

    late, inputs = FAMILIES[name].late, prompts_of(name, "single")
    for spec, fields in (("none", {}), ("fastv", {"keep_ratio": 0.3, "layer": late})):
        gapless = all((positions[..., 0, :].diff() == 1).all() for positions in seen)  # what the host itself tells
        seen.clear()
        with vtp.prune(model, spec, **fields) as pruned, Undo() as undo:
            for layer in pruned.adapter.decoder_layers:
                undo.before(layer, listen)
            generated(model, batched(FAMILIES[name], inputs), max_new_tokens=1)
    lengths = [positions.shape[-1] for positions in seen]
    assert len(set(lengths[:late])) == len(set(lengths[late:])) == 1
    assert lengths[0] > lengths[-1]
    assert not gapless or all((positions[..., 0, :].diff() == 1).all() for positions in seen)
    assert gapless or name == "glm4v_moe"  # which tells its layers the axes of the picture, pruned or not


def test_a_hook_that_changes_an_output_comes_before_the_hosts_own() -> None:
    """The host captures hidden states with hooks of its own, which it puts in place in its first call."""
    model, values = clip().vision_model, pixels(1, 3, 16, 16, seed=1)
    model(values, output_hidden_states=True)
    block = getattr(model, "vision_model", model).encoder.layers[1]
    with Undo() as undo, torch.no_grad():
        undo.after(block, lambda module, args, kwargs, output: torch.zeros_like(output))
        hidden = model(values, output_hidden_states=True).hidden_states
    assert [bool(states.any()) for states in hidden[:3]] == [True, True, False]


@pytest.mark.covering
@pytest.mark.parametrize(
    ("name", "stage"), [(name, stage) for name in FAMILIES for stage in STAGES if stage in FAMILIES[name].stages]
)
def test_ids_may_be_positional(name: str, stage: str) -> None:
    family, model = FAMILIES[name], model_of(name, "sdpa")
    inputs = batched(family, prompts_of(name, "batch"))
    rest = {key: value for key, value in inputs.items() if key != "input_ids"}
    fields = {"layer": family.late} if stage == "llm" else {}
    with vtp.prune(model, STAGES[stage], **fields) as pruned, torch.no_grad():
        named, ids = model(**inputs).logits, model.generate(**inputs, max_new_tokens=2, do_sample=False)
        pruned.events.clear()
        assert model(inputs["input_ids"], **rest).logits.equal(named)
        assert model.generate(inputs["input_ids"], **rest, max_new_tokens=2, do_sample=False).equal(ids)
        assert len({event.strategy for event in pruned.events}) == 1


# -- what is timed ----------------------------------------------------------------------------------------------------


def kernels(model: nn.Module) -> list[str]:
    """The attention kernel of every module that has a configuration."""
    return [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]


@pytest.mark.parametrize("stage", STAGES)
def test_reading_attention_forces_no_other_kernel(stage: str) -> None:
    """Neither in the configurations nor for the one call, by asking the host for its attention."""
    model, asked = model_of("llava_next", "sdpa"), []
    before, reads = kernels(model), {"vit": "l2", "projector": "visionzip", "llm": "sparsevlm"}[stage]

    def listen(module: nn.Module, args: Any, kwargs: Any) -> None:
        asked.append((kwargs.get("output_attentions"), kernels(model)))

    with vtp.prune(model, reads), Undo() as undo:
        for module in (model.model, model.model.vision_tower, model.model.language_model):
            undo.before(module, listen)
        generated(model, batched(FAMILIES["llava_next"], prompts_of("llava_next", "single")))
    assert len(asked) > 3
    assert all(not attentions and seen == before for attentions, seen in asked)
    assert kernels(model) == before


def test_all_sides_of_a_timing_have_one_kernel_and_are_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first round, here a slow one, is not among the times."""
    seen: dict[str, list[list[str]]] = defaultdict(list)

    def timed(self: Any, run: Any, peaks: Any, side: str) -> float:
        run()
        seen[side].append(kernels(self.model))
        return 1.0 if len(seen[side]) > 1 else 100.0

    monkeypatch.setattr(bench._Bench, "_timed", timed)
    shape, model = shapes.shape_of("clip-vit-small"), built("clip-vit-small")
    (found,) = bench.compare(shape, model, [get_strategy("l2")(keep_ratio=0.5)], batch=1, repeats=2)
    assert found.seconds == {side: [1.0, 1.0] for side in timing.SIDES}
    assert {kernel for side in timing.SIDES for call in seen[side] for kernel in call} == {"sdpa"}


def test_a_selectors_time_is_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 100.0, 100.0, 101.0])
    monkeypatch.setattr(selector_cost, "clock", lambda device: next(ticks))
    assert selector_cost._timed(lambda: None, 1, torch.device("cpu")) == 1.0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_clock_waits_for_the_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is given work and finishes it later: first it is waited for, then the time is read."""
    happened: list[str] = []
    monkeypatch.setattr(clock.torch.cuda, "synchronize", lambda device: happened.append("waited"))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: happened.append("read") or 1.0)
    assert clock.clock(torch.device(device)) == 1.0
    assert happened == (["waited", "read"] if device == "cuda" else ["read"])
    happened.clear()
    assert clock.clock(torch.device(device), waiting=False) == 1.0  # nothing is measured: nobody waits
    assert happened == ["read"]


def test_every_part_of_a_call_is_between_two_readings_of_that_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[float] = []

    def reading(device: torch.device, *, waiting: bool = True) -> float:
        assert waiting
        read.append(float(len(read)))
        return read[-1]

    monkeypatch.setattr(latency, "clock", reading)
    model = model_of("llava_next", "sdpa")
    with vtp.prune(model, "stride", measure=True) as pruned:
        calls: list[Any] = []
        pruned.finished.append(calls.append)
        generated(model, batched(FAMILIES["llava_next"], prompts_of("llava_next", "single")), max_new_tokens=2)
    parts = ("tower", "selector", "projector", "prefill", "decode")
    assert all(calls[0].seconds[part] >= 1 and calls[0].seconds[part] % 1 == 0 for part in parts)
    assert {event.stage for event in calls[0].events} == {Stage.PROJECTOR}
