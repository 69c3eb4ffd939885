"""Two processes in one place of results: the second one is told, a killed one blocks nobody, nothing is left behind."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest
from commands import at_work, ended

from vtp_plugin import locks
from vtp_plugin.errors import PruningError


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_second_process_is_told_and_a_killed_one_blocks_nobody(kind: str, place: Path) -> None:
    hold = getattr(locks, kind)
    with at_work(kind, place) as other:
        with pytest.raises(PruningError, match=r"another process is .*out: wait until it has ended"), hold(place):
            pytest.fail("both are at work")
        other.kill()
        other.wait()
        assert list(place.parent.rglob("*.lock"))  # a killed process leaves its file
        with hold(place):
            pass
    assert not list(place.parent.rglob("*.lock"))


def test_who_holds_a_place_may_hold_it_again(place: Path) -> None:
    with locks.folder(place):
        with locks.folder(place / "." / "../out"):
            assert (place / locks.LOCK).is_file()
        assert (place / locks.LOCK).is_file()
    assert not place.exists()  # nothing came of it


@pytest.mark.parametrize("error", locks.NO_LOCKS)
def test_a_file_system_without_locks_holds_nobody_up(error: int, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: object) -> None:
        raise OSError(error, "there are no locks")

    monkeypatch.setattr(fcntl, "flock", without)
    with locks.folder(place):
        (place / "result").write_text("measured")
    assert [path.name for path in place.iterdir()] == ["result"]


LINES = {
    "study hard-samples": "folder",
    "demo --pruning l2": "folder",
    "compare --model llava --model-args pretrained=vtp-tiny --tasks vtp_scenes --pruning l2": "folder",
    "tune --max-drop 1% --tasks vtp_scenes --pruning l2": "folder",
    "bench --shape small --pruning stride": "file",
}


@pytest.mark.parametrize("line", LINES)
def test_every_command_that_keeps_its_work_is_alone_there(line: str, tmp_path: Path) -> None:
    kind = LINES[line]
    out = tmp_path / ("out" if kind == "folder" else "out.json")
    with at_work(kind, out):
        result = ended(*line.split(), "-o", out)
    assert result.returncode == 2
    assert "another process is " in result.stderr
    assert result.stderr.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
