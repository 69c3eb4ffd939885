"""`positions=original|compact`: both against the slow references, whose positions are explicit."""

from __future__ import annotations

from typing import Any

import families
import pytest
import reference
import torch
from families import FAMILIES
from family_runs import batched, check_reference, logits_of, model_of, prompts_of
from matrix import dear
from models import Tiny, prompts, tiny
from promises import CASES, CLOSE, check_answer, check_kept, kept
from torch import Tensor

import vtp_plugin as vtp
from vtp_plugin import PruningStrategy, config, get_strategy
from vtp_plugin.errors import NothingPruned, PruningError
from vtp_plugin.reporting.record import record

POSITIONS = ("original", "compact")
PLANS = ["l2", "vprune", "visionzip", "stride", "fastv", "fastv-3", "vprune+atp+fastv", "fastv+random"]


def strategies(host: Tiny, case: str, positions: str) -> list[PruningStrategy]:
    clip = {"atp": {"clip": str(host.clip)}}
    return [get_strategy(n)(**hyper, **clip.get(n, {}), positions=positions) for n, hyper in CASES[case]]


def slow(host: Tiny, case: str, kind: str, positions: str, events: Any) -> list[reference.Expected]:
    drawn, rows = kept(events).get("random", {}), prompts(kind)
    numbers = host.numbers(rows)
    return [
        reference.run(host, row, CASES[case], [drawn[n] for n in own if n in drawn], positions=positions)
        for row, own in zip(rows, numbers, strict=True)
    ]


@pytest.mark.covering("case positions", "kind positions family")
@pytest.mark.parametrize("kind", ["single", "batch"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("case", PLANS)
@torch.no_grad()
def test_llava_equals_the_slow_reference(sdpa: Tiny, case: str, positions: str, kind: str):
    """Kept indices, logits of a cached generation and of a plain forward."""
    rows = prompts(kind)
    with sdpa.prune(strategies(sdpa, case, positions)) as pruned:
        output, events = sdpa.generate(rows), list(pruned.events)
        logits = sdpa.forward(rows).logits
    expected = slow(sdpa, case, kind, positions, events)
    check_kept(sdpa, rows, events, expected)
    check_answer(output, expected)
    for row, one in zip(logits, expected, strict=True):
        assert torch.allclose(row[-1], one.logits[0], **CLOSE)


@pytest.mark.parametrize("case", ["l2", "visionzip", "fastv"])
@torch.no_grad()
def test_the_two_values_differ(case: str):
    """Otherwise the tests above could not fail."""
    host = tiny("llava_hf")
    answers = []
    for positions in POSITIONS:
        with host.prune(strategies(host, case, positions)):
            answers.append(torch.stack(host.generate(prompts("batch")).logits))
    assert not torch.allclose(*answers, **CLOSE)


@pytest.mark.parametrize("mode", [{"use_cache": False}, {"num_beams": 3, "num_return_sequences": 2}])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("case", ["l2", "fastv+random"])
def test_modes_keep_the_positions(sdpa: Tiny, case: str, positions: str, mode: dict[str, Any]):
    rows = prompts("batch")
    with sdpa.prune(strategies(sdpa, case, positions)) as pruned:
        output = sdpa.generate(rows, output_scores=True, **mode)
    if "num_beams" not in mode:
        return check_answer(output, slow(sdpa, case, "batch", positions, pruned.events))
    scores = sdpa.model.compute_transition_scores(
        output.sequences, output.scores, output.beam_indices, normalize_logits=True
    )
    drawn, numbers = kept(pruned.events).get("random", {}), sdpa.numbers(rows)
    for i, sequence in enumerate(output.sequences):
        own = [drawn[n] for n in numbers[i // 2] if n in drawn]
        one = reference.run(sdpa, rows[i // 2], CASES[case], own, sequence.tolist(), positions)
        probabilities = one.logits.log_softmax(-1).gather(1, sequence[:, None])[:, 0]
        assert torch.allclose(scores[i], probabilities, **CLOSE)


STAGES = {
    "vit": ("l2", {"keep_ratio": 0.5}),
    "projector": ("stride", {"keep_ratio": 0.4}),
    "llm": ("fastv", {"keep_ratio": 0.4}),
}
FEW = ["llava_next", "qwen2_5_vl", "gemma3", "qwen3_vl"]


@pytest.mark.covering("name stage", "stage positions layout")
@pytest.mark.parametrize("layout", ["single", "batch"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize(
    ("name", "stage"),
    [(name, stage) for name in dear(FAMILIES, FEW) for stage in STAGES if stage in FAMILIES[name].stages],
)
def test_families_equal_the_slow_reference(name: str, stage: str, positions: str, layout: str):
    strategy, fields = STAGES[stage]
    fields = {**fields, **({"layer": FAMILIES[name].late} if stage == "llm" else {})}
    arguments = (model_of(name, "sdpa"), FAMILIES[name], prompts_of(name, layout), stage, strategy)
    check_reference(*arguments, {**fields, "positions": positions})


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", FEW)
def test_keeping_everything_changes_no_bit(name: str, positions: str):
    model, inputs = model_of(name, "sdpa"), batched(FAMILIES[name], prompts_of(name, "batch"))
    before = logits_of(model, dict(inputs))
    for strategy, fields in (("stride", {}), ("fastv", {"layer": FAMILIES[name].late})):
        with vtp.prune(model, strategy, keep_ratio=1.0, positions=positions, **fields):
            assert torch.equal(logits_of(model, dict(inputs)), before)


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "gemma3"])
def test_the_host_counts_without_gaps(name: str):
    """Gaps would look like packed sequences: whatever the language model is told has none in its first row."""
    model, seen = model_of(name, "sdpa"), []

    def listen(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["position_ids"])

    with vtp.prune(model, "stride", keep_ratio=0.5, positions="original"):
        handle = model.model.language_model.register_forward_pre_hook(listen, with_kwargs=True)  # behind all others
        model.generate(**batched(FAMILIES[name], prompts_of(name, "single")), max_new_tokens=2)
        handle.remove()
    rows = [positions[0] if positions.ndim == 3 else positions for positions in seen]
    assert all((row.diff(dim=-1) == 1).all() for row in rows)


def test_a_rotary_embedding_that_is_never_called_is_an_error(monkeypatch: pytest.MonkeyPatch):
    from vtp_plugin.surgery.positions import OriginalPositions

    monkeypatch.setattr(OriginalPositions, "install", lambda self, undo: None)
    host = tiny("llava_hf")
    with host.prune("l2", positions="original"), pytest.raises(NothingPruned, match="rotary embedding was never"):
        host.forward(prompts("single"))


# -- the choice -------------------------------------------------------------------------------------------------------

DEFAULTS = {"l2": "compact", "atp": "compact", "visionzip": "compact", "fastv": "original", "dart": "original"}
DEFAULTS |= {"pyramiddrop": "compact", "sparsevlm": "compact"}


def chosen(model: Any, spec: Any, **fields: Any) -> dict[str, str | None]:
    with vtp.prune(model, spec, processor=families.Processor(), **fields) as pruned:
        return {s["name"]: s["positions"] for s in record(pruned, [])["strategies"]}


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_default_is_the_papers(name: str):
    fields = {"alpha": 0.0} if name == "atp" else {}
    assert chosen(model_of("llava_next", "sdpa"), name, **fields) == {name: DEFAULTS[name]}


def test_the_default_of_multi_axis_positions_is_original():
    assert chosen(model_of("qwen2_5_vl", "sdpa"), "l2+fastv") == {"l2": "original", "fastv": "original"}
    assert chosen(model_of("qwen2_5_vl", "sdpa"), "l2", positions="compact") == {"l2": "compact"}


def test_one_word_is_for_all_strategies():
    assert chosen(model_of("gemma3", "sdpa"), "l2+stride+fastv", positions="original") == dict.fromkeys(
        ("l2", "stride", "fastv"), "original"
    )


def test_one_prompt_has_one_numbering():
    model = model_of("llava_next", "sdpa")
    assert chosen(model, "l2+stride", **{"l2.positions": "original"}) == {"l2": "original", "stride": "original"}
    with pytest.raises(PruningError, match=r"share one numbering \(l2 original, stride compact\)"):
        vtp.prune(model, "l2+stride", **{"l2.positions": "original", "stride.positions": "compact"})
    layers = {"pyramiddrop.layers": "2 3"}
    with pytest.raises(PruningError, match=r"share one numbering \(pyramiddrop compact, fastv original\)"):
        vtp.prune(model, "fastv+pyramiddrop", **layers)
    assert chosen(model, "fastv+pyramiddrop", positions="compact", **layers)["fastv"] == "compact"


def test_a_family_without_positions_refuses_the_choice():
    from family_runs import blip2, clip

    assert chosen(blip2(), "l2") == {"l2": None}
    for model, why in ((blip2(), "the Q-Former always answers"), (clip(), "an encoder has no prompt")):
        with pytest.raises(PruningError, match=f"l2: positions cannot be chosen for .*{why}"):
            vtp.prune(model, "l2", positions="original")


@pytest.mark.parametrize("value", ["renumbered", True, 1])
def test_a_wrong_value_is_refused(value: Any):
    with pytest.raises(PruningError, match=r"^l2: positions must be one of original, compact, got"):
        config.resolve("l2", {"positions": value})


def test_stages_may_differ():
    """Original in the prompt, counted anew between layers: the layer that is cut sees 0, 1, 2, ..."""
    host, seen = tiny("llava_hf"), []
    last = host.decoder.layers[-1].self_attn

    def listen(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["position_embeddings"][0])

    with host.prune("l2+fastv", **{"l2.positions": "original", "fastv.positions": "compact"}):
        handle = last.register_forward_pre_hook(listen, with_kwargs=True)
        host.generate(prompts("single"), max_new_tokens=3)
    handle.remove()
    lengths = [table.shape[1] for table in seen]
    wanted = host.decoder.rotary_emb(Tensor([0.0]), torch.arange(sum(lengths))[None])[0]
    assert torch.cat(seen, 1).allclose(wanted)
