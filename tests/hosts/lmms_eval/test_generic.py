"""The host's ids for everything that transformers loads, on checkpoints of four families: one process runs them all."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoints
import lmms as hosts
import pytest
from checkpoints import HOSTS
from matrix import dear

from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.lmms_eval import generic

pytest.importorskip("lmms_eval")

FIRST, LAST = 6, 3  # tokens that are left behind the tower, and between the decoder layers
LATE = {
    "pruning": "atp+fastv",
    "pruning_args": {"atp.alpha": 0, "atp.keep_tokens": FIRST, "fastv.layer": 3, "fastv.keep_tokens": LAST},
}
RUNS = {
    ("huggingface", "llava_hf-siglip"): {},
    ("huggingface", "qwen2_5_vl"): {},
    ("huggingface", "internvl_hf"): {},
    ("huggingface", "gemma3"): {},
    ("async_hf_model", "qwen2_5_vl"): {},
}


WHOLE = dear(RUNS, [("huggingface", "qwen2_5_vl"), ("async_hf_model", "qwen2_5_vl")])  # run unpruned, too


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command line wrote, of every run: pruned, and with `none`."""
    folder, runs = tmp_path_factory.mktemp("generic"), []
    hosts.write_own_tasks(folder / "tasks")
    for key in {key for _, key in RUNS}:
        HOSTS[key].build(folder / key)
    for name, key in RUNS:
        for how, pruning in (("late", LATE), ("none", {"pruning": "none"}))[: 1 + ((name, key) in WHOLE)]:
            given = {"model": name, "model_args": f"pretrained={folder / key},device=cpu", "tasks": "pictures"}
            given |= {"include_path": str(folder / "tasks"), "output_path": f"{how}/{name}/{key}", "log_samples": True}
            runs.append(given | {"batch_size": 1, "limit": 3} | pruning)
    done = hosts.call_runs(folder, runs)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def said(folder: Path, how: str, name: str, key: str) -> list[dict[str, Any]]:
    """The lines of one run, which pruned what its checkpoint is."""
    (results,) = hosts.results(folder / how / name / key)
    assert results["pruning"]["model"]["family"] == HOSTS[key].family
    assert results["pruning"]["samples"]["with_images"] == 3
    return hosts.samples(folder / how / name / key, "pictures")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "key"), RUNS)
def test_a_generic_id_prunes_what_its_checkpoint_is(name: str, key: str, folder: Path) -> None:
    for line in said(folder, "late", name, key):
        after = [image["after"] for image in line["pruning"]["images"]]
        assert after == [LAST] * len(hosts.PICTURES[line["doc_id"]])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "key"), WHOLE)
def test_it_begins_with_what_the_unpruned_run_has(name: str, key: str, folder: Path) -> None:
    for cut, whole in zip(said(folder, "late", name, key), said(folder, "none", name, key), strict=True):
        before = [image["before"] for image in cut["pruning"]["images"]]
        assert before == [image["after"] for image in whole["pruning"]["images"]]


def test_several_workers_are_refused() -> None:
    lm = SimpleNamespace(_workers=[SimpleNamespace(), SimpleNamespace()])
    with pytest.raises(PruningError, match=r"^async_hf_model has 2 workers, pruning follows one: say worker_count=1$"):
        generic.make_ready(lm, "async_hf_model")


def test_a_processor_is_not_told_of_what_is_not_there() -> None:
    """Other media, and its own class by name, stay."""
    processor = checkpoints.qwen("Qwen2_5_VL")
    name, lm = type(processor).__name__, SimpleNamespace(processor=processor)
    with pytest.raises((TypeError, ValueError)):
        processor(text=["Hi"], images=[], videos=[], audios=[], return_tensors="pt")
    generic.make_ready(lm, "huggingface")
    made = processor(text=["Hi"], images=[], videos=[], audios=[], return_tensors="pt")
    assert set(made) >= {"input_ids", "attention_mask"}
    assert "pixel_values" not in made
    assert type(processor).__name__ == name
