"""`make gpu`, rehearsed on the CPU: its order, its records and page, going on, and what it says without a device."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from matrix import dear

from vtp_plugin.bench import gpu, gpu_page, rounds
from vtp_plugin.reporting import readme

SHAPES = dear(["small", "small-next"], ["small"])
TRAINED = {"steps": 3, "steps_per_second": 1.5, "first_loss": 2.0, "last_loss": 1.0}
LAYER = {"l2": {}, "vprune": {}}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two strategies; one row is measured and stands for all; tests and training answer at once. What was said."""
    lines: list[str] = []
    measured: list[Any] = []
    compare = rounds.compare

    def like_the_first(shape: Any, model: Any, strategies: Sequence[Any], batch: int, *rest: Any) -> list[Any]:
        if not measured:
            measured.extend(compare(shape, model, strategies, batch, *rest))
        (strategy,) = strategies
        facts = {"strategy": strategy.name, "keep": strategy.keep_ratio, "config": strategy.config()}
        return [dataclasses.replace(measured[0], batch=batch, **facts)]

    def process(command: Sequence[str], until: float) -> dict[str, Any]:
        trains = "vtp_plugin.bench.training" in command
        return {"code": 0, "seconds": 1.0, "said": json.dumps(TRAINED) if trains else "7 passed, 2 skipped in 1 s"}

    monkeypatch.setattr(rounds, "compare", like_the_first)
    monkeypatch.setattr(gpu, "STRATEGIES", LAYER)
    monkeypatch.setattr(gpu, "KEEPS", (0.25, 0.5))
    monkeypatch.setattr(gpu, "MORE", {"l2": {"keep_ratio": 0.4}})
    monkeypatch.setattr(gpu, "_process", process)
    monkeypatch.setattr(gpu, "say", lines.append)
    monkeypatch.setattr("vtp_plugin.bench.journal.say", lines.append)
    every = gpu.parts
    few = {*SHAPES, "encoders", "tests", "training"}
    monkeypatch.setattr(gpu, "parts", lambda small: [part for part in every(small) if part.name in few])
    return lines


def rows(folder: Path, shape: str) -> list[tuple[Any, ...]]:
    timings = json.loads((folder / f"{shape}.json").read_text())["timings"]
    return [(row["strategy"], row["keep"], row["batch"]) for row in timings]


def test_a_rehearsal_is_whole_and_goes_on(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["--small", "-o", str(tmp_path), "--seconds", "2000"]
    gpu.main(command)
    telling = [("l2", 0.25, 8), ("vprune", None, 8), ("l2", 0.25, 1), ("vprune", None, 1)]
    for shape in SHAPES:
        paper = [("l2", 0.4, 8), ("l2", 0.4, 1)] if shape == SHAPES[0] else []
        assert rows(tmp_path, shape) == [*telling, *paper, ("l2", 0.5, 8), ("l2", 0.5, 1)]
    assert rows(tmp_path, "clip-vit-small") == [("l2", 0.5, 64), ("l2", 0.5, 8)]
    record = json.loads((tmp_path / "small.json").read_text())
    assert {"command", "device", "threads", "versions", "dtype", "repeats"} <= set(record)
    assert json.loads((tmp_path / "tests.json").read_text())["passed"] == 7
    page = (tmp_path / "README.md").read_text()
    assert "## small\n" in page
    assert "7 passed, 2 skipped" in page
    assert "3 steps, 1.5 per second" in page
    assert "| small | l2 |" in gpu_page.short(tmp_path)

    monkeypatch.setattr(rounds, "compare", lambda *_: pytest.fail("measured again"))
    said.clear()
    gpu.main(command)
    assert {"tests: measured already", "training: measured already"} <= set(said)
    assert rows(tmp_path, "small")[:4] == telling
    assert (tmp_path / "README.md").read_text() == page


def test_what_is_cut_off_leaves_the_most_telling_row(tmp_path: Path, said: list[str]) -> None:
    ticks = iter([0.0, 0.0, 0.0, *[1e6] * 100])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vtp_plugin.bench.journal.time.monotonic", lambda: next(ticks))
        gpu.bench("small", gpu.Options(tmp_path, gpu.torch.device("cpu"), "float32", True), 10.0)
    assert rows(tmp_path, "small") == [("l2", 0.25, 8)]


def test_a_part_that_fails_stops_no_other(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(shape: Any, model: Any, strategies: Sequence[Any], batch: int, *rest: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(rounds, "compare", compare)
    gpu.main(["--small", "-o", str(tmp_path), "--seconds", "2000"])
    lost = [line for line in said if "CUDA out of memory" in line]
    assert len(lost) == 8 + 6 * (len(SHAPES) - 1) + 2  # every row is told of, and left out
    assert (tmp_path / "training.json").exists()
    assert gpu_page.NOTHING in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("small", [False, True])
def test_what_matters_most_comes_first(small: bool) -> None:
    parts = gpu.parts(small)
    shapes = ["small", "small-next", "small-qwen", "small-qwen3"] if small else list(gpu_page.SHAPES)
    assert [part.name for part in parts] == [shapes[0], "encoders", "tests", *shapes[1:], "training", "vllm"]
    ends = [part.until for part in parts]
    assert ends == sorted(ends)
    assert ends[-1] == 1
    assert gpu.TOTAL < 9 * 60


def test_without_a_device(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu.main(["-o", str(tmp_path)])
    assert ended.value.code == 2
    assert "there is no CUDA device here; --small tries the command" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_pages_say_what_the_committed_records_say() -> None:
    assert (readme.GPU / "README.md").read_text() == readme.on_gpu()
    assert gpu_page.short(readme.GPU) in readme.Path("README.md").read_text()
    assert gpu_page.short(Path("nowhere")) == gpu_page.NOTHING
    assert "\n" not in gpu_page.NOTHING
