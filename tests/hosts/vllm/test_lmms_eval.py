"""`lmms-eval --model vllm --pruning NAME`: the flags reach the workers, the proof comes back with the requests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engines import WHOLE, engine

pytest.importorskip("lmms_eval")

LIMIT = 3


def evaluated(folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """The results of the scenes task over the real command line, and what it printed."""
    program = str(Path(sys.executable).parent / "lmms-eval")
    command = [program, "--model", "vllm", "--model_args", "model=vtp-tiny", "--tasks", "vtp_scenes"]
    command += ["--limit", str(LIMIT), "--batch_size", "4", "--log_samples", "--output_path", str(folder), *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    ran = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=580)
    files = list(folder.rglob("*_results.json"))
    assert files, ran.stderr[-3000:]
    return json.loads(files[0].read_text()), ran.stdout


def test_the_results_carry_the_proof(tmp_path: Path):
    results, printed = evaluated(tmp_path, "--pruning", "visionzip", "--pruning_args", "keep_ratio=0.25")
    entry = results["pruning"]
    asked = sum(number["effective"] for number in results["n-samples"].values())
    assert [strategy["name"] for strategy in entry["strategies"]] == ["visionzip"]
    assert entry["samples"] == {"total": asked, "with_images": asked, "pruned": asked}
    assert entry["visual_tokens"]["before"] == asked * WHOLE
    assert entry["visual_tokens"]["after"] == asked * WHOLE // 4
    tokens = entry["prompt_tokens"]
    share = f"{tokens['after'] / tokens['before']:.2f}x"
    (said,) = [line for line in printed.splitlines() if line.startswith("visionzip 0.25: ")]
    assert said.startswith(f"visionzip 0.25: {WHOLE} -> {WHOLE // 4} visual tokens per image, prompts {share}, ")
    assert f"{asked} of {asked} samples pruned; record: {tmp_path}" in said
    assert tokens["before"] - tokens["after"] == asked * WHOLE * 3 // 4
    lines = [json.loads(line) for file in tmp_path.rglob("*samples*.jsonl") for line in file.read_text().splitlines()]
    assert len(lines) == asked
    assert all(line["pruning"]["images"] == [{"before": WHOLE, "after": WHOLE // 4}] for line in lines)


def test_the_entry_counts_what_the_requests_ran_with():
    """Images that keep unequal numbers, over the host's own class in this process."""
    from lmms_eval.models.simple.vllm import VLLM

    from vtp_plugin import config
    from vtp_plugin.hosts.lmms_eval.served import ServedRun

    settings = {"strategy": "vprune", "chi2_threshold": 30, "cosine_threshold": 0.9}
    from engines import ask, columns, one_each

    with engine(settings) as llm:
        lm = VLLM.__new__(VLLM)
        lm.client = llm
        run = ServedRun(lm, config.resolve("vprune", {"chi2_threshold": 30, "cosine_threshold": 0.9}))
        counted = columns(ask(lm.client, one_each(3)))
        entry = run.record(run.pruned.samples)
        run.pruned.detach()
        ask(lm.client, one_each(1))
    assert len(set(counted)) > 1
    assert [sample["images"] for sample in run.pruned.samples] == [
        [{"before": WHOLE, "after": after}] for after in counted
    ]
    assert entry["visual_tokens"]["after"] == sum(counted)
    assert len(run.pruned.samples) == 3
