"""Sweeps over a stand-in for the host, and what they started."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import fake_host
import runfolder

from vtp_plugin.compare import matrix, sweep
from vtp_plugin.reporting import comparison, runs

FAKE = f"{sys.executable} {Path(fake_host.__file__)}"
HOST = {"model": "llava", "model_args": "pretrained=fake", "tasks": runfolder.TASK, "limit": 8, "launch": FAKE}
CELLS = ["none", "l2-0.5", "l2-0.25", "random-0.5-seed0", "random-0.5-seed1", "random-0.25-seed0", "random-0.25-seed1"]
SPECS = matrix.cells(["l2", "random"], [0.5, 0.25], seeds=2)


class Folder:
    """A run folder and a log of every cell that a host started."""

    def __init__(self, path: Path) -> None:
        self.run_dir, self.log = path / "run", path / "started.log"

    def run(
        self, specs: list[runs.Spec] = SPECS, environment: dict[str, str] | None = None, **options: Any
    ) -> runs.Run:
        variables = {"FAKE_LOG": str(self.log), **(environment or {})}
        return sweep.run(self.run_dir, specs, **{**HOST, **options}, environment=variables)

    @property
    def started(self) -> Counter[str]:
        return Counter(self.log.read_text().split()) if self.log.exists() else Counter()

    def outcome(self) -> dict[str, Any]:
        """What a reader sees, without times and paths."""
        return comparison.summary(runs.load(self.run_dir))
