"""The page of committed records: what is read, what every number links to, and the page in a real browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
import runfolder
from commands import vtp
from paths import ROOT

from vtp_plugin.errors import PruningError
from vtp_plugin.reporting import comparison, leaderboard, runs

TARGETS = ["yes"] * 8
WRONG = {"none": 0, "atp-0.5": 1, "atp-0.25": 8, "random-0.5": 4}
CELLS = {id: ["no"] * wrong + ["yes"] * (8 - wrong) for id, wrong in WRONG.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison, and an evaluation by itself, in one folder."""
    made = tmp_path_factory.mktemp("records")
    comparison.write(runs.load(runfolder.write(made / "compared", CELLS, TARGETS)))
    alone = runfolder.results([runfolder.line(0, "yes", "yes", 36)], 36, runfolder.TASK, "qwen2_5_vl", "Qwen")
    (made / "alone").mkdir()
    (made / "alone" / "20260101_000000_results.json").write_text(json.dumps(alone))
    return made


def test_every_row_of_every_record_is_there_once(folder: Path) -> None:
    found = leaderboard.entries([folder])
    assert sorted((e.method, e.setting) for e in found if e.model != "Qwen") == [
        ("atp", "keep_ratio=0.25"),
        ("atp", "keep_ratio=0.5"),
        ("random", "keep_ratio=0.5"),
        ("unpruned", ""),
    ]
    (alone,) = [e for e in found if e.model == "Qwen"]
    assert (alone.accuracy, alone.keep, alone.questions) == (1.0, 0.25, 1)
    atp = next(e for e in found if e.setting == "keep_ratio=0.5" and e.method == "atp")
    assert (atp.accuracy, atp.tokens, atp.change["value"]) == (0.875, (72, 144), -0.125)
    assert atp.kv == pytest.approx(0.64)


@pytest.mark.parametrize("harm", ["", "not json", '{"rows": {"x": {}}}'])
def test_a_folder_without_records_and_a_broken_one_are_refused(tmp_path: Path, harm: str) -> None:
    if harm:
        (tmp_path / "summary.json").write_text(harm)
    with pytest.raises(PruningError) as refused:
        vtp("leaderboard", tmp_path, "-o", tmp_path / "page.html")
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "page.html").exists()


def test_every_number_links_its_record_and_its_command(folder: Path) -> None:
    page = folder / "page.html"
    assert "5 numbers from 2 records" in vtp("leaderboard", folder, "-o", page)
    text = page.read_text()
    for row in re.findall(r"<tr [^>]*>.*?</tr>", text, re.DOTALL):
        numbers = re.findall(r"<td data-value=\"[^\"]+\">(.*?)</td>", row)
        assert all("<a href=" in cell or "<button" in cell for cell in numbers)
        assert {(folder / link).is_file() for link in re.findall(r'href="([^"]+)"', row)} == {True}
    commands = json.loads(re.search(r"const commands = (.*);", text)[1])
    numbers = {int(n) for n in re.findall(r'data-command="(\d+)"', text)}
    assert numbers == set(range(len(commands)))
    assert all(command.startswith(("lmms-eval", "python -m lmms_eval")) for command in commands)


def test_the_committed_page_is_of_the_committed_records(tmp_path: Path) -> None:
    results = ROOT / "docs" / "results"
    made = leaderboard.page(leaderboard.entries([results]), results / "leaderboard.html")
    assert made == (results / "leaderboard.html").read_text(), "run `make readme`"


def test_no_committed_record_names_a_folder_of_a_machine() -> None:
    records = list((ROOT / "docs" / "results").rglob("*.json"))
    named = re.compile(r'"command": ".*(?<![\w.])/(?!tmp/)\w+/')
    assert len(records) > 20
    assert not [path for path in records if named.search(path.read_text())]


def test_a_record_without_a_command_gets_the_one_that_says_the_same() -> None:
    found = leaderboard.entries([ROOT / "docs" / "results" / "demo"])
    atp = next(e for e in found if e.method == "atp" and e.task == leaderboard.MEAN)
    assert "--pruning atp --pruning_args keep_ratio=0.25" in atp.command
    assert "--model_args pretrained=vtp-tiny" in atp.command


# -- in the browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session(folder: Path) -> Iterator[Any]:
    vtp("leaderboard", folder, "-o", folder / "browsed.html")
    with browser.opened(folder / "browsed.html") as opened:
        yield opened


def shown(session: Any) -> list[str]:
    script = (
        "return [...document.querySelectorAll('tbody tr')].filter(r => r.checkVisibility())"
        ".map(r => r.dataset.model + ' ' + r.cells[0].textContent)"
    )
    return session.execute_script(script)


def choose(session: Any, id: str, value: str) -> None:
    script = "const e = document.getElementById(arguments[0]); e.value = arguments[1]; "
    session.execute_script(script + "e.dispatchEvent(new Event('change'))", id, value)


def test_it_sorts_and_filters(session: Any) -> None:
    choose(session, "model", "llava")
    assert len(shown(session)) == 4
    choose(session, "budget", "50")
    assert shown(session) == ["llava unpruned", "llava atpkeep_ratio=0.5", "llava randomkeep_ratio=0.5"]
    session.find_elements("css selector", "thead button")[2].click()  # accuracy
    session.find_elements("css selector", "thead button")[2].click()
    assert shown(session)[0] == "llava randomkeep_ratio=0.5"
    choose(session, "model", "")
    choose(session, "budget", "")


def test_a_number_says_how_it_was_made(session: Any) -> None:
    session.find_elements("css selector", ".how")[0].click()
    assert session.execute_script("return document.getElementById('how').open")
    assert session.find_element("id", "how-command").text
    session.find_element("id", "how-close").click()


@pytest.mark.parametrize("pixels", [1400, 420])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_complaint_and_nothing_sticks_out(session: Any, pixels: int, scheme: str) -> None:
    browser.width(session, pixels)
    browser.prefer(session, scheme)
    session.refresh()
    assert session.execute_script("return document.documentElement.scrollWidth") <= pixels
    assert browser.complaints(session) == []
