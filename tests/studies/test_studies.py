"""The studies: each runs on a handful of samples, its record has the schema, its tables say what the record says."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import fake_host
import numpy as np
import pytest
import runfolder
import yaml
from matrix import dear
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("lmms_eval")
pytest.importorskip("skimage")

from commands import ended
from paths import ROOT

from vtp_plugin.cli.study import command
from vtp_plugin.errors import PruningError
from vtp_plugin.studies import poster_l2
from vtp_plugin.studies.evaluated import interval
from vtp_plugin.studies.study import CONFIGS, SCHEMA, Study, conduct, settings_of, some, studies

SMALL = {
    "atp-efficiency": {
        "tasks": "vtp_scenes_position,vtp_scenes_caption",
        "grid": {"positions": "original", "alpha": [0.5], "keep": [0.4], "relevance_sign": [1, -1]},
    },
    "atp-robustness": {"tasks": "vtp_scenes_position", "perturbations": ["blur:3", "paraphrase"], "pruning": ["atp"]},
    "vprune-main": {"tasks": "vtp_scenes_position", "rivals": ["visionzip", "random"]},
    "vprune-design": {
        "tasks": "vtp_scenes_position",
        "group": [2],
        "chi2_threshold": [20],
        "cosine_threshold": [0.8],
        "processors": ["vtp-tiny"],
        "readings": {},
        "targets": {"POPE": {"20": 0.05}, "impossible": {"20": 0.74}},
        "photographic": ["POPE", "impossible"],
    },
    "hard-samples": {"tasks": "vtp_scenes_position,vtp_scenes_count", "pruning": ["random"]},
}


@pytest.fixture
def console() -> Console:
    return Console(quiet=True)


def read(folder: Path) -> dict:
    return json.loads((folder / "record.json").read_text())


def test_every_study_has_its_yaml_and_its_place_in_the_docs() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(studies())
    page = (ROOT / "docs" / "studies.md").read_text()
    for name in studies():
        assert f"<!-- study {name} -->" in page
        assert f"vtp study {name}" in page


REAL = dear(SMALL, ["hard-samples"])  # through lmms-eval itself


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In place of lmms-eval a script that answers at once."""
    from vtp_plugin.compare import sweep

    launch = f"{sys.executable} {Path(fake_host.__file__)}"
    quick = partial(sweep.run, launch=launch, environment={"FAKE_LOG": str(tmp_path / "started.txt")})
    monkeypatch.setattr(sweep, "run", quick)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_study_on_a_handful_of_samples(
    name: str, tmp_path: Path, console: Console, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("waiting_host" if name in REAL else "stand_in")
    said = {"limit": 3, **SMALL[name]}
    if name == "vprune-design":
        said["pictures"] = str(some_pictures(tmp_path / "images", 16))
    path = conduct(name, said, tmp_path / "study", console)
    record = read(path.parent)
    assert (record["schema"], record["study"]) == (SCHEMA, name)
    assert record["settings"] | said == record["settings"]
    assert record["source"]
    assert record["versions"]["lmms-eval"]
    assert {"vtp-plugin", "torch", "transformers"} <= set(record["versions"])
    assert list(path.parent.glob("*.png"))
    CHECKS[name](record["results"], (path.parent / "table.md").read_text())


def some_pictures(folder: Path, count: int) -> Path:
    """So many of the embedded scenes, enough to calibrate on."""
    folder.mkdir()
    for number, picture in enumerate(poster_l2.embedded(count)[1]):
        picture.save(folder / f"{number}.png")
    return folder


def check_efficiency(results: dict, table: str) -> None:
    cells = {cell["id"]: cell for cell in results["cells"]}
    assert set(cells) == {
        "none",
        *(f"{name}-0.6-{positions}" for name in ("atp", "random") for positions in ("original", "compact")),
        "atp-0.4-alpha0.5-plus",
        "atp-0.4-alpha0.5-minus",
        "random-0.4",
    }
    assert cells["atp-0.6-compact"]["tokens"] == {"before": 144, "after": round(0.6 * 144)}
    ratio = cells["atp-0.6-original"]["flops_ratio"]
    assert cells["none"]["flops_ratio"] == 1 > ratio > cells["random-0.4"]["flops_ratio"]
    for cell in cells.values():
        assert cell["mean"] == pytest.approx(sum(cell["accuracy"].values()) / 2)
        assert cell["difference"]["value"] == pytest.approx(cell["mean"] - cells["none"]["mean"])
        assert f"{100 * cell['mean']:.1f}" in table


def check_robustness(results: dict, table: str) -> None:
    means = {cell["id"]: cell["mean"] for cell in results["cells"]}
    assert len(results["effects"]) == 2
    for effect in results["effects"]:
        id = effect["perturbation"].replace(":", "")
        drops = means[f"atp-{id}"] - means["atp"], means[f"none-{id}"] - means["none"]
        assert effect["drop"]["pruned"]["value"] == pytest.approx(drops[0])
        assert effect["added_by_pruning"]["value"] == pytest.approx(drops[0] - drops[1])
        assert effect["better"]["value"] == pytest.approx(means[f"atp-{id}"] - means[f"none-{id}"])


def check_main(results: dict, table: str) -> None:
    found = {entry["method"]: entry for entry in results["entries"]}
    assert set(found) == {"none", "vprune", "visionzip", "random"}
    assert found["none"]["removed"] == 0
    for rival in ("visionzip", "random"):
        assert found[rival]["removed"] == pytest.approx(found["vprune"]["removed"], abs=1 / 144)
    assert "AesBench" in table


def check_design(results: dict, table: str) -> None:
    (removed,) = results["removed"].values()
    assert removed > 0
    chance = next(cell for cell in results["random"] if cell["id"] != "none")
    assert 1 - chance["tokens"]["after"] / 144 == pytest.approx(removed, abs=1 / 144)
    fitted, beyond = results["calibration"]
    assert fitted["removed"]["20"] == pytest.approx(0.05, abs=0.02)
    assert fitted["remark"] == ""
    assert "at most" in beyond["remark"]
    assert beyond["cosine_threshold"] == 0
    assert "74.0% asked" in table
    reading = results["photographs"]["processors"]["vtp-tiny"]["readings"]["ours"]["20"]
    assert reading["all"]["mean"] == pytest.approx(reading["picture"]["mean"])  # the scenes are square
    assert f"{100 * reading['all']['mean']:.1f}" in table


def check_hard(results: dict, table: str) -> None:
    sizes = {name: group["none"]["questions"] for name, group in results["groups"].items()}
    assert sizes["all"] == sizes["easy"] + sizes["hard"] == 6
    assert (sizes["counting"], sizes["position"]) == (3, 3)
    assert results["groups"]["hard"]["downsample"]["accuracy"] in (None, 0)
    assert results["groups"]["easy"]["downsample"]["accuracy"] in (None, 1)


CHECKS = {
    "atp-efficiency": check_efficiency,
    "atp-robustness": check_robustness,
    "vprune-main": check_main,
    "vprune-design": check_design,
    "hard-samples": check_hard,
}
FAST = {"shapes": ["clip-vit-small"], "speed_keep": [0.5], "rounds": 1, "keep": [0.5], "limit": 8, "seeds": 2}


def test_the_poster_s_decisions(tmp_path: Path, console: Console) -> None:
    results = read(conduct("poster-l2", FAST, tmp_path / "study", console).parent)["results"]
    rows = {(row["method"], row["seed"]): row for row in results["decisions"]}
    assert set(rows) == {
        ("unpruned", None),
        ("l2", None),
        ("bottom", None),
        ("stride", None),
        ("random", 0),
        ("random", 1),
    }
    assert rows["unpruned", None]["same_decision"] == 1
    (speed,) = results["speed"]
    assert speed["images_per_second"]["pruned"] == pytest.approx(8 / speed["seconds"]["pruned"])
    assert rows["unpruned", None]["cosine"] == pytest.approx(1, abs=1e-5)
    assert rows["l2", None]["cosine"] > rows["bottom", None]["cosine"]
    assert {path.name for path in (tmp_path / "study").glob("*.png")} == {"decisions.png", "kept.png"}


def test_a_study_goes_on_where_it_was_interrupted(tmp_path: Path, console: Console, monkeypatch) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(poster_l2.PosterL2, "tables", stop)
        with pytest.raises(KeyboardInterrupt):
            conduct("poster-l2", FAST, tmp_path / "study", console)
    monkeypatch.setattr(poster_l2.PosterL2, "_decisions", stop)  # would raise if it were asked again
    assert read(conduct("poster-l2", FAST, tmp_path / "study", console).parent)["results"]["decisions"]


def test_a_folder_of_pictures_with_class_names(tmp_path: Path, console: Console) -> None:
    names, pictures, labels = poster_l2.embedded(6)
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        folder = tmp_path / "images" / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{number}.png")
    said = {**FAST, "images": str(tmp_path / "images"), "limit": -1}
    record = read(conduct("poster-l2", said, tmp_path / "study", console).parent)
    assert record["results"]["pictures"] == 6
    assert record["results"]["class_names"] == sorted({names[label] for label in labels})


def refused(name: str, said: dict, folder: Path, sentence: str) -> None:
    with pytest.raises(PruningError, match=sentence):
        conduct(name, said, folder, Console(quiet=True))
    assert not folder.exists()


def test_bad_input_is_refused_before_the_work_starts(tmp_path: Path) -> None:
    out = tmp_path / "study"
    refused("poster-12", {}, out, "Did you mean 'poster-l2'")
    refused("poster-l2", {"tasks": "pope"}, out, "no setting 'tasks'")
    refused("poster-l2", {**FAST, "images": str(tmp_path / "none")}, out, "not a folder")
    (tmp_path / "images" / "cat").mkdir(parents=True)
    refused("poster-l2", {**FAST, "images": str(tmp_path / "images")}, out, "no pictures")
    Image.new("RGB", (32, 32)).save(tmp_path / "images" / "cat" / "1.png")
    refused("poster-l2", {**FAST, "images": str(tmp_path / "images"), "classes": "cat,dog"}, out, "do not match: dog")
    refused("poster-l2", {**FAST, "model": str(tmp_path)}, out, "cannot load an encoder")
    refused("poster-l2", {**FAST, "shapes": ["clip-vit-l-15"]}, out, "Did you mean 'clip-vit-l-14'")
    refused("poster-l2", {**FAST, "shapes": ["llava-1.5-7b"]}, out, "no encoder")
    refused("atp-robustness", {"perturbations": ["fog:1"]}, out, "unknown perturbation 'fog'")
    refused("atp-efficiency", {"keep": 2}, out, "keep_ratio must be in")
    refused("hard-samples", {"limit": 0}, out, "limit must be")


NONSENSE = [
    (0, "limit"),
    (-2, "limit"),
    (10**6, "limit"),
    ("many", "limit must be a number"),
    (True, "limit"),
    (1.5, "limit"),
]


@pytest.mark.parametrize("name", sorted(studies()))
@pytest.mark.parametrize(("limit", "sentence"), NONSENSE)
def test_a_limit_that_means_nothing_is_refused(name: str, limit: object, sentence: str, tmp_path: Path) -> None:
    if name == "l2-lora":
        pytest.importorskip("peft")
    refused(name, {"limit": limit}, tmp_path / "study", sentence)


@pytest.mark.parametrize(
    ("name", "said", "sentence"),
    [
        ("poster-l2", {"rounds": 0}, "rounds must be a whole number, at least 1"),
        ("poster-l2", {"seeds": 0}, "seeds must be a whole number"),
        ("poster-l2", {"keep": [1]}, "keep needs a ratio below 1"),
        ("poster-l2", {"speed_keep": [0]}, r"speed_keep must be keep ratios in \(0, 1\]"),
        ("poster-l2", {"keep": []}, "keep must be keep ratios"),
        ("hard-samples", {"batch_size": 0}, "batch_size must be a whole number, at least 1"),
        ("l2-lora", {"keep": 1}, "keep must be a ratio between 0 and 1"),
        ("l2-lora", {"rate": 0}, "rate must be above 0"),
        ("l2-lora", {"pruning": []}, "pruning names no method"),
        ("l2-lora", {"pruning": ["l3"]}, "unknown method 'l3'"),
        ("l2-lora", {"epochs": 0.5}, "epochs must be a whole number"),
    ],
    ids=str,
)
def test_other_numbers_that_mean_nothing(name: str, said: dict, sentence: str, tmp_path: Path) -> None:
    refused(name, said, tmp_path / "study", sentence)


def test_jobs_are_counted_from_one(tmp_path: Path) -> None:
    with pytest.raises(PruningError, match="jobs must be at least 1"):
        conduct("hard-samples", {}, tmp_path / "study", Console(quiet=True), jobs=0)
    assert not (tmp_path / "study").exists()


def test_a_limit_is_what_is_asked_and_spread_evenly() -> None:
    assert some(range(300), 200, "limit")[:4] == [0, 1, 3, 4]
    assert [len(some(range(300), n, "limit")) for n in (1, 8, 200, 299, 300, -1)] == [1, 8, 200, 299, 300, 300]


def test_an_encoder_without_a_text_tower_is_refused(tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=28, patch_size=14)).save_pretrained(tmp_path / "clip")
    CLIPImageProcessor().save_pretrained(tmp_path / "clip")
    refused("poster-l2", {**FAST, "model": str(tmp_path / "clip")}, tmp_path / "study", "text tower|cannot load")


def test_two_settings_never_share_a_folder(tmp_path: Path, console: Console) -> None:
    conduct("poster-l2", FAST, tmp_path / "study", console)
    with pytest.raises(PruningError, match="other settings"):
        conduct("poster-l2", FAST | {"limit": 9}, tmp_path / "study", console)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(PruningError, match="not empty"):
        conduct("poster-l2", FAST, tmp_path / "other", console)


def test_where_nothing_was_measured_other_settings_may_take_the_folder(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that is finished, or a cell with results, is never given up."""
    out = tmp_path / "study"

    def stopped(self: Study) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(poster_l2.PosterL2, "measure", stopped)
        for limit in (9, 8):
            with pytest.raises(KeyboardInterrupt):
                conduct("poster-l2", FAST | {"limit": limit}, out, console)
    ended = {"schema": 1, **runfolder.entry("none"), "status": "failed", "error": "no such model", "command": []}
    runfolder.write(out / "runs", {"none": ["yes"]}, ["yes"])
    cell = out / "runs" / "cells" / "none" / "cell.json"
    cell.write_text(json.dumps(ended))
    with monkeypatch.context() as patch:
        patch.setattr(poster_l2.PosterL2, "measure", stopped)
        with pytest.raises(KeyboardInterrupt):
            conduct("poster-l2", FAST | {"limit": 7}, out, console)
    cell.write_text(json.dumps(ended | {"status": "done", "error": None}))
    with pytest.raises(PruningError, match="other settings"):
        conduct("poster-l2", FAST, out, console)
    assert yaml.safe_load((out / "settings.yaml").read_text())["settings"]["limit"] == 7


def test_the_interval_is_the_bootstrap_s() -> None:
    rng = np.random.default_rng(1)
    parts = [rng.integers(-1, 2, 40).astype(float), rng.integers(0, 2, 60).astype(float)]
    found = interval(parts)
    drawn = [np.mean([rng.choice(part, len(part)).mean() for part in parts]) for _ in range(4000)]
    assert found["value"] == pytest.approx(np.mean([part.mean() for part in parts]))
    assert (found["low"], found["high"]) == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=0.02)
    assert interval([np.ones(5)]) == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_settings_can_be_said_on_the_command_line() -> None:
    assert settings_of("hard-samples", {"keep": 0.5})["keep"] == 0.5
    with pytest.raises(PruningError, match="no setting 'ratio'"):
        settings_of("hard-samples", {"ratio": 0.5})


def test_without_a_name_the_command_lists_the_studies() -> None:
    import typer

    app = typer.Typer()
    app.command()(command)
    said = CliRunner().invoke(app, [], env={"COLUMNS": "200"}).output
    assert all(name in said for name in studies())


def test_a_stop_from_the_keyboard_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(self: Study) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(poster_l2.PosterL2, "measure", stopped)
    said = ended("study", "poster-l2", "-o", tmp_path / "study")
    assert said.returncode == 130
    assert f"kept in {tmp_path / 'study'}: the same command goes on" in said.stderr


def test_the_command_says_where_the_record_is(tmp_path: Path) -> None:
    import typer

    app = typer.Typer()
    app.command()(command)
    settings = [f"--set={key}={yaml.safe_dump(value, default_flow_style=True).strip()}" for key, value in FAST.items()]
    settings = [s.replace("\n...", "") for s in settings]
    ran = CliRunner().invoke(app, ["poster-l2", *settings, "-o", str(tmp_path / "study")])
    assert ran.exit_code == 0, ran.output
    assert "Zero-shot decisions" in ran.output
    assert read(tmp_path / "study")["settings"]["limit"] == 8


RECORDS = sorted((ROOT / "docs" / "results" / "studies").glob("*/record.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.parent.name)
def test_a_committed_table_is_what_its_record_says(path: Path) -> None:
    record = json.loads(path.read_text())
    study = studies()[record["study"]](record["settings"], path.parent)
    made = "\n\n".join(table.markdown() for table in study.tables(record["results"])) + "\n"
    assert (path.parent / "table.md").read_text() == made
