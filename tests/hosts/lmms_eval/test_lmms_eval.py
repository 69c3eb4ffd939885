"""lmms-eval with the plugin installed: flags, the record in its results, transparency, and failures that show."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lmms
import numpy as np
import pytest
import warm
import yaml
from lmms import GRID, LOOSE, SETTINGS, TINY, VPRUNE, answers, kept_by_vprune, lines
from paths import ROOT

from vtp_plugin import config, plugins
from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.lmms_eval.plugin import TASKS
from vtp_plugin.stages import Stage
from vtp_plugin.strategies.vprune import VPrune
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.tiny.checkpoint import resolve
from vtp_plugin.tokens import Selection, VisualTokens

pytest.importorskip("lmms_eval")

LAYOUTS = {"llava": "llava", "llava_hf": "hf"}
DEVICES = {"llava": "device=cpu,device_map=auto", "llava_hf": "device=cpu,device_map=cpu"}


def folder_arguments(model: str) -> str:
    """The embedded model as any other local folder: nothing in here concerns the plugin."""
    return f"pretrained={resolve('vtp-tiny', LAYOUTS[model])},{DEVICES[model]}"


@cache
def scenes(model: str, arguments: str, batch_size: int = 1, limit: int = 6) -> dict[str, Any]:
    """Results of the scenes task in this process."""
    return lmms.evaluate(model, f"{TINY},{arguments}".rstrip(","), limit=limit, batch_size=batch_size)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a data cache of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -- the record -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "batch_size"), SETTINGS)
def test_record_is_complete(model: str, batch_size: int) -> None:
    record = scenes(model, VPRUNE, batch_size)["pruning"]
    json.dumps(record, allow_nan=False)
    assert set(record) == {
        *("schema", "versions", "model", "strategies", "visual_tokens", "samples", "seconds", "latency"),
        *("prefill_flops", "flops", "kv_cache_bytes", "peak_bytes", "machine"),
    }
    assert record["schema"] == 2
    for package in ("vtp-plugin", "lmms-eval", "transformers", "torch", "llava-torch", "accelerate"):
        assert record["versions"][package] == version(package)
    assert record["model"] == {"family": model, "device": "cpu", "dtype": "float32", "attention": "sdpa"}
    (strategy,) = record["strategies"]
    assert (strategy["name"], strategy["stage"]) == ("vprune", "pixels")
    assert strategy["config"] == VPrune(**LOOSE).config()
    seconds = record["seconds"]
    assert set(seconds) == {"image_processing", "tower", "selector", "projector", "prefill", "decode", "total"}
    assert all(value > 0 for value in seconds.values())
    assert seconds["prefill"] + seconds["decode"] <= seconds["total"] * 1.01


@pytest.mark.parametrize("arguments", [VPRUNE, "pruning=vprune+fastv,pruning.fastv.keep_ratio=0.3"])
@pytest.mark.parametrize(("model", "batch_size"), SETTINGS)
def test_record_adds_up_to_the_sample_log(model: str, batch_size: int, arguments: str) -> None:
    results = scenes(model, arguments, batch_size)
    record, logged = results["pruning"], [line["pruning"] for line in lines(results)]
    images = [image for sample in logged for image in sample["images"]]
    before, after = [i["before"] for i in images], [i["after"] for i in images]
    assert record["visual_tokens"] == {
        "before": sum(before),
        "after": sum(after),
        "mean_before": pytest.approx(sum(before) / len(before)),
        "mean_after": pytest.approx(sum(after) / len(after)),
        "min_after": min(after),
        "max_after": max(after),
    }
    assert set(before) == {GRID * GRID}
    assert len(set(after)) > 1
    pruned = sum(any(i["after"] < i["before"] for i in sample["images"]) for sample in logged)
    assert record["samples"] == {"total": len(logged), "with_images": len(logged), "pruned": pruned}
    flops = record["prefill_flops"]
    for when in ("before", "after"):
        assert flops[when] == sum(sample["prefill_flops"][when] for sample in logged)
    assert flops["ratio"] == pytest.approx(flops["after"] / flops["before"])
    assert 0.2 < flops["ratio"] < 1
    for part, total in record["seconds"].items():
        assert total == pytest.approx(sum(sample["seconds"].get(part, 0) for sample in logged))


@pytest.mark.parametrize(("model", "batch_size"), SETTINGS)
def test_time_to_first_token_is_measured_per_sample(model: str, batch_size: int) -> None:
    results = scenes(model, VPRUNE, batch_size)
    latency, logged = results["pruning"]["latency"], [line["pruning"] for line in lines(results)]
    warm = [sample for sample in logged if not sample["latency"]["warmup"]]
    assert 0 < len(warm) == latency["samples"] == len(logged) - batch_size
    ttft = [sample["latency"]["ttft"] for sample in warm]
    assert latency["ttft"]["mean"] == pytest.approx(np.mean(ttft))
    for share in (50, 90, 99):
        assert latency["ttft"][f"p{share}"] == pytest.approx(np.percentile(ttft, share))
    for sample in logged:
        parts = ("image_processing", "tower", "selector", "projector", "prefill")
        seconds = [sample["seconds"][part] * sample["latency"]["batch"] for part in parts]
        assert all(part > 0 for part in seconds)
        assert 0.5 * sample["latency"]["ttft"] < sum(seconds) <= sample["latency"]["ttft"] * 1.001
        assert sample["latency"]["batch"] <= batch_size
        assert sample["latency"]["new_tokens"] == 1 or 0 < sample["latency"]["decode_per_token"] < max(ttft)
    for name, value in latency["ttft"].items():
        assert results["throughput"][f"avg_ttft_{name}"] == value


@pytest.mark.parametrize(("model", "batch_size"), SETTINGS)
def test_every_line_has_the_record_of_its_own_document(model: str, batch_size: int) -> None:
    logged = lines(scenes(model, VPRUNE, batch_size))
    expected = [kept_by_vprune(line["doc_id"]) for line in logged]
    assert len(set(expected)) > 3
    assert [line["pruning"]["images"] for line in logged] == [[{"before": 144, "after": n}] for n in expected]
    for line, kept in zip(logged, expected, strict=True):
        prompt = line["pruning"]["prompt_tokens"]
        assert prompt["before"] - prompt["after"] == GRID * GRID - kept


def test_batches_without_a_picture_are_counted(workplace: Path) -> None:
    lmms.write_tasks(workplace)
    wanted = 2 * len(lmms.SIZES)
    options = {"limit": wanted, "batch_size": len(lmms.SIZES), "gen_kwargs": "max_new_tokens=2"}
    results = lmms.evaluate("llava", f"{TINY},pruning=stride", "scienceqa_img", **options)
    record = results["pruning"]
    assert record["samples"] == {"total": wanted, "with_images": wanted // 2, "pruned": wanted // 2}
    counts = [len(line["pruning"]["images"]) for line in lines(results, "scienceqa_img")]
    assert counts == [1] * (wanted // 2) + [0] * (wanted // 2)


def test_a_document_asked_twice_keeps_its_record(workplace: Path) -> None:
    results = lmms.evaluate("llava", f"{TINY},{VPRUNE}", limit=2, batch_size=2, repeats=2)
    assert results["pruning"]["samples"]["total"] == 4
    kept = [line["pruning"]["images"][0]["after"] for line in lines(results)]
    assert kept == [kept_by_vprune(0), kept_by_vprune(1)]


# -- transparency -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llava", "llava_hf"])
def test_none_answers_like_the_unpruned_model(model: str) -> None:
    plain, none = scenes(model, ""), scenes(model, "pruning=none")
    assert answers(none) == answers(plain)
    assert answers(scenes(model, "pruning=stride,pruning.keep_tokens=4")) != answers(plain)
    assert "pruning" not in plain
    assert all("pruning" not in line for line in lines(plain))
    record = none["pruning"]
    assert record["strategies"] == []
    assert record["visual_tokens"]["after"] == record["visual_tokens"]["before"] == 6 * 144
    assert record["samples"] == {"total": 6, "with_images": 6, "pruned": 0}
    assert record["prefill_flops"]["ratio"] == 1


@pytest.mark.parametrize("model", ["llava", "llava_hf"])
def test_keeping_everything_is_allowed_and_changes_nothing(model: str) -> None:
    everything = scenes(model, "pruning=stride,pruning.keep_ratio=1")
    assert answers(everything) == answers(scenes(model, ""))
    assert everything["pruning"]["samples"]["pruned"] == 0


BARE = """
import importlib.metadata as metadata, sys
metadata.entry_points = lambda **chosen: metadata.EntryPoints(
    entry for package in metadata.distributions() for entry in package.entry_points
    if not entry.value.startswith("vtp_plugin")).select(**chosen)
from functools import partialmethod
from lmms_eval.tasks import TaskManager  # the 1600 tasks that nobody asks for are not read
TaskManager.__init__ = partialmethod(TaskManager.__init__, include_defaults=False)
from lmms_eval.cli.dispatch import main
main()
assert "vtp_plugin" not in sys.modules
"""


class Session:
    """One process of the command line: what it said and wrote."""

    def __init__(self, process: subprocess.CompletedProcess[str], folder: Path) -> None:
        self.process, self.folder = process, folder

    def files(self, run: str) -> dict[str, Any]:
        """The results of one run, by its output path."""
        (results,) = lmms.results(self.folder / run)
        return results

    def samples(self, run: str) -> list[dict[str, Any]]:
        return lmms.samples(self.folder / run, lmms.SCENES)

    @property
    def said(self) -> str:
        return self.process.stdout + self.process.stderr

    @property
    def warnings(self) -> set[str]:
        """Every kind of line that warns, without times and numbers."""
        found = [
            line for line in self.said.splitlines() if re.search(r"warn|\[transformers\]|deprecat|error", line, re.I)
        ]
        return {re.sub(r"\d+", "#", re.sub(r"\x1b\[[\d;]*m", "", line)).strip() for line in found}


def run(name: str, model: str, arguments: str, **more: Any) -> dict[str, Any]:
    """An entry of a `--config` file."""
    given = {"model": model, "model_args": arguments, "tasks": lmms.SCENES, "limit": 3, "log_samples": True}
    return given | {"output_path": name} | more


OUTDATED = "LlavaLlamaForCausalLM.forward() got an unexpected keyword argument 'cache'"
UNPRUNED = [(f"plain_{model}", model) for model in LAYOUTS]


def unpruned_runs() -> list[dict[str, Any]]:
    """Both models without pruning; the tasks are named, as only the plugin finds them by itself."""
    return [run(name, model, folder_arguments(model), include_path=str(TASKS)) for name, model in UNPRUNED]


@pytest.fixture(scope="module")
def unpruned(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """Both models without pruning, the plugin installed."""
    folder = tmp_path_factory.mktemp("unpruned")
    return Session(lmms.call_runs(folder, unpruned_runs()), folder)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """The same runs in a process that cannot see the plugin."""
    folder = tmp_path_factory.mktemp("bare")
    return Session(lmms.call_runs(folder, unpruned_runs(), [sys.executable, "-c", BARE]), folder)


OWN = '''
from dataclasses import dataclass
from vtp_plugin import PruningStrategy, Stage

@dataclass(kw_only=True)
class Mine(PruningStrategy):
    """Keep the first tokens."""

    name, stage, paper = "mine", Stage.PROJECTOR, "none"

    def score(self, visual):
        return -visual.index.float()
'''


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """A list of runs in one process: pruned by name, by a file and by model_args, `none`, and not at all."""
    folder = tmp_path_factory.mktemp("mixed")
    entries = [{"strategy": "visionzip", "keep_tokens": 64}, {"strategy": "fastv", "layer": 1, "keep-ratio": 0.25}]
    (folder / "two.yaml").write_text(yaml.safe_dump({"strategies": entries}))
    hf = folder_arguments("llava_hf")
    runs = [
        run("named", "llava", folder_arguments("llava"), pruning="atp", pruning_args="keep-ratio=0.25,alpha=0"),
        run("file", "llava_hf", hf, pruning="two.yaml", pruning_args={"fastv.keep_ratio": 0.5}),
        run("folded", "llava_hf", f"{hf},pruning=visionzip,pruning.keep_tokens=64"),
        run("none", "llava_hf", hf, pruning="none"),
        run("own", "llava_hf", hf, pruning="mine", pruning_args="keep_ratio=0.25", pruning_module="mine.py"),
        run("plain_llava_hf", "llava_hf", hf),
    ]
    (folder / "mine.py").write_text(OWN)
    return Session(lmms.call_runs(folder, runs), folder)


@pytest.mark.slow
def test_without_pruning_the_plugin_changes_nothing(bare: Session, unpruned: Session) -> None:
    assert bare.process.returncode == unpruned.process.returncode == 0
    for name, _ in UNPRUNED:
        plain = bare.samples(name)
        assert unpruned.samples(name) == plain
        if not plain:  # since transformers 5.24 the authors' package answers only with what `pruning=none` does for it
            assert (name, OUTDATED in bare.said, OUTDATED in unpruned.said) == ("plain_llava", True, True)
            continue
        assert len(plain) == 3
        ours, theirs = unpruned.files(name), bare.files(name)
        assert set(ours) == set(theirs)
        assert ours["config"]["model_args"] == theirs["config"]["model_args"]
        assert ours["config"]["model_backend"] == theirs["config"]["model_backend"]
    assert "vtp-plugin" not in unpruned.said


@pytest.mark.slow
def test_pruning_causes_no_warning(unpruned: Session, mixed: Session) -> None:
    assert mixed.warnings <= unpruned.warnings


# -- flags ------------------------------------------------------------------------------------------------------------


def test_help_shows_the_flags(tmp_path: Path) -> None:
    said = lmms.call([*warm.python(), "-m", "lmms_eval", "eval", "--help"], tmp_path)
    assert said.returncode == 0
    for flag in ("--pruning", "--pruning_args", "--pruning-args"):
        assert re.search(rf"(^|[\s,]){flag}[\s,]", said.stdout), flag
    for name in plugins.list_strategies():
        assert name in said.stdout


@pytest.mark.slow
def test_a_list_of_runs_in_one_process(mixed: Session) -> None:
    assert mixed.process.returncode == 0, mixed.process.stderr
    kept = {name: mixed.files(name)["pruning"]["visual_tokens"] for name in ("named", "file", "folded", "none")}
    assert kept["named"]["min_after"] == kept["named"]["max_after"] == 36
    assert kept["file"]["max_after"] == 32
    assert kept["folded"]["max_after"] == 64
    assert kept["none"]["min_after"] == 144
    own = mixed.files("own")["pruning"]
    assert (own["strategies"][0]["name"], own["visual_tokens"]["max_after"]) == ("mine", 36)
    configs = [s["config"] for s in mixed.files("file")["pruning"]["strategies"]]
    assert [(c["keep_tokens"], c["keep_ratio"]) for c in configs] == [(64, None), (None, 0.5)]
    assert mixed.files("named")["pruning"]["strategies"][0]["config"]["alpha"] == 0
    assert "pruning=atp" in mixed.files("named")["config"]["model_args"]
    assert "pruning" not in mixed.files("plain_llava_hf")
    said = [line["filtered_resps"] for line in mixed.samples("plain_llava_hf")]
    assert [line["filtered_resps"] for line in mixed.samples("none")] == said
    assert all("pruning" in line for line in mixed.samples("file"))


@pytest.mark.slow
def test_every_run_ends_with_what_was_cut_and_where_the_record_is(mixed: Session) -> None:
    lines = [line for line in mixed.process.stdout.splitlines() if "visual tokens per image" in line]
    for name in ("named", "file", "folded", "none"):
        record = mixed.files(name)["pruning"]
        (line,) = [line for line in lines if line.endswith(f"; record: {name}/")]
        assert f"{record['visual_tokens']['mean_after']:.0f} visual tokens per image" in line
        pruned = f"{record['samples']['pruned']} of {record['samples']['with_images']} samples pruned"
        assert (pruned in line) == bool(record["strategies"])


@pytest.mark.slow
def test_the_host_reports_time_to_first_token_with_the_plugin(mixed: Session) -> None:
    for name in ("named", "file", "folded", "none"):
        throughput, record = mixed.files(name)["throughput"], mixed.files(name)["pruning"]
        for percentile in ("mean", "p50", "p90", "p99"):
            assert throughput[f"avg_ttft_{percentile}"] == record["latency"]["ttft"][percentile] > 0
        assert throughput["total_gen_tokens"] > 0
        assert 0 < throughput["avg_ttft_p50"] < throughput["total_elapsed_time"]
        assert throughput["avg_decode_per_token_p50"] > 0
        assert "avg_ttft_p50" in mixed.process.stdout + mixed.process.stderr
    plain = mixed.files("plain_llava_hf")["throughput"]
    assert not [key for key in plain if "ttft" in key]
    assert plain["total_gen_tokens"] == mixed.files("none")["throughput"]["total_gen_tokens"]


@pytest.mark.slow
def test_two_processes_make_one_record(tmp_path: Path) -> None:
    """An odd number of documents, of which the host repeats one; and nobody has written the embedded model yet."""
    command = ["--model", "llava_hf", "--model_args", TINY, "--tasks", lmms.SCENES, "--limit", "3", "--log_samples"]
    command += ["--output_path", "out", "--pruning", "vprune", "--pruning-args"]
    command += [",".join(f"{key}={value}" for key, value in LOOSE.items())]
    ended = lmms.call_together(tmp_path, command, 2, ACCELERATE_USE_CPU="true", VTP_CACHE="models")
    assert [code for code, _ in ended] == [0, 0], ended
    assert "Running on rank 1" in ended[1][1]
    (results,) = lmms.results(tmp_path)
    logged = lmms.samples(tmp_path, lmms.SCENES)
    kept = [kept_by_vprune(document) for document in range(3)]
    assert [line["pruning"]["images"][0]["after"] for line in logged] == kept
    assert results["pruning"]["samples"] == {"total": 3, "with_images": 3, "pruned": 3}
    assert results["pruning"]["visual_tokens"]["after"] == sum(kept)


def test_the_registry_hands_out_the_hosts_own_classes() -> None:
    """Whatever was pruned before in this process; only what `create_from_arg_string` is told concerns us."""
    import importlib

    from lmms_eval.models import MODEL_REGISTRY_V2, get_model

    scenes("llava_hf", "pruning=none")
    for name in LAYOUTS:
        module, _, cls = MODEL_REGISTRY_V2.resolve(name).class_path.rpartition(".")
        assert get_model(name) is getattr(importlib.import_module(module), cls)
    lm = get_model("llava_hf").create_from_arg_string(folder_arguments("llava_hf"), {"batch_size": 1, "device": None})
    assert type(lm) is get_model("llava_hf")
    assert not [name for name in vars(lm.model) if "vtp" in name or name in ("generate", "forward")]


def test_a_class_from_the_registry_takes_our_arguments_in_its_argument_string() -> None:
    from lmms_eval.models import get_model

    make = get_model("llava_hf").create_from_arg_string
    lm = make(f"{folder_arguments('llava_hf')},pruning=stride,pruning.keep_tokens=9")
    assert lmms.evaluate(lm, "", limit=2)["pruning"]["visual_tokens"]["max_after"] == 9


@pytest.mark.parametrize("argument", ["prunning=stride", "Pruning=stride", "prunning.keep_ratio=1", "pruning_args=x"])
def test_a_misspelt_model_argument_is_refused(argument: str) -> None:
    """Some model classes would swallow it."""
    name = argument.partition("=")[0]
    with pytest.raises(PruningError, match=f"unknown model argument '{name}'. Did you mean 'pruning"):
        lmms.evaluate("internvl_hf", f"pretrained=/nowhere,{argument}", limit=1)


def test_two_pruned_models_side_by_side() -> None:
    """The proof of one does not disturb the other's, in whatever order they are evaluated."""
    from lmms_eval import evaluator
    from lmms_eval.models import get_model

    untouched = evaluator.evaluate
    make = get_model("llava_hf").create_from_arg_string
    models = [make(f"{TINY},pruning=stride,pruning.keep_tokens={count}") for count in (7, 11)]
    records = [lmms.evaluate(lm, "", limit=1)["pruning"] for lm in models]
    assert [record["visual_tokens"]["after"] for record in records] == [7, 11]
    assert evaluator.evaluate is untouched


# -- failures ---------------------------------------------------------------------------------------------------------

REFUSED = {
    "strategy": ({"pruning": "apt"}, "unknown strategy 'apt'. Did you mean 'atp'?"),
    "in a sum": ({"pruning": "l2+fastvv"}, "unknown strategy 'fastvv'. Did you mean 'fastv'?"),
    "parameter": ({"pruning": "atp", "pruning_args": "keep_rato=0.5"}, "Did you mean 'keep_ratio'?"),
    "range": ({"pruning": "atp", "pruning_args": "alpha=2"}, "atp: alpha must be a number in [0, 1], got 2"),
    "ratio": ({"pruning": "l2", "pruning_args": "keep_ratio=0"}, "l2: keep_ratio must be in (0, 1], got 0"),
    "syntax": ({"pruning": "atp", "pruning_args": "alpha"}, "cannot read 'alpha'"),
    "ambiguous": ({"pruning": "l2+fastv", "pruning_args": "keep_tokens=9"}, "say l2.keep_tokens or fastv.keep_tokens"),
    "alone": ({"pruning_args": "alpha=1"}, "--pruning_args needs --pruning"),
    "twice": ({"pruning": "l2", "model_args": f"{TINY},pruning=atp"}, "not both"),
    "none and": ({"pruning": "none+l2"}, "'none' cannot be combined"),
    "carrier": ({"model_args": f"{TINY},pruning=apt"}, "Did you mean 'atp'?"),
    "orphan": ({"model_args": f"{TINY},pruning.alpha=1"}, "pruning.alpha needs pruning=NAME"),
    "no file": ({"pruning": "absent.yaml"}, "pruning file not found: absent.yaml"),
    "file key": ({"pruning": "misspelt.yaml"}, "misspelt.yaml: unknown field 'alhpa'"),
    "file name": ({"pruning": "unnamed.yaml"}, "unnamed.yaml: "),
    "file twice": ({"pruning": "doubled.yaml"}, "twice"),
    "file beside": ({"pruning": "beside.yaml"}, "beside.yaml: "),
    "file text": ({"pruning": "broken.yaml"}, "broken.yaml: not valid YAML"),
    "empty": ({"pruning": ""}, "pruning is empty"),
    "empty arguments": ({"pruning": "l2", "pruning_args": " "}, "pruning_args is empty"),
    "empty in the carrier": ({"model_args": f"{TINY},pruning="}, "pruning is empty"),
    "only a comma": ({"pruning": ","}, "pruning: a name is missing in ','"),
    "two commas": ({"pruning": "l2,,atp"}, "pruning: a name is missing in 'l2,,atp'"),
    "nothing to add": ({"pruning": "l2+"}, "unknown strategy ''. Available: atp"),
    "a strategy twice": ({"pruning": "l2+l2"}, "a strategy is named twice in 'l2+l2'"),
    "only a comma of arguments": ({"pruning": "l2", "pruning_args": ","}, "no pruning argument in ','"),
    "a module without a name": ({"pruning": "l2", "pruning_module": ""}, "pruning_module is empty: say FILE.py"),
    "commas": ({"pruning": "atp,fastv"}, "'atp,fastv': use + to compose (atp+fastv); vtp compare takes commas"),
    "commas inside": ({"model_args": f"{TINY},pruning=atp,fastv"}, "use + to compose (atp+fastv)"),
    "two values": ({"pruning": "l2", "pruning_args": "keep_ratio=0.5,keep_ratio=0.2"}, "keep_ratio=0.5 and keep_ratio"),
    "two spellings": (
        {"pruning": "l2", "pruning_args": "keep-ratio=0.5,keep_ratio=0.2"},
        "keep-ratio=0.5 and keep_rat",
    ),
    "two in the carrier": ({"model_args": f"{TINY},pruning=l2,pruning=atp"}, "pruning=l2 and pruning=atp"),
    "two fields in the carrier": (
        {"model_args": f"{TINY},pruning=l2,pruning.keep-ratio=0.5,pruning.keep_ratio=0.2"},
        "pruning.keep-ratio=0.5 and pruning.keep_ratio=0.2",
    ),
    "flag and carrier": (
        {"pruning": "l2", "pruning_args": "keep_ratio=0.5", "model_args": f"{TINY},pruning.keep_ratio=0.2"},
        "'keep_ratio' is said twice: in --pruning_args and as pruning.keep_ratio in --model_args",
    ),
    "unreadable": ({"model_args": f"{TINY},pruning=l2,pruning.keep_ratio=]"}, "cannot read pruning.keep_ratio=]"),
}
FILES = {
    "misspelt.yaml": "strategy: atp\nalhpa: 0.5",
    "unnamed.yaml": "strategy:\nkeep_ratio: 0.5",
    "doubled.yaml": "strategies: [{strategy: l2, keep_ratio: 0.5}, {strategy: l2, keep_ratio: 0.2}]",
    "beside.yaml": "strategies: [{strategy: l2}]\nkeep_ratio: 0.2",
    "broken.yaml": "strategy: [",
}


@pytest.fixture
def files(workplace: Path) -> Path:
    for name, text in FILES.items():
        (workplace / name).write_text(text)
    return workplace


@pytest.mark.parametrize("source", ["flags", "config"])
@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_one_sentence_before_anything_is_loaded(
    case: str, source: str, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import lmms_eval.models
    from lmms_eval.__main__ import cli_evaluate

    settings, sentence = REFUSED[case]
    settings = {"model": "llava_hf", "model_args": TINY, "tasks": lmms.SCENES, "output_path": "out"} | settings
    arguments = [part for key, value in settings.items() for part in (f"--{key}", value)]
    if source == "config":
        good = run("out", "llava_hf", TINY)
        (files / "runs.yaml").write_text(yaml.safe_dump([good, settings]))
        arguments = ["--config", "runs.yaml"]
    monkeypatch.setattr(sys, "argv", ["lmms-eval", *arguments])
    monkeypatch.setattr(lmms_eval.models, "get_model", lambda *given: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stopped:
        cli_evaluate()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert len(said.strip().splitlines()) == 1
    assert not (files / "out").exists()


WRITTEN = {  # in a --config file
    "no value": ("pruning:", "runs.yaml: pruning is empty"),
    "no arguments": ("pruning: l2\n  pruning_args:", "runs.yaml: pruning_args is empty"),
    "a key twice": ("pruning: l2\n  pruning: atp", "'pruning' is given twice, in line 4 and here, line 5"),
    "a field twice": ("pruning: l2\n  pruning_args: {keep_ratio: 0.5, keep_ratio: 0.2}", "'keep_ratio' is given twice"),
    "two spellings": ("pruning: l2\n  pruning_args: {keep-ratio: 0.5, keep_ratio: 0.2}", "is said twice"),
    "a list": ("pruning: [l2, fastv]", "pruning must be NAME[+NAME...] or FILE.yaml, got ['l2', 'fastv']"),
    "a number": ("pruning: 7", "pruning must be NAME[+NAME...] or FILE.yaml, got 7"),
    "a module that is not there": ("pruning: l2\n  pruning_module: absent.py", "file not found: absent.py"),
    "a module that is none": ("pruning: l2\n  pruning_module: 7", "must be FILE.py or a list of these, got 7"),
    "arguments that are none": ("pruning: l2\n  pruning_args: [1]", "pruning_args must be KEY=VALUE,... or a mapping"),
}


def refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command line says before it loads anything."""
    import lmms_eval.models
    from lmms_eval.__main__ import cli_evaluate

    monkeypatch.setattr(sys, "argv", ["lmms-eval", *arguments])
    monkeypatch.setattr(lmms_eval.models, "get_model", lambda *given: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stopped:
        cli_evaluate()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    return said


TYPED = {  # beside a good --pruning stride
    "another value": (["--pruning", "l2"], "--pruning is given twice with different values: stride and l2"),
    "other arguments": (
        ["--pruning_args", "keep_ratio=0.5", "--pruning-args", "keep_ratio=0.2"],
        "--pruning-args is given twice with different values: keep_ratio=0.5 and keep_ratio=0.2",
    ),
    "below a file": (["--output_path", "broken.yaml/out"], "cannot write into 'broken.yaml/out'"),
    "a comma": (["--output_path", "a,b"], "--output_path a,b: the host cannot read a path with a comma"),
}


@pytest.mark.parametrize("case", TYPED)
def test_options_that_contradict_and_outputs_that_nobody_can_write_are_refused_first(
    case: str, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more, sentence = TYPED[case]
    good = ["--model", "llava_hf", "--model_args", TINY, "--tasks", lmms.SCENES, "--pruning", "stride"]
    assert sentence in refused([*good, *more], monkeypatch, capsys)


@pytest.mark.parametrize("case", WRITTEN)
def test_mistakes_in_a_config_file_are_one_sentence(
    case: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, sentence = WRITTEN[case]
    entry = f"- model: llava_hf\n  model_args: {TINY}\n  tasks: {lmms.SCENES}\n  {text}\n"
    (workplace / "runs.yaml").write_text(entry)
    assert sentence in refused(["--config", "runs.yaml"], monkeypatch, capsys)


def test_a_config_file_that_asks_for_nothing_of_ours_is_the_hosts_alone(tmp_path: Path) -> None:
    from vtp_plugin.hosts.lmms_eval import settings

    path = tmp_path / "runs.yaml"
    path.write_text("model: llava_hf  # no pruning here\nlimit: 1\nlimit: 2\nday: 2026-11-25\n")
    assert [entry["limit"] for entry in settings.entries(path)] == [2]


@pytest.mark.parametrize("model", ["llava", "llava_hf", "vllm"])
@pytest.mark.parametrize(
    ("pruning", "said"),
    [
        ("pruning=fastv,pruning.layer=99", "fastv: layer must be in 1 ... 7 for this model, got 99"),
        ("pruning=atp,pruning.layer=50", "atp: layer must be in -6 ... 5 for this model, got 50"),
        ("pruning=stride,pruning.keep_tokens=145", "stride: keep_tokens must be at most 144, the tokens of an image"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused_before_weights_are_loaded(model: str, pruning: str, said: str) -> None:
    from lmms_eval.utils import simple_parse_args_string

    from vtp_plugin.hosts.lmms_eval import building

    class Host:
        def __init__(self, pretrained: str = "vtp-tiny", model: str = "vtp-tiny", **kwargs: Any) -> None:
            pytest.fail("weights were loaded")

    Host.__name__ = model
    for given in ("", "pretrained=vtp-tiny,model=vtp-tiny,"):
        with pytest.raises(PruningError) as error:
            building.build(Host, simple_parse_args_string(given + pruning))
        assert str(error.value).startswith(said)


@pytest.mark.parametrize("tasks", [[], ["--tasks", ""]])
def test_pruning_without_tasks_is_refused(
    tasks: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "llava_hf", "--model_args", TINY, "--pruning", "l2", *tasks]
    assert "pruning needs --tasks" in refused(arguments, monkeypatch, capsys)


def test_a_pair_that_cannot_work_is_refused_before_a_model_is_built(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With filelock 4 lmms-eval fails behind the building of the model; the sentence says what mends it."""
    from vtp_plugin.hosts import compatibility

    monkeypatch.setattr(compatibility, "_installed", {"filelock": "4.3.1", "lmms-eval": "0.7.3"}.get)
    arguments = ["--model", "llava_hf", "--model_args", TINY, "--tasks", lmms.SCENES, "--pruning", "l2"]
    said = refused(arguments, monkeypatch, capsys)
    assert "filelock 4.3.1 and lmms-eval 0.7.3: " in said
    assert 'pip install "filelock>=3.12,<4"' in said


def test_flags_do_not_leak_into_other_parsers() -> None:
    """Nor does anything else of the command line last longer than its call."""
    import argparse

    import lmms_eval.__main__ as host

    assert host.argparse is argparse
    assert host.cli_evaluate_single.__module__ == "lmms_eval.__main__"
    assert not hasattr(host.cli_evaluate_single, "__wrapped__")

    parser = argparse.ArgumentParser()
    parser.add_argument("--model_args")
    with pytest.raises(SystemExit):
        parser.parse_args(["--pruning", "atp"])


@pytest.mark.slow
def test_failed_runs_end_with_their_reason_and_without_results(tmp_path: Path) -> None:
    """Noise, of which V-PRUNE cuts nothing; a CLIP that is not there; and between them a run that is all right."""
    lmms.write_tasks(tmp_path, flat=False)
    pope = {"tasks": "pope", "limit": 1, "gen_kwargs": "max_new_tokens=2"}
    strict = {"cosine_threshold": 1, "chi2_threshold": 0}
    runs = [
        run("nothing", "llava", TINY, pruning="vprune", pruning_args=strict, **pope),
        run("right", "llava_hf", TINY, pruning="l2", **pope),
        run("no_clip", "llava_hf", TINY, pruning="atp", pruning_args="clip=/no/such/clip", **pope),
    ]
    process = lmms.call_runs(tmp_path, runs)
    assert process.returncode not in (0, None)
    assert "vprune: 1 images went in and not one token was cut" in process.stderr
    assert "cannot load the CLIP text tower from '/no/such/clip'" in process.stderr
    assert lmms.results(tmp_path / "nothing") == lmms.results(tmp_path / "no_clip") == []
    assert len(lmms.results(tmp_path / "right")) == 1


@pytest.fixture
def broken() -> Iterator[None]:
    """Two registered strategies: one raises while it selects, the other names a layer that is not there."""

    class Broken(PruningStrategy):
        name, paper, stage = "broken", "none", Stage.PROJECTOR

        def select(self, visual: VisualTokens) -> Selection:
            raise RuntimeError("the selector tripped")

    def register_strategies(register: Any) -> None:
        register(Broken)

    plugin = SimpleNamespace(vtp_register_strategies=hook(register_strategies))
    plugins.manager().register(plugin, name="broken")
    plugins.strategies.cache_clear()
    yield
    plugins.manager().unregister(plugin)
    plugins.strategies.cache_clear()


def hook(function: Any) -> Any:
    from vtp_plugin.hookspecs import hookimpl

    return hookimpl(function)


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("model", ["llava", "llava_hf"])
def test_an_error_that_the_host_swallows_fails_the_run(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    from lmms_eval import evaluator

    untouched = evaluator.evaluate
    with pytest.raises((PruningError, RuntimeError), match="the selector tripped"):
        lmms.evaluate(model, f"{TINY},pruning=broken", limit=2)
    assert evaluator.evaluate is untouched


def test_a_failed_construction_leaves_the_host_as_it_was() -> None:
    from lmms_eval import evaluator

    untouched = evaluator.evaluate
    with pytest.raises(PruningError, match="/no/such/clip"):
        lmms.evaluate("llava", f"{TINY},pruning=atp,pruning.clip=/no/such/clip", limit=1)
    assert evaluator.evaluate is untouched
    with pytest.raises(Exception, match="no_such_task"):
        lmms.evaluate("llava_hf", f"{TINY},pruning=l2", tasks="no_such_task", limit=1)
    assert "pruning" not in lmms.evaluate("llava_hf", TINY, limit=1)


def test_the_embedded_model_of_another_class_is_refused() -> None:
    with pytest.raises(PruningError, match="vtp-tiny"):
        lmms.evaluate("qwen2_vl", TINY, limit=1)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model": "llavva"}, "unknown model 'llavva'. Did you mean 'llava'?"),
        ({"tasks": "popee"}, "unknown task 'popee'. Nearest: pope"),
    ],
)
def test_names_that_the_host_lacks_begin_no_sweep(tmp_path: Path, options: dict[str, str], sentence: str) -> None:
    from sweeps import Folder

    folder = Folder(tmp_path)
    with pytest.raises(PruningError, match=re.escape(sentence)):
        folder.run(**options)
    assert not [path for path in folder.run_dir.rglob("*") if path.name != ".lock"]


# -- the files in plugin_configs --------------------------------------------------------------------------------------

RUNS = sorted((ROOT / "plugin_configs" / "runs").glob("*.yaml"))


@pytest.mark.parametrize("file", RUNS, ids=[file.name for file in RUNS])
def test_run_files_parse_and_resolve(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the host reads them: known keys, known tasks and models, strategies that exist."""
    from lmms_eval.__main__ import parse_eval_args
    from lmms_eval.models import MODEL_REGISTRY_V2

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lmms-eval", "--config", str(file)])
    parser, _ = parse_eval_args()
    known, tasks = {action.dest for action in parser._actions}, lmms.task_manager().all_tasks
    entries = yaml.safe_load(file.read_text())
    for entry in entries if isinstance(entries, list) else [entries]:
        assert set(entry) <= known
        assert set(entry["tasks"].split(",")) <= set(tasks)
        MODEL_REGISTRY_V2.resolve(entry["model"])
        arguments = entry.get("pruning_args", {})
        config.resolve(entry["pruning"], config.parse_pairs(arguments) if isinstance(arguments, str) else arguments)


def test_there_are_run_files() -> None:
    assert {"llava_pope_atp.yaml", "llava_hf_pope_gqa_vprune_fastv.yaml", "tiny_demo.yaml"} <= {f.name for f in RUNS}
