"""The program `vtp`, as a user types it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import ended, program, vtp
from paths import ROOT
from PIL import Image
from rich.text import Text

from vtp_plugin import config, plugins
from vtp_plugin.cli import app, doctor, vtp_register_commands
from vtp_plugin.errors import Failed
from vtp_plugin.hosts.vllm import serving, throughput
from vtp_plugin.reporting import readme
from vtp_plugin.version import __version__

vtp_register_commands(cli=app)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    noise = np.random.default_rng(0).integers(0, 255, (200, 260, 3), dtype=np.uint8)
    noise[:, :130] = 90  # half of it is flat
    Image.fromarray(noise).save(path)
    return path


def test_list_names_every_strategy_and_family() -> None:
    shown = vtp("list")
    assert all(name in shown for name in plugins.list_strategies())
    models = vtp("list", "--models")
    assert all(cls.family in models for cls in plugins.adapters())
    assert vtp("list", "--markdown").count("\n| ") == len(plugins.list_strategies()) + 1


def test_show_draws_every_panel(picture: Path, tmp_path: Path) -> None:
    target = tmp_path / "kept.png"
    said = vtp("show", picture, "--question", "is there a circle", "--pruning", "atp,l2+fastv", "-o", target)
    assert "atp 0.6: 144 -> 86 visual tokens per image, prefill FLOPs 0." in said
    assert "l2 0.5 + fastv 0.5: 144 -> 36 visual tokens per image" in said
    assert said.count("1 of 1 samples pruned\nanswer: ") == 2
    assert Image.open(target).width > 400


def test_calibration_reaches_the_share_and_its_yaml_is_usable(picture: Path, tmp_path: Path) -> None:
    target = tmp_path / "vprune.yaml"
    said = vtp(
        "calibrate", "vprune", picture, "--target", 0.3, "--processor", "llava-1.5-hf", "--size", 168, "-o", target
    )
    setting = yaml.safe_load(target.read_text())
    assert setting["strategy"] == "vprune"
    share = float(said.split("removes ")[1].split("%")[0])
    assert share == pytest.approx(30, abs=1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["show", "nowhere.png", "--question", "x"], "picture not found: nowhere.png"),
        (["show", __file__, "--question", "x"], "not a picture that can be read"),
        (["show", "nowhere.png", "--question", "x", "--pruning", "visonzip"], "Did you mean 'visionzip'?"),
        (
            ["show", "nowhere.png", "--question", "x", "--pruning", "l2", "--pruning=atp"],
            "--pruning is given twice with",
        ),
        (["show", "nowhere.png", "--question", "x", "-o", "a.png", "--output=b.png"], "values: a.png and b.png"),
        (["compare", "--model_args", "a=1", "--model_args=a=2", "-o", "x"], "--model-args is given twice with"),
        (["compare", "--model-args", "a=1", "--model_args", "a=2", "-o", "x"], "different values: a=1 and a=2"),
        (["calibrate", "fitprune", ROOT / "docs/results/demo/kept.png", "--model", "vtp-tny"], "you mean 'vtp-tiny'?"),
        (["show", __file__, "--question", "x", "-o", "a.txt"], "its name must end in .png"),
        (["calibrate", "vprune", "nowhere", "--target", "0.2"], "not found: nowhere"),
        (["calibrate", "vprune", ".", "--target", "2"], "--target must be a share between 0 and 1"),
        (["calibrate", "vprune", __file__, "--target", "0.2", "--processor", "lava-1.5"], "Did you mean 'llava-1.5'?"),
        (
            ["calibrate", "vprune", __file__, "--target", "0.2", "--processor", "qwen2.5-vl", "--size", "99"],
            "one square",
        ),
        (["study", "hard-samples", "--limit", "many"], "Invalid value for '--limit': Input should be a valid integer"),
        (["study", "hard-sample"], "Did you mean 'hard-samples'?"),
        (["studies"], "No such command 'studies'"),
        (["demo", "--keep-ratio", "7"], "--keep-ratio must be in (0, 1], got 7"),
        (["demo", "--pruning", "fastvv"], "Did you mean 'fastv'?"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], sentence: str) -> None:
    result = ended(*arguments)
    assert result.returncode == 2
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1


LISTS = {  # options that take several: a place between commas that is empty is a mistake
    "bench --pruning {}": "--pruning: a name is missing in",
    "demo --pruning {}": "--pruning: a name is missing in",
    "show nowhere.png --question x --pruning {}": "--pruning: a name is missing in",
    "tune --max-drop 1% --tasks pope -o x --pruning {}": "--pruning: a name is missing in",
    "tune --max-drop 1% --pruning l2 -o x --tasks {}": "--tasks: a name is missing in",
    "compare --model llava --model-args a=1 --tasks pope -o x --pruning {}": "pruning: a name is missing in",
    "compare --model llava --model-args a=1 --pruning l2 -o x --tasks {}": "tasks: a name is missing in",
    "compare --model llava --model-args a=1 --tasks pope --pruning l2 -o x --keep {}": "keep must be ratios",
    "study hard-samples -o x --tasks {}": "hard-samples: tasks: a name is missing in",
    "reproduce llava-1.5-7b --dry-run --pruning {}": "--pruning: a name is missing in",
    "reproduce llava-1.5-7b --dry-run --tokens {}": "--tokens: a name is missing in",
    "reproduce llava-1.5-7b --dry-run --tasks {}": "--tasks: a name is missing in",
    "reproduce llava-1.5-7b --dry-run --source {}": "--source: a name is missing in",
    "serve-bench --pruning {}": "--pruning: a name is missing in",
    "serve-bench --keep {}": "--keep must be numbers",
    "serve-bench --concurrency {}": "--concurrency must be numbers",
    "bench --keep {}": "--keep must be numbers",
    "bench --batch {}": "--batch must be numbers",
    "plan --rate {}": "--rate must be numbers",
    "plan --rate 1 --cards {}": "--cards must be numbers",
}


@pytest.mark.parametrize("line", LISTS)
def test_an_empty_place_in_a_list_is_refused(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for said in (",", "a,,b", "a,"):
        result = ended(*line.format(said).split())
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
        assert LISTS[line] in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", [*LISTS, "bench --shape {}", "bench --pruning-args {}", "demo -o {}", "list {}"])
def test_an_option_without_text_is_no_wish_for_the_default(line: str) -> None:
    """As `--pruning "$UNSET"` says it."""
    name = line.split()[-2] if "-" in line.split()[-2] else "an argument"
    for said in ("", " "):
        result = ended(*[part.format(said) for part in line.split()])
        assert (result.returncode, result.stderr) == (
            2,
            f"vtp: error: {name} is empty: give it a value, or leave it out\n",
        )
    if name.startswith("--"):
        assert f"{name} is empty" in ended(*line.split()[:-2], f"{name}=").stderr


def test_what_is_named_twice_counts_once() -> None:
    lines = vtp("reproduce", "llava-1.5-7b", "--pruning", "fastv,fastv", "--tokens", "64, 64", "--dry-run")
    assert lines == vtp("reproduce", "llava-1.5-7b", "--pruning", "fastv", "--tokens", "64", "--dry-run")
    assert config.parse_numbers("0.5,.50,0.25", float, "--keep") == [0.5, 0.25]


def test_an_empty_folder_and_an_unreachable_share_are_refused(tmp_path: Path, picture: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no pictures" in ended("calibrate", "vprune", empty, "--target", 0.2).stderr
    assert "at most" in ended("calibrate", "vprune", picture, "--target", 0.74).stderr


def test_a_target_that_cannot_be_met_says_what_limits_it(picture: Path) -> None:
    crop = ("--processor", "llava-1.5-hf", "--size", 168)
    flat = ended("calibrate", "vprune", picture, "--target", 0.02, *crop)
    assert flat.returncode == 2
    assert "vprune: at least " in flat.stderr
    assert "2.0% asked" in flat.stderr
    assert "no other number lets it" in flat.stderr
    noisy = ended("calibrate", "vprune", picture, "--target", 0.7, *crop)
    assert noisy.returncode == 2
    assert "it is limited by chi2_threshold=5 (" in noisy.stderr


def test_calibration_prepares_as_the_processor_that_is_named(picture: Path) -> None:
    """The same share asks for the padding first where there is any; a wide picture has tiles, or its own size."""
    shares = {}
    for name in ("llava-1.5", "llava-1.5-hf", "llava-1.6", "qwen2.5-vl", "vtp-tiny"):
        said = vtp("calibrate", "vprune", picture, "--target", 0.4, "--processor", name)
        assert f"prepared as {name} (asked: 40.0%)" in said
        shares[name] = float(said.split("removes ")[1].split("%")[0])
    assert shares["llava-1.5"] == pytest.approx(40, abs=1)
    assert shares["llava-1.5-hf"] < 39  # without the padding there is not as much to drop


def test_text_is_printed_as_it_is() -> None:
    result = program("show", "[/red] :smile: \x1b[31m.png", "--question", "x")
    assert result.stderr == "vtp: error: picture not found: [/red] :smile: \\x1b[31m.png\n"
    assert ended("--version").stdout == f"vtp-plugin {__version__}\n"


def test_the_packages_of_doctor_stand_in_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are not installed, whose words are coloured, too."""
    there = {"python": "3.11.7", "torch": "2.14.1"}
    monkeypatch.setattr(doctor, "versions", lambda: there)
    lines = [Text.from_markup(line).plain for line in doctor._packages()]
    assert any("not installed" in line for line in lines)
    assert len({line.index("tested:") for line in lines if "tested:" in line}) == 1


def test_the_log_of_a_server_that_failed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(model: str, settings: object, options: object, load: object, log: Path) -> None:
        log.write_text("the whole story")
        raise Failed(f"the server did not start (log: {log})")

    monkeypatch.setattr(throughput, "measure", failing)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    said = ended("serve-bench", "--model", "a/model")
    assert said.returncode == 1
    assert Path(said.stderr.split("log: ")[1].rstrip(")\n")).read_text() == "the whole story"
    monkeypatch.setattr(throughput, "measure", lambda *given: [])
    assert ended("serve-bench", "--model", "a/model").returncode == 0
    assert len(list(tmp_path.iterdir())) == 1  # that of the one that failed


def test_what_was_measured_outlives_a_later_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = ("prompt_tokens", "requests_per_second", "first_token_seconds", "end_seconds")

    def measured(model: str, settings: dict | None, options: object, load: object, log: Path) -> list[dict]:
        if settings is not None:
            raise Failed("the server did not start")
        return [{"pruning": settings, "concurrency": 1, **dict.fromkeys(numbers, 3.0)}]

    monkeypatch.setattr(throughput, "measure", measured)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    said = ended("serve-bench", "--model", "a/model", "--concurrency", 1, "-o", tmp_path / "served.json")
    assert said.returncode == 1
    assert [line["pruning"] for line in json.loads((tmp_path / "served.json").read_text())["lines"]] == [None]
    assert "3000 ms" in said.stdout


def test_a_server_of_a_host_that_is_not_there_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    said = ended("serve-bench", "--model", "a/model")
    assert (said.returncode, said.stderr) == (1, "vtp: error: the package 'vllm' is not installed, and this needs it\n")
    assert not list(tmp_path.iterdir())


def test_help_has_a_short_name() -> None:
    assert ended("plan", "-h").stdout == ended("plan", "--help").stdout != ""


def test_a_server_says_what_it_failed_of() -> None:
    """The last line, unless that points at an error above; what a warning quotes is none."""
    quoted = "(APIServer pid=7) WARNING 11-27 [utils.py:255] errors like `OSError: [Errno 24] Too many files`"
    first = "(Worker pid=9) ERROR 11-27 [executor.py:953] ValueError: not enough memory"
    last = "RuntimeError: Engine core initialization failed. See root cause above."
    assert serving.cause("\n".join([quoted, first, last])) == "ValueError: not enough memory"
    assert serving.cause("\n".join([first, "vllm: error: unknown strategy 'apt'", ""])).endswith("strategy 'apt'")
    assert serving.cause("") == "no output"
    assert serving.cause(last) == last


@pytest.mark.slow
@pytest.mark.usefixtures("waiting_host")
def test_demo_ends_with_a_table_and_a_picture(tmp_path: Path) -> None:
    said = vtp("demo", "--limit", 2, "--pruning", "l2,random", "-o", tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "36/144" in table
    assert "unpruned" in said
    assert Image.open(tmp_path / "kept.png").width > 400
    results = tmp_path / "cells" / "l2-0.25" / "results.json"
    assert json.loads(results.read_text())["pruning"]["visual_tokens"]["mean_after"] == 36


@pytest.mark.parametrize("page", readme.PAGES, ids=str)
def test_a_generated_page_is_up_to_date(page: Path) -> None:
    text = page.read_text()
    assert readme.filled(text) == text, "run `make readme`"
