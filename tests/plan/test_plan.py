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
from vtp_plugin.hosts.transformers import architectures, shapes
from vtp_plugin.plan import queue
from vtp_plugin.plan.cards import CARDS, NAMES_OF_DEVICES, Card, from_file, known_as, probe
from vtp_plugin.plan.error import compared, dtype_of
from vtp_plugin.plan.roofline import Roof, fitting, pays_from
from vtp_plugin.plan.work import Model, pruned, scaled, unpruned
from vtp_plugin.reporting import readme
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


CASES = [("small", strategy) for strategy in STRATEGIES]  # the other families merge nothing inside the tower
CASES += [(name, s) for name in ("small-next", "small-qwen", "small-qwen3") for s in STRATEGIES if s != "tome"]


@pytest.mark.covering
@pytest.mark.parametrize(("name", "strategy"), CASES)
@torch.no_grad()
def test_the_plan_counts_as_the_record_does(name: str, strategy: str) -> None:
    shape, calls = shapes.shape_of(name), []
    chosen = get_strategy(strategy)(**STRATEGIES[strategy])
    with prune(built(name), chosen, processor=Levels()) as attached:
        attached.finished.append(calls.append)
        built(name)(**shape.inputs(built(name), 1), logits_to_keep=1)
        (report,) = samples_of(attached, calls[0])
    planned = pruned(model(name), [chosen], 1, architectures.QUESTION_TOKENS)
    whole = unpruned(model(name), 1, architectures.QUESTION_TOKENS)
    assert planned.lengths == report["prompt_tokens"]["by_layer"]
    assert model(name).cache_bytes(planned.lengths, 4) == report["kv_cache_bytes"]["after"]
    for part in ("tower", "projector", "prefill"):
        assert 2 * whole.macs[part] == pytest.approx(report["flops"]["before"][part], rel=1e-9), part
        assert 2 * planned.macs[part] == pytest.approx(report["flops"]["after"][part], rel=0.01), part
    assert 2 * sum(planned.macs.values()) == pytest.approx(report["prefill_flops"]["after"], rel=0.01)


def test_a_plan_is_made_of_pictures() -> None:
    with pytest.raises(PruningError, match="evs: it compares the frames of a video, a plan is made of pictures"):
        pruned(model("small-qwen"), [get_strategy("evs")()], 1, 75)


# -- what must rise and fall ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["l2", "visionzip", "fastv", "divprune", "tome"])
def test_fewer_tokens_never_cost_more(strategy: str) -> None:
    kept = [roof(strategy=strategy, keep_ratio=ratio) for ratio in (0.11, 0.25, 0.5, 0.75)]
    for less, more in zip(kept, [*kept[1:], roof()], strict=True):
        assert less.kv_bytes < more.kv_bytes
        assert less.largest_batch > more.largest_batch
        assert less.ttft() <= more.ttft()
        assert less.step(8).seconds < more.step(8).seconds
        assert less.requests_per_second(8) > more.requests_per_second(8)


def test_a_faster_card_is_faster() -> None:
    assert roof(card="h100").ttft() < roof(card="a100").ttft() < roof(card="l4").ttft()
    assert roof(card="h200").step(1).seconds < roof(card="h100").step(1).seconds


def test_pruning_pays_where_arithmetic_bounds_the_prefill() -> None:
    """Below 989 / 3.35 = 295 tokens a prefill reads its weights for as long as it computes, whatever is dropped."""
    h100, ratios = CARDS["h100"], []
    for tokens in (16, 64, 256, 1024):
        one = scaled(model("llava-1.5-7b"), tokens)
        works = (unpruned(one, 1, 8), pruned(one, [get_strategy("l2")(keep_ratio=0.5)], 1, 8))
        whole, cut = (Roof(one, work, h100, "bfloat16", 1) for work in works)
        ratios.append((tokens, cut.part("prefill").seconds / whole.part("prefill").seconds))
    assert [ratio == 1 for _, ratio in ratios] == [True, True, True, False]
    assert pays_from(ratios) == 1024
    assert pays_from([(8, 1.0), (16, 0.5), (32, 1.1)]) is None
    assert pays_from([(8, 1.0), (16, 0.9), (32, 0.8)]) == 16


# -- the queue --------------------------------------------------------------------------------------------------------


class Constant:
    """A server of one request at a time that takes one second: M/D/1."""

    prompt, answer, slots = 10, 1, 1

    def seconds(self, decoding: int, prefilled: int, begun: int) -> float:
        return prefilled / self.prompt


@pytest.mark.parametrize("load", [0.1, 0.3, 0.5, 0.7, 0.8])
def test_the_queue_is_m_d_1_where_it_should_be(load: float) -> None:
    """Mean time in an M/D/1 queue: S + load S / (2 (1 - load))."""
    outcome = queue.simulate(Constant(), rate=load, requests=40_000)
    mean = sum(outcome.latency) / len(outcome.latency)
    assert mean == pytest.approx(1 + load / (2 * (1 - load)), rel=0.05)
    assert outcome.throughput == pytest.approx(load, rel=0.02)


def test_above_its_capacity_a_card_serves_its_capacity() -> None:
    outcome = queue.simulate(Constant(), rate=3.0, requests=5000)
    assert outcome.throughput == pytest.approx(1.0, rel=0.2)
    late = queue.simulate(Constant(), rate=3.0, requests=10_000)
    assert queue.percentile(late.latency, 0.95) > 1.8 * queue.percentile(outcome.latency, 0.95)


def test_prompts_in_chunks_take_turns_with_decoding() -> None:
    """A prompt of 10 in chunks of 4 takes three steps; nine more tokens as many. One token per running request."""
    seen: list[tuple[int, int, int]] = []

    class Watched(Constant):
        answer, slots = 4, 2

        def seconds(self, decoding: int, prefilled: int, begun: int) -> float:
            seen.append((decoding, prefilled, begun))
            return 1.0

    queue.simulate(Watched(), rate=1000.0, requests=2, chunk=4)
    assert seen == [(0, 4, 1), (0, 4, 0), (0, 4, 1), (1, 3, 0), (1, 3, 0), (1, 2, 0), (1, 0, 0), (1, 0, 0), (1, 0, 0)]


def test_the_queue_is_the_same_for_the_same_seed() -> None:
    server = queue.RoofServer(roof(), 32)
    first, again, other = (queue.simulate(server, 10.0, 300, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_at_low_load_nobody_waits() -> None:
    one = roof()
    outcome = queue.simulate(queue.RoofServer(one, 32), 0.01, 50)
    assert queue.percentile(outcome.first_token, 0.95) == pytest.approx(one.ttft(), rel=1e-9)


def test_cards_are_counted_by_the_time_that_users_wait() -> None:
    server = queue.RoofServer(roof(), 32)
    cards = queue.cards_needed(server, 100.0, 0.1, requests=400)
    assert cards is not None
    for number, holds in ((cards, True), (cards - 1, False)):
        times = queue.simulate(server, 100.0 / number, 400).first_token
        assert (queue.percentile(times, 0.95) <= 0.1) is holds
    assert queue.cards_needed(server, 100.0, 1e-6, requests=50) is None


# -- the command ------------------------------------------------------------------------------------------------------


def run(*options: str) -> Any:
    return CliRunner().invoke(app, ["plan", *options], catch_exceptions=True)


def test_the_command_says_what_is_saved() -> None:
    result = run("--model", "small", "--device", "l4", "--pruning", "l2", "--rate", "50", "--cards", "1,2")
    assert result.exit_code == 0, result.exception
    for word in ("prefill", "time to first token", "KV cache", "largest batch", "card hours", "queue", "bandwidth"):
        assert word in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 110
    one = roof("small", card="l4")
    assert f"{one.kv_bytes / 2**20:.1f} MiB" in result.stdout


def test_a_configuration_file_is_a_model(tmp_path: Path) -> None:
    from transformers import LlavaConfig

    text = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 33000}
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "image_size": 56, "patch_size": 14}
    vision |= {"num_attention_heads": 2}
    LlavaConfig(vision_config=vision, text_config=text).save_pretrained(tmp_path)
    found = Model.of("mine", shapes.shape_from(tmp_path / "config.json"))
    assert found.tokens == 16
    work = unpruned(found, 2, 10)
    n, d, kv, m = 42, 64, 32, 128
    layer = n * (2 * d * d + 2 * d * kv) + 2 * n * n * d + 3 * n * d * m
    assert work.macs["prefill"] == 3 * layer + d * 33000


REFUSED = {
    "--model lava": "unknown shape 'lava'",
    "--model clip-vit-l-14": "clip-vit-l-14 is an encoder",
    "--model nowhere/config.json": "file not found: nowhere/config.json",
    "--device h1000": "unknown device 'h1000'. Did you mean 'h100'?",
    "--device nowhere.json": "file not found: nowhere.json",
    "--dtype int4": "unknown dtype 'int4'",
    "--answer 0": "--answer must be at least 1, got 0",
    "--concurrency 0": "--concurrency must be at least 1, got 0",
    "--layers 33": "--layers must be in 1 ... 32 for this model",
    "--pruning vprune": "vprune: how much it keeps depends on the pictures: say the share with --kept",
    "--pruning fastv --pruning-args layer=32": "fastv: layer 32 is not in 1 ... 31 of this model",
    "--pruning l2 --rate 0": "--rate must be above 0",
    "--rate x": "--rate must be numbers separated by commas, got 'x'",
    "--device rtx3090 --model llava-1.5-13b": "does not fit on RTX 3090: its weights take",
    "--overhead -1": "--overhead must not be negative",
    "--check nowhere.json": "file not found: nowhere.json",
    "--kept 40": "--kept must be a share in (0, 1], got 40",
    "--price -3": "--price must not be negative",
    "--rate 3 --slo nan": "--slo must not be negative, and finite, got nan",
    "--rate nan": "--rate must be above 0",
    "--rate 1,inf": "--rate must be above 0",
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_makes_no_sense_is_refused_in_one_sentence(options: str) -> None:
    result = run(*options.split())
    assert isinstance(result.exception, PruningError), result.output
    assert REFUSED[options] in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not result.stdout


@pytest.mark.parametrize("harm", ["cut", "a folder", "no rows", "other rows", "another device"])
def test_a_record_that_is_none_is_refused(tmp_path: Path, harm: str) -> None:
    path, read = tmp_path / "record.json", json.loads(readme.BENCH.read_text())
    path.mkdir() if harm == "a folder" else None
    read["timings"] = {"no rows": "none", "other rows": [{"strategy": "l2"}]}.get(harm, read["timings"])
    read["device"] = None if harm == "another device" else read["device"]
    if harm != "a folder":
        path.write_text(json.dumps(read)[: 200 if harm == "cut" else None])
    refused = run("--check", str(path)).exception
    assert isinstance(refused, PruningError)
    assert str(refused).startswith(f"{path}")


@pytest.mark.parametrize("harm", [{"flops": 3}, {"flops": {"bfloat16": "fast"}}, {"memory": None}, {"reach": 1.0}])
def test_a_device_that_is_none_is_refused(tmp_path: Path, harm: dict[str, Any]) -> None:
    path = tmp_path / "card.json"
    path.write_text(json.dumps(CARDS["l4"].as_json()))
    assert from_file(path) == CARDS["l4"]
    path.write_text(json.dumps({**CARDS["l4"].as_json(), **harm}))
    with pytest.raises(PruningError, match="is not a device that"):
        from_file(path)


def test_a_probe_measures_this_machine() -> None:
    card = probe(torch.device("cpu"), "float32", seconds=0.3, widths=(64, 256), tokens=64)
    assert card.reached == 1
    assert 1e7 < card.rate("float32", 128) < 1e14
    assert 1e7 < card.bandwidth < 1e13
    low, high = sorted(card.by_width.values())
    assert low <= card.rate("float32", 128) <= high
    with pytest.raises(PruningError, match="has no figure for bfloat16"):
        card.rate("bfloat16", 128)
    assert Card(**json.loads(json.dumps(card.as_json()))) == card


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PruningError, match="does not fit on L4"):
        fitting(Roof(model("llava-1.5-13b"), unpruned(model("llava-1.5-13b"), 1, 75), CARDS["l4"], "bfloat16", 1), 1)


# -- how far off it is, and the worked example -------------------------------------------------------------------------


def test_ratios_are_within_a_fifth_of_the_committed_record() -> None:
    """The record is of this package's own bench on a CPU; the plan knows nothing of it but its shape."""
    rows = compared(readme.BENCH)
    assert {row.strategy for row in rows} == {"l2", "visionzip", "fastv", "atp"}
    assert {row.strategy: row.off for row in rows if abs(row.off) > 0.2} == {}


def test_a_record_is_probed_in_what_it_computed_in(tmp_path: Path) -> None:
    assert dtype_of(readme.BENCH) == "float32"
    other = tmp_path / "other.json"
    other.write_text('{"timings": []}')
    with pytest.raises(PruningError, match="is not a record of vtp bench"):
        dtype_of(other)


def test_the_worked_example_says_what_its_commands_answer() -> None:
    page = readme.SCALE.read_text()
    assert page.count("$ vtp plan") == 6
    assert readme.commanded(page.replace("1.52x", "9.99x")) == page  # also from a page that is wrong
