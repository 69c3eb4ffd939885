"""The pages: links lead somewhere, commands exist with their options, the first screen runs as it stands."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import warm
import yaml
from commands import vtp
from paths import ROOT
from typer.main import get_command

from vtp_plugin import config
from vtp_plugin.cli import app
from vtp_plugin.config import parse_pairs
from vtp_plugin.reporting import readme

TOP = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")
PAGES = sorted([*(ROOT / name for name in TOP), *(ROOT / "docs").rglob("*.md")])
NAMED = [str(page.relative_to(ROOT)) for page in PAGES]
PLACEHOLDER = re.compile(r"\b(IMAGE|IMAGES|RUN_DIR|FOLDER|NAME|TEXT|PATH|CKPT|COCO)\b|\.\.\.")
SMALL = 2  # questions per task


def code(text: str, language: str = "") -> list[str]:
    """What stands between fences of this language."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in blocks if name == language]


def lines(text: str, program: str) -> list[str]:
    """Command lines of a program in a page, those over several lines in one, without comments."""
    blocks = [block for language in ("", "bash", "sh") for block in code(text, language)]
    joined = "\n".join(blocks).replace("\\\n", " ")
    joined = re.sub(r"\n    +(?=-)", " ", joined)
    found = [re.split(r"\s{2,}(?=[a-zA-Z#])|\s#", line)[0].strip() for line in joined.splitlines()]
    return [line for line in found if line.startswith(f"{program} ")]


# -- links ------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=NAMED)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{link} leads nowhere"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{link}: no such heading"


# -- commands ---------------------------------------------------------------------------------------------------------

COMMANDS = [(name, line) for page, name in zip(PAGES, NAMED, strict=True) for line in lines(page.read_text(), "vtp")]
TABLED = [
    ("README.md", each) for each in re.findall(r"^\| `(vtp [^`]*)`", (ROOT / "README.md").read_text(), re.MULTILINE)
]
HOSTED = [
    (name, line) for page, name in zip(PAGES, NAMED, strict=True) for line in lines(page.read_text(), "lmms-eval")
]


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) > 15
    assert len(TABLED) > 8
    assert len(HOSTED) > 4


@pytest.mark.parametrize(("page", "line"), [*COMMANDS, *TABLED], ids=lambda value: str(value)[:60])
def test_a_command_of_a_page_is_one_of_the_program(page: str, line: str) -> None:
    line = re.sub(r"\[([^\]]*)\]", r"\1", line).replace(" ...", "")
    words = shlex.split(line)[1:]
    root = get_command(app)
    if words[0].startswith("--"):
        assert words[0] in {option for parameter in root.params for option in parameter.opts}
        return
    command = root.commands[words[0]]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    asked = [word.partition("=")[0] for word in words[1:] if re.match(r"--?[a-z]", word)]
    asked = [word.replace("_", "-") for word in asked]  # both spellings are read
    assert set(asked) <= known | {"--module"}, f"{page}: {line}"


@pytest.mark.parametrize(("page", "line"), HOSTED, ids=lambda value: str(value)[:60])
def test_the_pruning_of_a_host_command_is_one_that_there_is(page: str, line: str) -> None:
    words = shlex.split(line.replace("...", "x"))
    given = dict(zip(words[1::2], words[2::2], strict=False))
    if "--config" in given:
        assert (ROOT / given["--config"]).is_file() or PLACEHOLDER.search(line)
    if "--pruning" in given and not PLACEHOLDER.search(given["--pruning"]):
        config.resolve(given["--pruning"], parse_pairs(given.get("--pruning_args", "")))


# -- the first screen -------------------------------------------------------------------------------------------------


def first_screen() -> str:
    text = (ROOT / "README.md").read_text()
    return text[: text.index("## Install")]


def test_the_first_snippet_runs_as_it_stands(tmp_path: Path) -> None:
    (snippet,) = code(first_screen(), "python")
    assert len(snippet.strip().splitlines()) <= 9  # of which one is blank
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 8
    (tmp_path / "snippet.py").write_text(snippet)
    command = [*warm.python(), "-m", "snippet"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    answer, said = ran.stdout.strip().splitlines()[-2:]
    assert answer == "purple"
    assert said.startswith("fastv 0.25: 144 -> 36 visual tokens per image, prefill FLOPs 0.")


def test_the_strategy_of_the_readme_is_a_file_that_keeps_its_promises(tmp_path: Path) -> None:
    (snippet,) = (block for block in code((ROOT / "README.md").read_text(), "python") if "PruningStrategy" in block)
    (tmp_path / "my_file.py").write_text(snippet)
    assert "brightest: all checks passed" in vtp("check", "brightest", "--module", tmp_path / "my_file.py")


def test_the_first_screen_has_two_commands_and_a_number() -> None:
    (commands,) = code(first_screen())
    assert [line.split()[0] for line in commands.strip().splitlines()] == ["make", "lmms-eval"]
    assert re.search(r"\*\*\d+\.\d % of \d+ questions right with \d+ of \d+ visual tokens\*\*", first_screen())
    assert readme.headline() in first_screen()


def test_no_table_of_the_readme_is_wider_than_six_columns() -> None:
    tables = re.findall(r"^\|.*\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert tables
    assert max(row.replace("\\|", "").count("|") for row in tables) <= 7


def test_the_bench_says_what_is_not_the_default() -> None:
    (row,) = [row for row in readme.bench().rows if row[0].startswith("atp")]
    assert row[0] == "atp 0.6 (alpha=0)"


def test_the_citation_is_whole() -> None:
    from vtp_plugin.version import __version__

    said = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(said)
    assert said["version"] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_nothing_is_installed_from_an_index_that_does_not_have_it() -> None:
    said = [line for page in PAGES for line in page.read_text().splitlines() if "pip install" in line]
    assert len(said) > 5
    assert not [line for line in said if re.search(r"pip install[^#]*vtp-plugin(?!.*@ file:)", line)]


# -- commands that need nothing but the package, run with small limits ------------------------------------------------


@pytest.mark.parametrize("line", ["vtp list", "vtp list --models", "vtp list fastv", "vtp reproduce --list"])
def test_what_only_reads_runs(line: str) -> None:
    assert vtp(*shlex.split(line)[1:])


def test_the_leaderboard_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert "written" in vtp("leaderboard", "docs/results", "-o", tmp_path / "leaderboard.html")


@pytest.mark.slow
@pytest.mark.usefixtures("waiting_host")
def test_compare_and_report_of_the_page_run(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "reporting.md").read_text()
    line = next(line for line in lines(text, "vtp") if line.startswith("vtp compare") and "vtp-tiny" in line)
    words = shlex.split(line.replace("RUN_DIR", str(tmp_path / "run")))[1:]
    words[words.index("--pruning") + 1], words[words.index("--keep") + 1] = "random", "0.25"
    vtp(*words, "--limit", SMALL)
    report = next(line for line in lines(text, "vtp") if line.startswith("vtp report RUN_DIR"))
    assert "written" in vtp(*shlex.split(report.replace("RUN_DIR", str(tmp_path / "run")))[1:])


def test_the_walk_to_a_kept_index_names_what_there_is():
    """docs/how-it-works.md: at most ten steps, and every module, class and function of them exists."""
    walk = (ROOT / "docs" / "how-it-works.md").read_text().split("## From `--pruning atp`")[1].split("\n## ")[0]
    steps = re.findall(r"^\d+\. .*(?:\n   .*)*", walk, re.MULTILINE)
    assert 5 <= len(steps) <= 10
    names = [name for step in steps for name in re.findall(r"`((?:\w+\.)+\w+)`", step)]
    assert len(names) > 10
    known = {p.stem for p in (ROOT / "vtp_plugin").rglob("*")} - {"session"}
    for name in names:
        parts = name.split(".")
        if parts[0] in known:
            assert _exists(parts), name


def _exists(parts: list[str]) -> bool:
    """Whether the package has the module, class or function, in the package or in its surgery."""
    for package in ("vtp_plugin", "vtp_plugin.surgery"):
        for cut in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join([package, *parts[:cut]]))
            except ImportError:
                continue
            if all((found := getattr(found, part, None)) is not None for part in parts[cut:]):
                return True
    return False
