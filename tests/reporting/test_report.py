"""The report: its page in a real browser, what it says, and what it refuses."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
import runfolder
import torch
from commands import vtp
from PIL import Image

from vtp_plugin.errors import PruningError
from vtp_plugin.reporting import charts, gallery, overlays, report, runs
from vtp_plugin.reporting.charts import Point

TARGETS = ["yes"] * 6
CELLS = {
    "none": ["yes", "yes", "yes", "yes", "no", "no"],
    "atp-0.5": ["yes", "no", "yes", "yes", "yes", "maybe"],  # one lost, one won, one changed
    "l2-0.25": ["no", "no", "yes", "yes", "no", "no"],  # two lost
}
GRID = (3, 4)


def looks(folder: Path, cell: str, pictures: Path) -> None:
    """A gallery as a run writes it: document 5 was not recorded."""
    left = 12 if cell == "none" else 5
    lines = []
    for number in range(5):
        pixels = torch.full((3, 30, 40), 40 * number, dtype=torch.uint8)
        kept = np.arange(12) < left
        entry = {"grid": GRID, "total": 12, "left": left, "kept": _coded(np.packbits(kept))}
        entry["picture"] = f"picture{number}.jpg"
        if cell != "none":
            entry |= {"scores": _coded(np.arange(12, dtype=np.uint8) * 20), "scored_by": "atp"}
        if cell == "l2-0.25":
            entry["into"] = _coded(np.array([-1] * 6 + [0] * 6, dtype="<i4"))
        pictures.mkdir(exist_ok=True)
        (pictures / entry["picture"]).write_bytes(gallery.jpeg(pixels))
        lines.append({"schema": 1, "task": runfolder.TASK, "doc_id": number, "images": [entry]})
    (folder / "gallery").mkdir()
    (folder / "gallery" / "looks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _coded(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = runfolder.write(tmp_path_factory.mktemp("run") / "run", CELLS, TARGETS)
    for cell in CELLS:
        looks(made / "cells" / cell, cell, made / "pictures")
    return made


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    assert "written: " in vtp("report", folder)
    return folder / "report.html"


@pytest.fixture(scope="module")
def session(page: Path) -> Iterator[Any]:
    with browser.opened(page) as opened:
        yield opened


# -- in the browser ---------------------------------------------------------------------------------------------------


def choose(session: Any, id: str, value: str) -> None:
    script = "const e = document.getElementById(arguments[0]); e.value = arguments[1]; "
    session.execute_script(script + "e.dispatchEvent(new Event('change'))", id, value)


def visible(session: Any) -> list[int]:
    """Documents whose cards are shown, in the order of the page."""
    script = (
        "return [...document.querySelectorAll('.card')].filter(c => c.checkVisibility()).map(c => +c.dataset.order)"
    )
    return session.execute_script(script)


@pytest.fixture(autouse=True)
def _fresh(request: pytest.FixtureRequest) -> None:
    if "session" in request.fixturenames:
        opened = request.getfixturevalue("session")
        opened.execute_script("localStorage.clear(); history.replaceState(null, '', location.pathname)")
        opened.refresh()


def test_it_loads_without_complaints_and_without_the_network(session: Any, page: Path) -> None:
    assert browser.complaints(session) == []
    assert browser.requests(session) <= {page.as_uri()}
    assert session.execute_script("return document.querySelectorAll('.charts svg').length") == 3


def test_every_picture_is_there(session: Any) -> None:
    script = """
    const done = arguments[0], urls = new Set();
    document.querySelectorAll('.pic, .pic i').forEach(e => urls.add(getComputedStyle(e).backgroundImage));
    Promise.all([...urls].map(url => new Promise(answer => {
      const image = new Image();
      image.onload = () => answer(image.naturalWidth); image.onerror = () => answer(0);
      image.src = url.slice(5, -2);
    }))).then(done);
    """
    widths = session.execute_async_script(script)
    assert sorted(set(widths)) == [4, 40]  # overlays of one pixel per patch, and pictures
    assert sum(width == 40 for width in widths) == 5


@pytest.mark.parametrize(
    ("flips", "expected"),
    [("all", [0, 1, 2, 3, 4]), ("lost", [0, 1]), ("won", [4]), ("flips", [0, 1, 4]), ("same", [2, 3])],
)
def test_flips_filter(session: Any, flips: str, expected: list[int]) -> None:
    choose(session, "flips", flips)
    assert visible(session) == expected
    assert session.execute_script("return document.getElementById('count').value") == f"{len(expected)} of 5 questions"


def test_the_filter_counts_only_what_is_shown(session: Any) -> None:
    session.execute_script("document.querySelector('.chips input[value=\"l2-0.25\"]').click()")
    choose(session, "flips", "lost")
    assert visible(session) == [1]
    shown = (
        "return [...document.querySelectorAll('[data-cell]')].filter(t => t.checkVisibility()).map(t => t.dataset.cell)"
    )
    assert session.execute_script(shown) == ["atp-0.5"]


def test_gallery_sorts_by_flips(session: Any) -> None:
    choose(session, "sort", "lost")
    assert visible(session) == [1, 0, 2, 3, 4]
    choose(session, "sort", "won")
    assert visible(session) == [4, 0, 1, 2, 3]


def test_search_finds_a_question(session: Any) -> None:
    box = session.find_element("id", "search")
    box.send_keys("question 3")
    assert visible(session) == [3]


def test_table_sorts_by_keyboard(session: Any) -> None:
    first = "return [...document.querySelectorAll('tbody th')].map(h => h.textContent.trim())"
    assert session.execute_script(first) == ["unpruned", "atp-0.5", "l2-0.25"]
    button = session.find_elements("css selector", "thead button")[3]  # tokens
    button.send_keys("\n")
    button.send_keys("\n")
    assert session.execute_script(first) == ["l2-0.25", "atp-0.5", "unpruned"]
    assert session.execute_script("return document.querySelectorAll('th[aria-sort=ascending]').length") == 1


def test_overlays_change(session: Any) -> None:
    layers = (
        "return ['k', 's', 'm'].map(c => [...document.querySelectorAll('.pic .' + c)].some(e => e.checkVisibility()))"
    )
    assert session.execute_script(layers) == [True, False, False]
    choose(session, "layer", "merged")
    assert session.execute_script(layers) == [False, False, True]


def brightness(session: Any) -> float:
    colour = session.execute_script("return getComputedStyle(document.body).backgroundColor")
    return float(np.mean([float(part) for part in re.findall(r"[\d.]+", colour)[:3]]))


def test_dark_and_light_by_the_system_and_by_the_switch(session: Any) -> None:
    browser.prefer(session, "dark")
    session.refresh()
    assert brightness(session) < 60
    session.find_element("id", "theme").send_keys("\n")
    assert brightness(session) > 200
    session.refresh()
    assert brightness(session) > 200  # remembered
    browser.prefer(session, "light")


@pytest.mark.parametrize("pixels", [360, 1280])
def test_nothing_sticks_out(session: Any, pixels: int) -> None:
    browser.width(session, pixels)
    session.refresh()
    assert session.execute_script("return document.documentElement.scrollWidth") <= pixels
    browser.width(session, 1280)


def test_every_control_has_a_name_and_every_picture_a_text(session: Any) -> None:
    script = """
    const named = e => e.getAttribute('aria-label') || e.textContent.trim() || (e.labels && e.labels.length);
    const all = [...document.querySelectorAll('button, select, input, [role=img]')];
    return all.filter(e => !named(e)).map(e => e.outerHTML)
    """
    assert session.execute_script(script) == []
    ids = session.execute_script("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))


def big(session: Any) -> str | None:
    """What the enlarged picture is of; None while there is none."""
    script = """
    const d = document.getElementById('big');
    return d.open ? `${d.querySelector('h2').textContent} / ${d.querySelector('.name b').textContent}` : null;
    """
    return session.execute_script(script)


def press(session: Any, key: str) -> None:
    session.switch_to.active_element.send_keys(key)


def test_a_picture_has_an_address(session: Any, page: Path) -> None:
    session.get("about:blank")
    session.get(f"{page.as_uri()}#{runfolder.TASK}-3/l2-0.25")
    assert big(session) == "question 3 / l2-0.25"
    link = session.find_element("id", "big-link").get_attribute("href")
    assert link == f"{page.as_uri()}#{runfolder.TASK}-3/l2-0.25"
    assert session.execute_script("return document.querySelectorAll('#big-tile .pic').length") == 1


def test_a_question_behind_a_filter_is_found_by_its_address(session: Any) -> None:
    choose(session, "flips", "lost")
    session.execute_script(f"location.hash = '{runfolder.TASK}-3'")
    script = "setTimeout(() => arguments[0](document.activeElement.closest('.card')?.id), 300)"
    assert session.execute_async_script(script) == f"{runfolder.TASK}-3"
    assert 3 in visible(session)


def test_keys_walk_through_the_gallery(session: Any) -> None:
    session.execute_script("document.activeElement.blur()")
    press(session, "j")
    press(session, "j")
    card = "return document.activeElement.closest('.card').querySelector('h3 span').textContent"
    assert session.execute_script(card) == "question 1"
    press(session, "\ue014")  # right
    press(session, "\n")
    assert big(session) == "question 1 / atp-0.5"
    press(session, "\ue014")
    assert big(session) == "question 1 / l2-0.25"
    press(session, "\ue015")  # down
    assert big(session) == "question 2 / l2-0.25"
    press(session, "o")
    assert session.execute_script("return document.getElementById('layer').value") == "scores"
    press(session, "\ue00c")  # escape
    assert big(session) is None
    eventually(session, "return location.hash", "")


def eventually(session: Any, script: str, wanted: Any) -> None:
    """The page hears of a closed picture when the browser gets to it."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(session, 10).until(lambda page: page.execute_script(script) == wanted)


def test_words_in_the_search_are_no_keys(session: Any) -> None:
    session.find_element("id", "search").send_keys("jok")
    assert session.execute_script("return document.getElementById('search').value") == "jok"
    assert session.execute_script("return document.getElementById('layer').value") == "kept"


def test_the_colour_scale_shows_with_the_scores(session: Any) -> None:
    shown = "return document.querySelector('.bar .key.scores').checkVisibility()"
    assert not session.execute_script(shown)
    choose(session, "layer", "scores")
    assert session.execute_script(shown)
    gradient = "return getComputedStyle(document.querySelector('.ramp')).backgroundImage"
    assert session.execute_script(gradient).startswith("linear-gradient(to right, rgb")


@pytest.mark.parametrize("pixels", [1400, 420])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_complaint_and_readable_text(session: Any, page: Path, pixels: int, scheme: str) -> None:
    browser.width(session, pixels)
    browser.prefer(session, scheme)
    session.get("about:blank")
    session.get(f"{page.as_uri()}#{runfolder.TASK}-1/atp-0.5")
    assert session.execute_script("return document.documentElement.scrollWidth") <= pixels
    assert browser.complaints(session) == []
    inside = (
        "const b = document.getElementById('big').getBoundingClientRect(); return [b.left, b.right, b.top, b.bottom]"
    )
    left, right, top, bottom = session.execute_script(inside)
    assert left >= 0 <= top
    assert right <= pixels
    assert bottom <= 900
    browser.width(session, 1280)
    browser.prefer(session, "light")


# -- without a browser ------------------------------------------------------------------------------------------------


def test_the_page_names_no_address(page: Path) -> None:
    text = re.sub(r"data:[\w/]+;base64,[\w+/=]+", "", page.read_text())
    assert not re.findall(r"""(?:src|href)=(?!"#|"data:)|url\((?!#|data:|\))|@import|https?:(?!//www\.w3\.org)""", text)


def test_the_page_says_what_the_statistics_say(page: Path) -> None:
    text = page.read_text()
    assert "2 configurations of 2 methods against the unpruned model, on 6 questions of 1 tasks." in text
    row = text[text.index("atp-0.5</th>") :].split("</tr>")[0]
    assert [float(v) for v in re.findall(r'data-value="([^"]*)"', row)][:3] == pytest.approx([4 / 6, 0, 72], rel=1e-4)
    assert "\u22121 / +1" in row


def test_text_of_a_task_is_text(tmp_path: Path) -> None:
    made = runfolder.write(tmp_path / "run", {"none": ["<b>&"], "l2-0.5": ["</script>"]}, ["<img src=x>"])
    for cell in ("none", "l2-0.5"):
        (made / "cells" / cell / "gallery").mkdir()
        line = {"schema": 1, "task": runfolder.TASK, "doc_id": 0, "images": []}
        (made / "cells" / cell / "gallery" / "looks.jsonl").write_text(json.dumps(line) + "\n")
    text = report.page(runs.load(made))
    assert "<img src=x>" not in text
    assert text.count("</script>") == 1


def test_a_run_without_pictures_has_a_page(tmp_path: Path) -> None:
    made = runfolder.write(tmp_path / "run", CELLS, TARGETS)
    assert "No pictures were recorded" in report.page(runs.load(made))


def test_samples_limits_the_gallery(folder: Path, tmp_path: Path) -> None:
    vtp("report", folder, "--samples", 2, "-o", tmp_path / "two.html")
    assert (tmp_path / "two.html").read_text().count('<li class="card"') == 2


def broken(folder: Path) -> None:
    path = folder / "cells" / "l2-0.25" / "gallery" / "looks.jsonl"
    path.parent.mkdir()
    path.write_text('{"schema": 1, "task": "x", "doc')


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (lambda folder: (folder / "sweep.yaml").unlink(), "not a run folder"),
        (lambda folder: [p.unlink() for p in folder.rglob("cell.json")], "an empty run folder"),
        (lambda folder: (folder / "cells" / "none" / "results.json").write_text('{"resu'), "half-written"),
        (broken, "not a document of a gallery, written only in part?"),
    ],
)
def test_bad_folders_are_refused_and_nothing_is_overwritten(tmp_path: Path, harm: Any, sentence: str) -> None:
    made = runfolder.write(tmp_path / "run", CELLS, TARGETS)
    (made / "report.html").write_text("the old one")
    harm(made)
    with pytest.raises(PruningError) as refused:
        vtp("report", made)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)
    assert (made / "report.html").read_text() == "the old one"


SEEDS = {
    "none": ["yes"] * 6,
    "atp-0.5": ["yes", "no", "yes", "yes", "yes", "yes"],
    "random-0.5-seed0": ["yes", "no", "no", "yes", "yes", "yes"],
    "random-0.5-seed1": ["no", "no", "yes", "yes", "yes", "yes"],
}


def timed(load: float = 2.0, p50: float = 0.1, spread: float = 0.04) -> dict[str, Any]:
    machine = {"cores": 2, "threads": 2, "load": [load, load, load]}
    return {"machine": machine, "latency": {"ttft": {"p50": p50}, "ttft_spread": spread}}


def written(folder: Path, cells: dict[str, list[str]], **records: dict[str, Any]) -> str:
    """The page of a run whose records of the machine are these, calm where nothing is said."""
    record = {id: records.get(id.replace("-", "_").replace(".", ""), timed()) for id in cells}
    return report.page(runs.load(runfolder.write(folder / "run", cells, TARGETS, record=record)))


def test_seeds_are_one_row_and_one_tile(tmp_path: Path) -> None:
    made = runfolder.write(tmp_path / "run", SEEDS, TARGETS)
    for cell in SEEDS:
        looks(made / "cells" / cell, "none" if cell == "none" else "atp-0.5", made / "pictures")
    text = report.page(runs.load(made))
    first = text[text.index('id="vtp_scenes_presence-0"') :].split("</li>")[0]
    tile = first[first.index('data-cell="random-0.5"') :].split("</figure>")[0]
    assert first.count("<figure") == 3
    assert "yes \u00d71, no \u00d71" in tile
    assert "part: " in tile
    assert tile.count('class="pic ') == 2
    assert tile.count(" other") == 1
    assert text.count('type="checkbox"') == 2


def test_cache_and_the_control_are_columns(tmp_path: Path) -> None:
    text = written(tmp_path, SEEDS)
    heads = re.findall(r"<th scope=.col.><button[^>]*>([^<]*)<", text)
    assert heads[:8] == ["configuration", "mean", "change", "over random", "at equal layers", "tokens", "KV", "FLOPs"]
    row = text[text.index("atp-0.5</th>") :].split("</tr>")[0]
    cells = re.findall(r"<td[^>]*>([^<]*)(?:<small>([^<]*)</small>)?</td>", row)
    assert cells[0][1]  # the mean has an interval
    assert cells[2][0] == "+16.7"  # 5 of 6 right, random 4 of 6 with both seeds
    assert cells[5][0] == "0.64x"  # (56 + 72) / 200
    assert cells[7] == ("1.00x", "\u00b12 %, load 2.0")


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ({"atp_05": timed(load=5.3)}, "load average up to 5.3 on 2 cores during 1 of 4 runs"),
        ({"atp_05": timed(spread=0.6)}, "times to first token spread by up to 60 % of their median"),
        ({"atp_05": {}}, "the load of the machine was not recorded with 1 of 4 runs"),
    ],
)
def test_times_that_say_nothing_are_named(tmp_path: Path, records: dict[str, Any], reason: str) -> None:
    text = written(tmp_path, SEEDS, **records)
    assert reason in text[: text.index("<table")]


def test_less_work_that_took_longer_is_named(tmp_path: Path) -> None:
    cells = {"none": ["yes"] * 6, "fastv-0.5": ["yes"] * 6, "fastv-0.25": ["yes"] * 6}
    text = written(tmp_path, cells, fastv_05=timed(p50=0.057), fastv_025=timed(p50=0.076))
    assert "fastv-0.25 took 0.76x of the time for 0.33x of the FLOPs, though fastv-0.5 took 0.57x" in text


def test_a_calm_machine_needs_no_note(tmp_path: Path) -> None:
    text = written(tmp_path, SEEDS)
    assert "may not be comparable" not in text
    assert "2 cores, 2 threads, load average 2.0 to 2.0, spread of TTFT 4 to 4 %" in text


# -- pieces -----------------------------------------------------------------------------------------------------------


def test_the_front_is_what_nothing_dominates() -> None:
    generator = np.random.default_rng(0)
    points = [Point(str(n), 0, *pair) for n, pair in enumerate(generator.integers(0, 6, (30, 2)).tolist())]

    def dominated(p: Point) -> bool:
        better = [q for q in points if q.x <= p.x and q.y >= p.y]
        return any((q.x, q.y) != (p.x, p.y) for q in better)

    found = {(p.x, p.y) for p in charts.front(points)}
    assert found == {(p.x, p.y) for p in points if not dominated(p)}


def test_charts_take_the_colours_of_the_page_and_share_no_id() -> None:
    points = [Point("a & b", 3, 0.5, 60, 55, 65)]
    first, second = (charts.scatter(points, Point("unpruned", 0, 1, 90), "FLOPs", name) for name in ("x", "y"))
    assert "var(--g3)" in first
    assert "var(--ink)" in first
    assert "#0405" not in first
    assert "<title>a &amp; b: 60.0 % (95 % interval 55.0 to 65.0) at 0.50x</title>" in first
    assert not set(re.findall(r'id="([^"]+)"', first)) & set(re.findall(r'id="([^"]+)"', second))


@pytest.mark.parametrize("kind", ["veil", "heat", "clusters"])
def test_an_overlay_reads_back_from_its_png(tmp_path: Path, kind: str) -> None:
    generator = np.random.default_rng(0)
    made = {
        "veil": lambda: overlays.veil(generator.random((5, 7)) > 0.5),
        "heat": lambda: overlays.heat(np.where(generator.random((5, 7)) > 0.2, generator.random((5, 7)), np.nan)),
        "clusters": lambda: overlays.clusters(generator.integers(-1, 35, (5, 7))),
    }[kind]()
    (tmp_path / "overlay.png").write_bytes(overlays.png(made))
    seen, wanted = np.array(Image.open(tmp_path / "overlay.png").convert("RGBA")), overlays.rgba(made)
    assert (seen[..., 3] == wanted[..., 3]).all()
    assert (seen[wanted[..., 3] > 0] == wanted[wanted[..., 3] > 0]).all()


def heights(svg: str) -> list[float]:
    """Numbers on the axis of accuracies, as they are drawn."""
    axis = svg[svg.index('id="x-matplotlib.axis_2"') :]
    return [float(number) for number in re.findall(r"<text [^>]*>(\d+)</text>", axis)]


def test_no_axis_goes_beyond_a_hundred() -> None:
    points = [Point("a", 0, 0.5, 98, 92, 104), Point("b", 1, 0.3, 60, 50, 70)]
    svg = charts.scatter(points, Point("unpruned", 0, 1, 99), "FLOPs", "x")
    assert max(heights(svg)) == 100


def test_every_method_of_the_page_has_a_mark_of_its_own() -> None:
    marks = {charts.marker(group) for group in range(report.COLOURS)}
    assert len(marks) == report.COLOURS
