"""Every `--model` of lmms-eval that the package supports: pruned against unpruned, on checkpoints made by the tests.

One process of the command line runs one of each kind from a `--config` list, pruned behind the tower and between
decoder layers, and some with `none` (the full matrix: all of them; every run there begins from nothing). What needs no
process of its own (the host that nobody wrapped, pixels, videos, and by default the models that another one stands for)
runs in this one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoints
import lmms
import pytest
import torch
import warm
from checkpoints import HOSTS, Host
from families import PINPOINTS, anyres_rows
from matrix import dear
from torch import Tensor

from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.llava import frozen
from vtp_plugin.hosts.lmms_eval import generic
from vtp_plugin.surgery.undo import Undo

pytest.importorskip("lmms_eval")
pytest.importorskip("llava")
pytestmark = pytest.mark.slow

FIRST, LAST = 6, 3  # tokens that are left of an image behind the tower, and between the decoder layers
CUT = 3  # the decoder layer that sees fewer
NO_LLM = {"gemma4", "qwen3_5", "qwen3_5-A3B", "hf-minicpmv4_6"}  # hosts whose models are cut behind the tower only
LATE = {
    "pruning": "atp+fastv",
    "pruning_args": {"atp.alpha": 0, "atp.keep_tokens": FIRST, "fastv.layer": CUT, "fastv.keep_tokens": LAST},
}
BEHIND = {"pruning": "atp", "pruning_args": {"alpha": 0, "keep_tokens": FIRST}}
VPRUNE = {"pruning": "vprune", "pruning_args": {"chi2_threshold": 40, "cosine_threshold": 0.2}}
UNPRUNED = dear(HOSTS, ["llava-1.6", "qwen2_5_vl", "internvl_hf"])
OF_EACH_KIND = [
    "llava-1.5",
    "llava-1.6",
    "llava_hf-next",
    "qwen2_5_vl",
    "glm4v",
    "hf-paligemma",
    "internvl_hf",
    "gemma4",
]
GENERIC = [key for key, host in HOSTS.items() if host.name in generic.NAMES]  # import every family to know one
COMMANDED = dear(HOSTS, {*OF_EACH_KIND, *GENERIC})
NO_PIXELS = {"gemma4", "mistral3_vl"}
PIXELS = [key for key in dear(HOSTS, OF_EACH_KIND) if key not in NO_PIXELS]
TURNED = [[height, width] for width, height in checkpoints.LARGE_PINPOINTS]  # the authors' package says width first
TILED = {"llava-1.6": (TURNED, 168, 12), "llava_hf-next": (PINPOINTS, 16, 4)}
TILED["llava_hf-onevision"] = TILED["hf-next_video"] = TILED["llava_hf-next"]
VIDEOS = {"llava_hf-onevision": 1, "qwen2_vl": 0, "qwen2_5_vl": 0, "qwen3_vl": 0, "gemma3": 0}  # and newlines of each

TRIPS = '''
from vtp_plugin import PruningStrategy, Selection, Stage


class Trips(PruningStrategy):
    """Raises in the middle of the model."""

    name, paper, stage = "trips", "none", Stage.PROJECTOR

    def select(self, visual) -> Selection:
        raise RuntimeError("the selector tripped")
'''


class Work:
    """A folder with a checkpoint of every family, the tasks, and what the command line wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        lmms.write_own_tasks(folder / "tasks")
        for key, host in HOSTS.items():
            host.build(self.checkpoint(key))

    def checkpoint(self, key: str) -> Path:
        return self.folder / f"llava-{key}"  # the authors' package wants its own name in the path

    def depth(self, key: str) -> int:
        """Decoder layers of a checkpoint."""
        config = json.loads((self.checkpoint(key) / "config.json").read_text())
        return config.get("text_config", config)["num_hidden_layers"]

    def arguments(self, key: str) -> str:
        return f"pretrained={self.checkpoint(key)},{HOSTS[key].arguments}"

    def options(self, key: str) -> dict[str, Any]:
        """Of a run on pictures; some hosts cannot take a document without any."""
        host = HOSTS[key]
        return {"batch_size": host.batch, "limit": None if host.text_only else len(lmms.PICTURES) - 1}

    def entry(self, key: str, name: str, **pruning: Any) -> dict[str, Any]:
        """A run of the command line."""
        given = {"model": HOSTS[key].name, "model_args": self.arguments(key), "tasks": "pictures", "log_samples": True}
        given |= {"include_path": str(self.folder / "tasks"), "output_path": f"{name}/{key}"}
        return given | self.options(key) | pruning

    def evaluate(self, key: str, model: Any = None, more: str = "", tasks: str = "pictures", **options: Any) -> Any:
        """A run in this process."""
        arguments = ",".join(filter(None, [self.arguments(key), more]))
        manager = lmms.task_manager(own=True, include=str(self.folder / "tasks"))
        given = {**self.options(key), "task_manager": manager} | options
        return lmms.evaluate(model or HOSTS[key].name, arguments, tasks, **given)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    return Work(tmp_path_factory.mktemp("hosts"))


@pytest.fixture(scope="module")
def process(work: Work) -> Any:
    """All runs of the command line."""
    runs = [work.entry(key, "none", pruning="none") for key in UNPRUNED]
    runs += [work.entry(key, "late", **late_of(key)) for key in COMMANDED]
    runs += [work.entry(key, "pixels", **VPRUNE) for key in PIXELS if key in GENERIC]
    process = lmms.call_runs(work.folder, runs)
    assert process.returncode == 0, process.stderr
    return process


@pytest.fixture(scope="module")
def tripping(work: Work) -> Any:
    """A process of `lmms-eval eval` that trips over a strategy of somebody's own."""
    (work.folder / "trips.py").write_text(TRIPS)
    runs = [work.entry("internvl_hf", "trips", pruning="trips", pruning_module="trips.py")]
    return lmms.call_runs(work.folder, runs, [*warm.python(), "-m", "lmms_eval", "eval"])


@pytest.fixture(autouse=True)
def _own_caches(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(work.folder / "cache"))
    monkeypatch.chdir(work.folder)


def written(work: Work, name: str, key: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Results and sample lines of one run of the command line, or of one in this process."""
    if key not in COMMANDED:
        results = work.evaluate(key, more=flat(late_of(key)))
        return results, lines(results)
    (results,) = lmms.results(work.folder / name / key)
    return results, lmms.samples(work.folder / name / key, "pictures")


def lines(results: dict[str, Any], task: str = "pictures") -> list[dict[str, Any]]:
    return sorted(results["samples"][task], key=lambda line: line["doc_id"])


def late_of(key: str) -> dict[str, Any]:
    return BEHIND if key in NO_LLM else LATE


def flat(pruning: dict[str, Any]) -> str:
    """As model arguments."""
    fields = (f"pruning.{name}={value}" for name, value in pruning["pruning_args"].items())
    return ",".join([f"pruning={pruning['pruning']}", *fields])


def images(line: dict[str, Any], which: str) -> list[int]:
    return [image[which] for image in line["pruning"]["images"]]


def newlines(key: str, document: int) -> list[int]:
    """Rows of every picture of a document that no strategy may drop."""
    sizes = lmms.PICTURES[document]
    return [anyres_rows((h, w), *TILED[key])[1] if key in TILED else 0 for w, h in sizes]


# -- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", HOSTS)
def test_records(key: str, work: Work, process: Any) -> None:
    """Family, samples, and the exact number of tokens of every picture behind both cuts, and of the prompt."""
    results, said = written(work, "late", key)
    shown = [len(lmms.PICTURES[line["doc_id"]]) for line in said]
    record = results["pruning"]
    assert record["model"]["family"] == HOSTS[key].family
    assert [s["name"] for s in record["strategies"]] == late_of(key)["pruning"].split("+")
    last = FIRST if key in NO_LLM else LAST
    with_images = sum(map(bool, shown))
    assert record["samples"] == {"total": len(shown), "with_images": with_images, "pruned": with_images}
    assert len(shown) == HOSTS[key].text_only + len(lmms.PICTURES) - 1
    for line in said:
        fixed = newlines(key, line["doc_id"])
        assert images(line, "after") == [last + rows for rows in fixed]
        if fixed:
            dropped = sum(count - FIRST - rows for count, rows in zip(images(line, "before"), fixed, strict=True))
            prompt, depth = line["pruning"]["prompt_tokens"], work.depth(key)
            assert prompt["before"] - prompt["after"] == dropped
            assert prompt["after"] - prompt["mean_over_layers"] == len(fixed) * (FIRST - last) * (1 - CUT / depth)
    for when in ("before", "after"):
        assert record["visual_tokens"][when] == sum(sum(images(line, when)) for line in said)


@pytest.mark.parametrize("key", UNPRUNED)
def test_pruned_against_unpruned(key: str, work: Work, process: Any) -> None:
    (whole, plain), (_, pruned) = written(work, "none", key), written(work, "late", key)
    assert whole["pruning"]["samples"]["pruned"] == 0
    for one, other in zip(plain, pruned, strict=True):
        assert images(one, "after") == images(one, "before") == images(other, "before")


def test_an_error_that_the_host_swallows_ends_the_process_with_a_failure(work: Work, tripping: Any) -> None:
    """InternVL's class answers "" to every exception; the run must not look like a bad model."""
    assert tripping.returncode not in (0, None)
    assert "the selector tripped" in tripping.stderr
    assert not lmms.results(work.folder / "trips")


# -- in this process --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [key for key in COMMANDED if key not in GENERIC])
def test_counts_and_answers_of_the_host_itself(key: str, work: Work, process: Any) -> None:
    """`none` answers like a model that was never wrapped; counted are the placeholders of the host's processor.

    The authors' package pads batches on the wrong side, so that it answers shorter prompts rightly only one by one. The
    generic ids load no model that answers by themselves.
    """
    from lmms_eval.models import get_model

    name = HOSTS[key].name
    batch = 1 if name == "llava" else HOSTS[key].batch
    lm = get_model(name).create_from_arg_string(work.arguments(key), {"batch_size": batch})
    if name == "llava":
        frozen.serve(lm.model, Undo())  # by itself the package runs up to transformers 5.23
    made = counting(lm.model) if name != "llava" else None
    results = work.evaluate(key, lm, batch_size=batch)
    assert "pruning" not in results
    _, said = written(work, "late", key)
    counts = [sum(images(line, "before")) for line in said]
    if key in TILED:
        sizes = [lmms.PICTURES[line["doc_id"]] for line in said]
        assert counts == [sum(sum(anyres_rows((h, w), *TILED[key])) for w, h in each) for each in sizes]
    if made is not None:
        assert sorted(counts) == sorted(made)
    if key in UNPRUNED:
        _, said = written(work, "none", key)
        assert [answer(line) for line in said] == [answer(line) for line in lines(results)]


def answer(line: dict[str, Any]) -> str:
    """What the model said, with the spaces that the host's filter strips.

    Lists of lists in memory; in the file a string, which is left out where the filter changed nothing.
    """
    said = line.get("resps", line["filtered_resps"])
    while not isinstance(said, str):
        said = said[0]
    return said


def counting(model: Any) -> list[int]:
    """The number of placeholders in every prompt that a model is given from now on."""
    found: list[int] = []
    tokens = torch.tensor([getattr(model.config, f"{kind}_token_id", None) or -1 for kind in ("image", "video")])
    generate = model.generate

    def counted(*args: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        found.extend(torch.isin(input_ids, tokens).sum(1).tolist())
        return generate(*args, input_ids=input_ids, **kwargs)

    model.generate = counted
    return found


@pytest.mark.parametrize("key", PIXELS)
def test_pixels_come_through_the_real_processor(key: str, work: Work, process: Any) -> None:
    """Pictures whose upper half is of one colour lose something there, through every processor and precision."""
    said = written(work, "pixels", key)[1] if key in GENERIC else lines(work.evaluate(key, more=flat(VPRUNE)))
    for line in said:
        pairs = zip(images(line, "before"), images(line, "after"), strict=True)
        assert all(0 < after < before for before, after in pairs)


@pytest.mark.parametrize("key", VIDEOS)
def test_videos(key: str, work: Work) -> None:
    """A video is one image of several frames; Gemma 3 is shown its frames as images."""
    results = work.evaluate(key, more=flat(LATE), tasks="clips", batch_size=1, limit=None, force_simple=True)
    assert results["pruning"]["samples"] == {"total": 2, "with_images": 2, "pruned": 2}
    for line, (_, frames) in zip(lines(results, "clips"), lmms.CLIPS, strict=True):
        assert images(line, "after") == [LAST + VIDEOS[key]] * (frames if key == "gemma3" else 1)
        assert all(before > FIRST for before in images(line, "before"))


@pytest.mark.parametrize(
    ("key", "method"), [("qwen2_5_vl", "evs"), ("qwen3_vl", "flashvid"), ("llava_hf-onevision", "vidcom2")]
)
def test_methods_for_videos(key: str, method: str, work: Work) -> None:
    """One budget for every clip, decoded and prepared by the host."""
    more = f"pruning={method},pruning.keep_ratio=0.6"
    results = work.evaluate(key, more=more, tasks="clips", batch_size=1, limit=None, force_simple=True)
    assert results["pruning"]["samples"] == {"total": 2, "with_images": 2, "pruned": 2}
    for line in lines(results, "clips"):
        (before,), (after,) = images(line, "before"), images(line, "after")
        assert after - VIDEOS[key] == int(0.6 * (before - VIDEOS[key]) + 1e-9)


def test_frames_are_compared_where_there_are_any(work: Work) -> None:
    """Of pictures EVS drops nothing, which is no run; other families refuse it before anything runs."""
    with pytest.raises(PruningError, match=r"^evs: 4 images went in and not one token was cut"):
        work.evaluate("qwen2_5_vl", more="pruning=evs")
    with pytest.raises(PruningError, match=r"^evs: it compares the frames of a video, Gemma 3 is shown pictures only"):
        work.evaluate("gemma3", more="pruning=evs", tasks="clips", batch_size=1, limit=None, force_simple=True)


def test_a_batch_that_the_host_takes_apart_keeps_its_documents(work: Work) -> None:
    """Mistral 3's class fetches a whole batch and calls the model once for every document of it."""
    host: Host = HOSTS["mistral3_vl"]
    assert host.batch > 1
    apart = lines(work.evaluate("mistral3_vl", more="pruning=stride"))
    single = lines(work.evaluate("mistral3_vl", more="pruning=stride", batch_size=1))
    assert [line["pruning"]["images"] for line in apart] == [line["pruning"]["images"] for line in single]
    assert [len(line["pruning"]["images"]) for line in apart] == [len(sizes) for sizes in lmms.PICTURES]


def test_the_response_cache_keeps_configurations_apart(work: Work) -> None:
    """With a class that really hits the host's cache: an unpruned answer serves no pruned run."""
    answers = {"use_cache": str(work.folder / "answers")}
    work.evaluate("qwen2_5_vl", **answers)
    totals = [work.evaluate("qwen2_5_vl", more="pruning=stride", **answers)["pruning"]["samples"] for _ in range(2)]
    assert [samples["total"] for samples in totals] == [len(lmms.PICTURES), 0]


@pytest.mark.parametrize("key", ["internvl_hf", "mistral3_vl"])
def test_a_refusal_inside_a_host_that_swallows_it_fails_the_run(key: str, work: Work, monkeypatch: Any) -> None:
    from vtp_plugin.strategies.stride import Stride

    def select(self: Any, visual: Any) -> Any:
        raise ZeroDivisionError("in the middle")

    monkeypatch.setattr(Stride, "select", select)
    with pytest.raises(PruningError, match="in the middle"):
        work.evaluate(key, more="pruning=stride")
