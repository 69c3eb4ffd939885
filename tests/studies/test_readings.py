"""What readings of V-PRUNE remove of photographs: against loops over pairs of patches, picture by picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
import reference
import torch
from PIL import Image
from rich.console import Console

from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.transformers.preparing import prepared
from vtp_plugin.studies import readings
from vtp_plugin.studies.study import conduct

pytest.importorskip("lmms_eval")
CLIP = torch.tensor([122, 116, 104], dtype=torch.uint8)
READINGS: dict[str, dict[str, Any]] = {"ours": {}, "three": {"group": 3}, "chi2": {"combine": "chi2", "bins": 4}}
ALONE = {"parts": ["photographs"], "processors": ["clip-224"], "readings": {"groups of 3x3": {"group": 3}}}


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Half of it flat, with a little noise; half of it coarse squares."""
    draw = np.random.default_rng(seed)
    levels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
    levels[:, : width // 2] = 90 + levels[:, : width // 2] // 64
    levels[: height // 3] = levels[: height // 3] // 16 * 16
    return Image.fromarray(levels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures" / "more").mkdir(parents=True)
    for number, size in enumerate([(120, 90), (90, 120), (100, 100), (150, 100)]):
        picture(*size, number).save(tmp_path / "pictures" / ("more" if number % 2 else "") / f"{number}.png")
    return tmp_path / "pictures"


def now(key: str, work: Callable[[], Any]) -> Any:
    return work()


def test_shares_are_those_of_the_restatement() -> None:
    """Patch by patch: removed of all, of what is no padding, and the part of it that is."""
    prepare = prepared("llava-1.5", size=112)  # 8 x 8 patches; a picture of 2:1 fills the four rows in the middle
    seen = picture(224, 112, 0)
    (view,) = prepare(seen)
    patches = view.pixels[0]
    blank = [*range(16), *range(48, 64)]
    assert (patches[blank][:, :, 2:-2] - CLIP.view(3, 1, 1)).int().eq(0).all()  # but for the blurred edge
    inside = [number for number in range(64) if number not in blank]
    found = readings.shares(prepare, seen, READINGS, [5, 40])
    assert found["unpad"] == 0.5
    for name, fields in READINGS.items():
        for chi2 in (5, 40):
            restated = reference.VPrune(**{**fields, "chi2_threshold": float(chi2)})
            left = restated.kept(patches, (8, 8))
            removed = [number for number in range(64) if number not in left]
            within = restated.kept(patches, (8, 8), inside)
            entry = found[name][str(chi2)]
            assert entry["all"] == pytest.approx(len(removed) / 64)
            assert entry["picture"] == pytest.approx(1 - len(within) / 32)
            assert entry["padding"] == pytest.approx(len(set(removed) & set(blank)) / len(removed))


def test_what_is_not_padded_has_no_padding() -> None:
    found = readings.shares(prepared("clip-224"), picture(224, 112, 0), {"ours": {}}, [5])
    assert found["unpad"] == 0
    assert found["ours"]["5"]["all"] == found["ours"]["5"]["picture"] > 0
    assert found["ours"]["5"]["padding"] == 0


def test_means_and_errors_over_pictures(folder: Path) -> None:
    pictures = readings.photographs(str(folder), "", -1)
    found = readings.measure(pictures, {"clip-224": {"ours": {}}}, [5, 20], now)
    single = [
        readings.shares(prepared("clip-224"), each, {"ours": {}}, [20])["ours"]["20"]["all"] for _, each in pictures
    ]
    entry = found["processors"]["clip-224"]["readings"]["ours"]["20"]["all"]
    assert entry["mean"] == pytest.approx(mean(single))
    assert entry["error"] == pytest.approx(np.std(single, ddof=1) / 2)
    assert found["names"] == sorted(found["names"])


def test_which_pictures(folder: Path) -> None:
    names = [name for name, _ in readings.photographs(str(folder), "", -1)]
    assert len(names) == 4
    assert [name for name, _ in readings.photographs(str(folder), "4:3", -1)] == ["0.png", "more/1.png"]
    assert [name for name, _ in readings.photographs(str(folder), "3:4", 1)] == ["0.png"]
    assert [name for name, _ in readings.photographs(str(folder), "", 2)] == names[::2]


def test_the_free_photographs_are_the_default() -> None:
    pytest.importorskip("skimage")
    from vtp_plugin.tiny.photos import PHOTOS

    assert [name for name, _ in readings.photographs("", "", -1)] == [photo.file for photo in PHOTOS]


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"most": 0}, "most pictures must be from 1 to the 4 there are"),
        ({"most": -2}, "most pictures must be from 1 to the 4 there are"),
        ({"most": 5}, "most pictures must be from 1 to the 4 there are"),
        ({"most": 1.5}, "most pictures must be from 1"),
        ({"most": "many"}, "most must be a number"),
        ({"proportions": "wide"}, "proportions must be two numbers such as 4:3"),
        ({"proportions": "9:1"}, "no pictures of 9:1"),
        ({"parts": []}, "parts must be some of"),
        ({"parts": ["photos"]}, "parts must be some of"),
        ({"processors": ["clip-225"]}, "Did you mean 'clip-224'"),
        ({"readings": {"five": {"groups": 5}}}, "groups"),
        ({"pictures": "nowhere"}, "not a folder: nowhere"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_at_once(folder: Path, tmp_path: Path, said: dict[str, Any], sentence: str) -> None:
    out = tmp_path / "study"
    with pytest.raises(PruningError, match=sentence):
        conduct("vprune-design", {**ALONE, "pictures": str(folder), **said}, out, Console(quiet=True))
    assert not out.exists()


def test_photographs_need_no_model_and_go_on_where_they_were_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, out = {**ALONE, "pictures": str(folder)}, tmp_path / "study"

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(readings, "calibrations", stop)
        with pytest.raises(KeyboardInterrupt):
            conduct("vprune-design", said, out, Console(quiet=True))
    monkeypatch.setattr(readings, "shares", stop)  # would raise if a picture were measured again
    record = json.loads(conduct("vprune-design", said, out, Console(quiet=True)).read_text())
    assert set(record["results"]) == {"photographs", "calibration"}
    table = (out / "table.md").read_text()
    entry = record["results"]["photographs"]["processors"]["clip-224"]["readings"]["groups of 3x3"]
    assert f"{100 * entry['5']['all']['mean']:.1f}" in table
    assert "The nearest: " in table
    assert (out / "photographs.png").is_file()
