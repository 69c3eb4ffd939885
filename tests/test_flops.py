"""Counted FLOPs against torch's own counter, and the bench on a small shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from vtp_plugin import plugins, prune
from vtp_plugin.cli import app, vtp_register_commands
from vtp_plugin.integrations import bench
from vtp_plugin.reporting.record import samples_of

if not app.registered_commands:
    vtp_register_commands(cli=app)


class Levels:
    """An image processor as far as pixels-stage strategies need one."""

    image_mean, image_std, do_normalize = [0.5] * 3, [0.25] * 3, True

    def preprocess(self, images: object) -> None: ...


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return bench.build("small", None, torch.device("cpu"), torch.float32, "sdpa")


def counted(model: torch.nn.Module, spec: str, **fields: float) -> tuple[int, int, int]:
    """FLOPs of a prefill: by torch's counter, by our formula, and by our formula for the unpruned prompt."""
    inputs, calls = bench.inputs_of(model, 1), []
    with prune(model, spec, processor=Levels(), **fields) as pruned:
        pruned.finished.append(calls.append)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**inputs, logits_to_keep=1)
        (report,) = samples_of(pruned, calls[0])
    return counter.get_total_flops(), report["prefill_flops"]["after"], report["prefill_flops"]["before"]


@pytest.mark.parametrize("spec", ["none", "stride", "l2", "fastv", "visionzip"])
def test_flops_agree_with_torchs_counter(model: torch.nn.Module, spec: str) -> None:
    fields = {} if spec == "none" else {"keep_ratio": 0.25}
    torchs, ours, unpruned = counted(model, spec, **fields)
    assert ours == pytest.approx(torchs, rel=0.01)
    assert (ours == unpruned) is (spec == "none")


@pytest.mark.parametrize("spec", ["stride", "l2", "fastv"])
def test_the_ideal_computes_what_a_pruned_model_computes(model: torch.nn.Module, spec: str) -> None:
    strategy = plugins.get_strategy(spec)(keep_ratio=0.25)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        bench.ideal(model, bench.inputs_of(model, 1), 36, strategy)
    pruned, _, _ = counted(model, spec, keep_ratio=0.25)
    assert counter.get_total_flops() == pytest.approx(pruned, rel=0.01)


def test_bench_writes_its_numbers_with_device_and_command(tmp_path: Path) -> None:
    target = tmp_path / "bench.json"
    arguments = ["bench", "--shape", "small", "--pruning", "stride,vprune", "--keep", "0.5,0.25", "--repeats", "1"]
    result = CliRunner().invoke(app, [*arguments, "-o", str(target)], catch_exceptions=False)
    assert result.exit_code == 0
    record = json.loads(target.read_text())
    assert [(t["strategy"], t["keep"], t["tokens_after"]) for t in record["timings"][:2]] == [
        ("stride", 0.5, 72.0),
        ("stride", 0.25, 36.0),
    ]
    assert len(record["timings"]) == 3  # vprune has no budget, so it runs once
    assert {"command", "device", "dtype", "attention", "versions"} <= record.keys()
