"""The host's own tasks, unmodified and offline, on small local data: pictures of several sizes, and none at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lmms
import pytest

pytest.importorskip("lmms_eval")

COUNT = len(lmms.SIZES)
METRICS = {
    "pope": "pope_accuracy,none",
    "gqa": "exact_match,none",
    "ai2d": "exact_match,flexible-extract",
    "scienceqa_img": "exact_match,none",
    "textvqa_val": "exact_match,none",
}
DATA = {"pope": "POPE", "gqa": "GQA", "ai2d": "ai2d", "scienceqa_img": "ScienceQA", "textvqa_val": "textvqa"}
RUNS = {"llava": "atp", "llava_hf": "vprune+fastv"}
DOCUMENTS = {"llava": 2 * COUNT, "llava_hf": COUNT}  # llava_hf cannot read a prompt without a picture, pruned or not


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two pruned runs of all five tasks wrote, by model."""
    folder = tmp_path_factory.mktemp("tasks")
    lmms.write_tasks(folder)
    given: dict[str, Any] = {"tasks": ",".join(METRICS), "gen_kwargs": "max_new_tokens=4", "log_samples": True}
    given |= {"model_args": "pretrained=vtp-tiny"}
    runs = [
        given | {"model": model, "pruning": pruning, "limit": DOCUMENTS[model], "output_path": model}
        for model, pruning in RUNS.items()
    ]
    process = lmms.call_runs(folder, runs)
    assert process.returncode == 0, process.stdout + process.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("task", METRICS)
@pytest.mark.parametrize("model", RUNS)
def test_task_runs_pruned(folder: Path, model: str, task: str) -> None:
    (results,) = lmms.results(folder / model)
    assert results["configs"][task]["dataset_path"] == f"lmms-lab-encoder/{DATA[task]}"
    assert 0 <= results["results"][task][METRICS[task]] <= 1
    lines = lmms.samples(folder / model, task)
    expected = DOCUMENTS[model] if task == "scienceqa_img" else COUNT
    assert [line["doc_id"] for line in lines] == list(range(expected))
    for line in lines:
        images = line["pruning"]["images"]
        assert len(images) == (line["doc_id"] < COUNT)
        assert all(0 < image["after"] < image["before"] == 144 for image in images)
        assert ("prefill_flops" in line["pruning"]) == bool(images)


@pytest.mark.slow
@pytest.mark.parametrize("model", RUNS)
def test_record_covers_all_tasks(folder: Path, model: str) -> None:
    (results,) = lmms.results(folder / model)
    record = results["pruning"]
    images = [
        image for task in METRICS for line in lmms.samples(folder / model, task) for image in line["pruning"]["images"]
    ]
    text_only = DOCUMENTS[model] - COUNT
    pictures = COUNT * len(METRICS)
    assert record["samples"] == {"total": pictures + text_only, "with_images": pictures, "pruned": pictures}
    assert record["visual_tokens"]["before"] == 144 * pictures
    assert record["visual_tokens"]["after"] == sum(image["after"] for image in images)
    assert record["prefill_flops"]["ratio"] < 1
    assert [strategy["name"] for strategy in record["strategies"]] == RUNS[model].split("+")
    if model == "llava":
        assert {image["after"] for image in images} == {86}  # round(0.6 * 144)
    else:
        assert len({image["after"] for image in images}) > 2
