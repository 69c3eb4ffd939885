"""`vtp plan`: numbers restated by hand, the record's own counts, the queue against theory, refusals."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from vtp_plugin import get_strategy, prune
from vtp_plugin.bench.rounds import Levels
from vtp_plugin.cli import app, vtp_register_commands
from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.transformers import shapes
from vtp_plugin.plan import queue
from vtp_plugin.plan.cards import CARDS, NAMES_OF_DEVICES, Card, known_as, probe
from vtp_plugin.plan.roofline import Roof, fitting, pays_from
from vtp_plugin.plan.work import Model, pruned, scaled, unpruned
from vtp_plugin.reporting.record import samples_of

if not app.registered_commands:
    vtp_register_commands(cli=app)


@cache
def model(name: str) -> Model:
    return Model.of(name, shapes.shape_of(name))


def roof(name: str = "llava-1.5-7b", strategy: str = "", card: str = "h100", answer: int = 128, **fields: Any) -> Roof:
    chosen = [get_strategy(strategy)(**fields)] if strategy else []
    work = pruned(model(name), chosen, 1, 75) if chosen else unpruned(model(name), 1, 75)
    return Roof(model(name), work, CARDS[card], "bfloat16", answer)


# -- by hand ----------------------------------------------------------------------------------------------------------


def test_prefill_of_llava_by_hand() -> None:
    """32 layers of 4 n d^2 + 2 n^2 d + 3 n d m, and 32064 logits, with n = 576 + 75."""
    n, d, m = 576 + 75, 4096, 11008
    macs = 32 * (4 * n * d**2 + 2 * n**2 * d + 3 * n * d * m) + d * 32064
    assert unpruned(model("llava-1.5-7b"), 1, 75).macs["prefill"] == macs


def test_kv_bytes_of_llava_by_hand() -> None:
    """Keys and values of 4096 in 32 layers, two bytes each: 512 KiB per token."""
    assert roof().kv_bytes == (576 + 75) * 512 * 1024
    assert roof("qwen2.5-vl-7b").kv_bytes == (1296 + 75) * 28 * 2 * 4 * 128 * 2


def test_a_decoding_step_reads_the_weights_and_the_caches() -> None:
    """6.6 billion elements of layers and head, and 512 KiB per token of every cache, at 0.6 of 3.35 TB/s."""
    one = roof(answer=0)
    elements = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32064
    read = 2 * elements + 8 * (576 + 75) * 512 * 1024
    assert one.step(8).reading == pytest.approx(read / (0.6 * 3.35e12))
    assert one.step(8).bound == "bandwidth"


def test_the_largest_batch_by_hand() -> None:
    """90 % of 80 GB less 14.1 GB of weights, in caches of 651 + 128 tokens."""
    one = roof()
    assert one.model.parameters == pytest.approx(7.06e9, rel=0.001)
    assert one.largest_batch == int((0.9 * 80e9 - 2 * one.model.parameters) // ((651 + 128) * 512 * 1024))


def test_cards_are_what_their_vendors_say() -> None:
    h100 = CARDS["h100"]
    assert (h100.flops["bfloat16"], h100.bandwidth, h100.memory) == (989e12, 3.35e12, 80e9)
    assert known_as("NVIDIA H100 80GB HBM3") is h100
    assert known_as("NVIDIA A100-SXM4-80GB") is CARDS["a100"]
    assert known_as("x86_64") is None
    assert set(NAMES_OF_DEVICES.values()) == set(CARDS)
    assert all(card.source for card in CARDS.values())


# -- the record's counts ----------------------------------------------------------------------------------------------

STRATEGIES: dict[str, dict[str, Any]] = {
    "l2": {},
    "stride": {"keep_ratio": 0.25},
    "visionzip": {"keep_ratio": 0.25},
    "divprune": {"keep_ratio": 0.25},
    "tome": {"keep_ratio": 0.5},
    "fastv": {"keep_ratio": 0.25},
    "pyramiddrop": {"layers": "2 3"},
    "fitprune": {"keep_ratio": 0.8, "start": 2},
}


@cache
def built(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return shapes.shape_of(name).build(None, torch.device("cpu"), torch.float32, "sdpa")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["small", "small-next", "small-qwen", "small-qwen3"])
@torch.no_grad()
def test_the_plan_counts_as_the_record_does(name: str, strategy: str) -> None:
    shape, calls = shapes.shape_of(name), []
    chosen = get_strategy(strategy)(**STRATEGIES[strategy])
    with prune(built(name), chosen, processor=Levels()) as attached:
        attached.finished.append(calls.append)
        built(name)(**shape.inputs(built(name), 1), logits_to_keep=1)
        (report,) = samples_of(attached, calls[0])
    planned = pruned(model(name), [chosen], 1, shapes.QUESTION_TOKENS)
    whole = unpruned(model(name), 1, shapes.QUESTION_TOKENS)
    assert planned.lengths == report["prompt_tokens"]["by_layer"]
    assert model(name).cache_bytes(planned.lengths, 4) == report["kv_cache_bytes"]["after"]
    for part in ("tower", "projector", "prefill"):
        assert 2 * whole.macs[part] == pytest.approx(report["flops"]["before"][part], rel=1e-9), part
        assert 2 * planned.macs[part] == pytest.approx(report["flops"]["after"][part], rel=0.01), part
    assert 2 * sum(planned.macs.values()) == pytest.approx(report["prefill_flops"]["after"], rel=0.01)
