"""`vtp bench` on small shapes: what it counts, what its ideal computes, what it writes, what it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import built
from torch_counter import flop_counter
from typer.testing import CliRunner

from vtp_plugin import plugins, prune
from vtp_plugin.bench import rounds as bench
from vtp_plugin.bench import selectors as selector_cost
from vtp_plugin.bench import tables, timing
from vtp_plugin.cli import app, vtp_register_commands
from vtp_plugin.errors import Interrupted, PruningError
from vtp_plugin.hosts.transformers import architectures, shapes
from vtp_plugin.hosts.transformers.ideals import ideal
from vtp_plugin.reporting.record import samples_of

if not app.registered_commands:
    vtp_register_commands(cli=app)

MODELS = ("small", "small-next", "small-qwen", "small-qwen3")
STAGES = {
    "none": None,
    "projector": ("stride", {"keep_ratio": 0.25}),
    "vit": ("l2", {"keep_ratio": 0.25}),
    "llm": ("stride", {"keep_ratio": 0.25, "at": "llm"}),
    "staged": ("pyramiddrop", {"layers": "2 3"}),
}


def counted(name: str, spec: Any, **fields: Any) -> tuple[int, dict[str, Any]]:
    """FLOPs of a prefill by torch's counter, and our report."""
    model, calls = built(name), []
    inputs = shapes.shape_of(name).inputs(model, 1)
    with prune(model, spec, processor=bench.Levels(), **fields) as pruned:
        pruned.finished.append(calls.append)
        with torch.no_grad(), flop_counter() as counter:
            model(**inputs, logits_to_keep=1)
        (report,) = samples_of(pruned, calls[0])
    return counter.get_total_flops(), report


@pytest.mark.parametrize("spec", ["none", "stride", "l2", "fastv", "visionzip"])
def test_flops_agree_with_torchs_counter(spec: str) -> None:
    fields = {} if spec == "none" else {"keep_ratio": 0.25}
    torchs, report = counted("small", spec, **fields)
    assert report["prefill_flops"]["after"] == pytest.approx(torchs, rel=0.01)
    assert (report["prefill_flops"]["after"] == report["prefill_flops"]["before"]) is (spec == "none")


@pytest.mark.covering("name")
@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "none"])
@pytest.mark.parametrize("name", MODELS)
def test_the_ideal_computes_what_a_pruned_model_computes(name: str, stage: str) -> None:
    """By torch's counter; a tower that projects everything before a cut is not ideal, and may cost that much more."""
    shape, model = shapes.shape_of(name), built(name)
    spec, fields = STAGES[stage]
    strategy = plugins.get_strategy(spec)(**fields)
    torchs, report = counted(name, strategy)
    one = bench._Bench(shape, model, shape.inputs(model, 1), strategy)
    with flop_counter() as counter:
        one._ideal()
    found, selector = counter.get_total_flops(), report["flops"]["after"]["selector"]
    flops = report["flops"]
    if stage == "vit" and name != "small":  # judging embeds every patch once more, outside of the tower's pass
        weight = model.model.vision_tower if name == "small-next" else model.model.visual
        kernel = next(p for p in weight.parameters() if p.ndim > 3)
        patches = 5 * 36 if name == "small-next" else 4 * 144
        torchs -= 2 * patches * kernel.numel()
    if name == "small-next" and stage in ("vit", "projector"):
        kept, total = report["images"][0]["after"], report["images"][0]["before"]
        torchs -= flops["after"]["projector"] * (1 - kept / total)
        assert found == pytest.approx(torchs, rel=0.02)
    elif name == "small-qwen" and stage == "vit":
        assert found == pytest.approx(torchs - selector, rel=0.02)  # windows of a smaller image are cut elsewhere
    else:
        assert found == pytest.approx(torchs - selector, rel=0.01)


@pytest.mark.parametrize("stage", ["projector", "llm"])
@torch.no_grad()
def test_the_ideal_answers_as_a_pruned_model_that_keeps_everything(stage: str) -> None:
    """With all tokens it is the host's own forward."""
    shape, model = shapes.shape_of("small"), built("small")
    inputs = shape.inputs(model, 2)
    length = inputs["input_ids"].shape[1]
    by_hand = ideal(shape, model, inputs, seen=144, rows=144, lengths=[length] * 4)
    torch.testing.assert_close(by_hand, model(**inputs, logits_to_keep=1).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_ideal_encoder_is_the_hosts() -> None:
    shape, model = shapes.shape_of("clip-vit-small"), built("clip-vit-small")
    inputs = shape.inputs(model, 2)
    by_hand = ideal(shape, model, inputs, seen=144, rows=144, lengths=[])
    torch.testing.assert_close(by_hand, model(**inputs).image_embeds, rtol=1e-4, atol=1e-5)


def test_an_encoders_throughput() -> None:
    shape = shapes.shape_of("clip-vit-small")
    strategy = plugins.get_strategy("l2")(keep_ratio=0.5)
    (timed,) = bench.compare(shape, built("clip-vit-small"), [strategy], batch=3, repeats=2)
    assert (timed.tokens_before, timed.tokens_after, timed.batch) == (144, 72, 3)
    assert 0.45 < timed.flops_ratio < 0.55
    assert timed.kv_bytes is None
    assert timed.decode_ratio is None
    assert timed.prefill_ratio is None
    rates = timed.images_per_second
    assert rates["pruned"] == pytest.approx(3 / (sum(timed.seconds["pruned"]) / 2))  # the median of two


def test_ratios_are_taken_within_a_round() -> None:
    seconds = {"unpruned": [4.0, 8.0, 4.4], "ideal": [1.0, 2.0, 1.1], "pruned": [2.0, 4.0, 2.2]}
    macs = {"before": {"prefill": 100}, "after": {"prefill": 25}}
    timed = timing.Timing("x", 0.25, 1, 100, 25, macs, seconds, [0.1], [0.01])
    assert timed.ttft_ratio == pytest.approx(0.5)
    assert timed.over_ideal == pytest.approx(2.0)
    assert timed.realised == pytest.approx(0.5 / 0.75)
    assert timed.break_even == pytest.approx((2.2 - 1.1) / ((4.4 - 1.1) / 100))


def test_every_ratio_has_the_spread_of_its_rounds() -> None:
    seconds = {"unpruned": [4.0, 8.0, 4.4], "ideal": [1.0, 2.0, 1.1], "pruned": [2.0, 4.8, 2.2]}
    macs = {"before": {"prefill": 100}, "after": {"prefill": 25}}
    prefill = {"unpruned": [2.0, 2.0, 2.0], "pruned": [1.0, 2.0, 3.0]}
    steps = {"unpruned": [1.0] * 16, "pruned": [1.5] * 8 + [1.2] * 8}
    timed = timing.Timing(
        "x",
        0.25,
        1,
        100,
        25,
        macs,
        seconds,
        [0.1],
        [0.01],
        prefill=prefill,
        decoding=steps,
        kv_bytes={"before": 2, "after": 1},
    )
    assert timed.spread == {
        "ttft_ratio": pytest.approx((0.5, 0.6)),
        "over_ideal": pytest.approx((2.0, 2.4)),
        "realised": pytest.approx((0.4 / 0.75, 0.5 / 0.75)),
        "prefill_ratio": (0.5, 1.5),
        "decode_ratio": (1.2, 1.5),
    }
    row = tables.timings([timed.as_json()], "").rows[0]
    assert row[5:9] == ("**0.50x**", "1.00x", "67%", "**2.000x**")  # the prefill was faster and slower
    assert row[13] == "**1.35x**"


# -- the command ------------------------------------------------------------------------------------------------------


def test_bench_writes_its_numbers_with_device_and_command(tmp_path: Path) -> None:
    target = tmp_path / "bench.json"
    arguments = ["bench", "--shape", "small", "--pruning", "stride,vprune", "--keep", "0.5,0.25", "--batch", "1,2"]
    result = CliRunner().invoke(app, [*arguments, "--repeats", "1", "-o", str(target)], catch_exceptions=False)
    assert result.exit_code == 0
    record = json.loads(target.read_text())
    rows = record["timings"]
    assert [(t["strategy"], t["keep"], t["batch"], t["tokens_after"]) for t in rows] == [
        *(("stride", 0.5, 1, 72.0), ("stride", 0.25, 1, 36.0), ("vprune", None, 1, 144.0)),
        *(("stride", 0.5, 2, 72.0), ("stride", 0.25, 2, 36.0), ("vprune", None, 2, 144.0)),
    ]  # vprune has no budget, so it runs once; it finds nothing to drop in noise
    assert {"command", "device", "dtype", "attention", "versions", "threads", "shape", "layers"} <= record.keys()
    text = architectures.QUESTION_TOKENS
    for row in rows:
        assert row["kv_bytes"]["after"] * (144 + text) == row["kv_bytes"]["before"] * (row["tokens_after"] + text)
        assert row["decode_ratio"] > 0
        assert {side: len(row["prefill"][side]) for side in ("unpruned", "pruned")} == {"unpruned": 1, "pruned": 1}
        assert row["prefill_ratio"] == pytest.approx(row["prefill"]["pruned"][0] / row["prefill"]["unpruned"][0])
        assert row["peak_bytes"] is None
        assert all(len(row["seconds"][side]) == 1 for side in timing.SIDES)
    table = target.with_suffix(".md").read_text()
    assert "| stride | 0.25 | 2 | 36/144 |" in table


def test_selectors_of_the_whole_catalogue_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selector_cost, "SHAPE", shapes.SHAPES["small"])
    monkeypatch.setattr(selector_cost, "TOKENS", (36,))
    target = tmp_path / "selectors.json"
    arguments = ["bench", "--selectors", "--keep", "0.25", "--batch", "2", "--repeats", "1", "-o", str(target)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    rows = json.loads(target.read_text())["timings"]
    assert {row["strategy"] for row in rows} == set(plugins.list_strategies())
    for row in rows:
        assert row["share"] == row["seconds"] / row["prefill_seconds"] > 0
        assert row["batch"] == 2


BENCH = ["bench", "--shape", "small", "--pruning", "stride,l2", "--keep", "0.5", "--repeats", "2"]


def test_a_bench_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted behind its first row, begun again: the row is in the file, and is not measured twice."""
    target, compare, asked = tmp_path / "bench.json", bench.compare, []

    def stop(shape: Any, model: Any, strategies: Any, *rest: Any) -> Any:
        asked.append(strategies[0].name)
        if strategies[0].name == "l2" and asked.count("l2") == 1:
            raise KeyboardInterrupt
        return compare(shape, model, strategies, *rest)

    monkeypatch.setattr(bench, "compare", stop)
    result = CliRunner().invoke(app, [*BENCH, "-o", str(target)])
    assert isinstance(result.exception, Interrupted)
    assert "stopped at l2 0.5, batch 1" in str(result.exception)
    assert "keeps 1 rows" in str(result.exception)
    assert "stride" in result.stdout  # what was measured is shown, with and without a file
    (kept,) = json.loads(target.read_text())["timings"]
    again = CliRunner().invoke(app, [*BENCH, "-o", str(target)], catch_exceptions=False)
    assert again.exit_code == 0
    assert asked == ["stride", "l2", "l2"]
    rows = json.loads(target.read_text())["timings"]
    assert [row["strategy"] for row in rows] == ["stride", "l2"]
    assert rows[0] == kept
    assert re.search(r"2 rows to measure, about \d+ (s|min)", result.stderr)
    assert "1 of 2, stride 0.5, batch 1: " in result.stderr
    assert "1 of 2 rows were measured already" in again.stderr
    monkeypatch.setattr(architectures.Shape, "build", None)  # a whole record needs no model
    assert CliRunner().invoke(app, [*BENCH, "-o", str(target)], catch_exceptions=False).exit_code == 0


def test_a_record_of_other_settings_is_not_mixed(tmp_path: Path) -> None:
    target = tmp_path / "bench.json"
    one = ["bench", "--shape", "small", "--pruning", "stride", "--keep", "0.5", "--repeats"]
    CliRunner().invoke(app, [*one, "2", "-o", str(target)], catch_exceptions=False)
    before = target.read_text()
    result = CliRunner().invoke(app, [*one, "3", "-o", str(target)])
    assert isinstance(result.exception, PruningError)
    assert "is a record of other settings (repeats: 2, now 3)" in str(result.exception)
    assert target.read_text() == before
    CliRunner().invoke(app, [*one, "3", "--again", "-o", str(target)], catch_exceptions=False)
    (row,) = json.loads(target.read_text())["timings"]
    assert len(row["seconds"]["pruned"]) == 3


ONE = ["bench", "--shape", "small", "--keep", "0.5", "--repeats", "1"]


def test_again_measures_what_is_asked_for_and_keeps_the_rest(tmp_path: Path) -> None:
    target = tmp_path / "bench.json"
    CliRunner().invoke(app, [*ONE, "--pruning", "stride,l2", "-o", str(target)], catch_exceptions=False)
    before = {row["strategy"]: row for row in json.loads(target.read_text())["timings"]}
    CliRunner().invoke(app, [*ONE, "--pruning", "l2", "--again", "-o", str(target)], catch_exceptions=False)
    after = {row["strategy"]: row for row in json.loads(target.read_text())["timings"]}
    assert after["stride"] == before["stride"]
    assert after["l2"]["seconds"] != before["l2"]["seconds"]
    assert len(json.loads(target.read_text())["timings"]) == 2
    target.write_text("{")
    again = CliRunner().invoke(app, [*ONE, "--pruning", "l2", "--again", "-o", str(target)], catch_exceptions=False)
    assert again.exit_code == 0  # half-written: nothing of it can be kept


def test_a_file_without_rows_is_as_good_as_none(tmp_path: Path) -> None:
    """As mktemp makes one; and a page of somebody else's is not written over."""
    target = tmp_path / "bench.json"
    target.touch()
    CliRunner().invoke(app, [*ONE, "--pruning", "stride", "-o", str(target)], catch_exceptions=False)
    assert len(json.loads(target.read_text())["timings"]) == 1
    (tmp_path / "notes.md").write_text("dear to me")
    result = CliRunner().invoke(app, [*ONE, "--pruning", "stride", "-o", str(tmp_path / "notes.json")])
    assert isinstance(result.exception, PruningError)
    assert "notes.md, which the table would replace, is there without" in str(result.exception)
    assert (tmp_path / "notes.md").read_text() == "dear to me"


def test_rows_have_a_budget_of_time() -> None:
    """Behind it no round begins, but two are always there."""
    shape, strategy = shapes.shape_of("small"), plugins.get_strategy("stride")()
    (timed,) = bench.compare(shape, built("small"), [strategy], 1, repeats=50, seconds=0.0)
    assert len(timed.seconds["pruned"]) == bench.LEAST


REFUSED = {
    "--shape lava-1.5-7b": "unknown shape 'lava-1.5-7b'. Did you mean 'llava-1.5-7b'?",
    "--pruning fastvv": "unknown strategy 'fastvv'. Did you mean 'fastv'?",
    "--keep 0.5,x": "--keep must be numbers separated by commas, got '0.5,x'",
    "--keep 2": "keep_ratio must be in (0, 1], got 2",
    "--batch 0": "--batch and --repeats must be at least 1, got 0 and 5",
    "--layers 33": "--layers must be in 1 ... 32 for this shape, or 0 for all, got 33",
    "--dtype float8": "unknown dtype 'float8'",
    "--attention flash": "unknown attention 'flash'",
    "--device tpux": "unknown device 'tpux'",
    "--pruning cdpruner": "cdpruner: it reads the question through a CLIP text tower, which random weights lack",
    "--pruning fastv --pruning-args layer=3": "--pruning-args: 'layer' must be STRATEGY.FIELD, with one of fastv",
    "--pruning fastv --pruning-args fastv.layr=3": "unknown field 'layr' for 'fastv'. Did you mean 'layer'?",
    "--shape clip-vit-l-14 --pruning fastv": "fastv: an encoder has no llm stage",
    "-o nowhere/bench.json": "no such folder: nowhere",
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_cannot_be_measured_is_refused_before_anything_is_built(
    options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*args: Any) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(architectures.Shape, "build", build)
    result = CliRunner().invoke(app, ["bench", *options.split()])
    assert isinstance(result.exception, PruningError)
    assert REFUSED[options] in str(result.exception)


def test_bench_needs_no_lmms_eval_and_no_llava() -> None:
    code = (
        "import sys; sys.modules |= dict.fromkeys(('lmms_eval', 'llava', 'matplotlib'));"
        "from vtp_plugin.cli import main; sys.argv = ['vtp', 'bench', '--shape', 'small', '--pruning', 'stride',"
        "'--keep', '0.5', '--repeats', '1']; main()"
    )
    wide = os.environ | {"COLUMNS": "200"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=wide)
    assert ran.returncode == 0, ran.stderr
    assert "72/144" in ran.stdout
