"""The gallery of the report: per question the picture, what every configuration kept of it, and the answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vtp_plugin.reporting import gallery, overlays, statistics
from vtp_plugin.reporting.gallery import Shown
from vtp_plugin.reporting.runs import BASELINE, Answer, Cell, Run

PICTURES, GALLERY = "pictures", "gallery"  # folders of a run (shared by its cells) and of a cell
FLIPS = {"lost": "right \u2192 wrong", "won": "wrong \u2192 right", "changed": "another answer", "same": ""}


class Cards:
    """Cards for the page's template; `name` stores a picture in the page and returns its class."""

    def __init__(self, run: Run, name: Callable[[bytes, str], str]) -> None:
        self.run, self.name = run, name
        self.galleries = {cell.id: gallery.read(cell.folder / GALLERY, run.folder / PICTURES) for cell in run}

    def cards(self, samples: int | None) -> list[dict[str, Any]]:
        """One card per recorded question, by task and document; at most `samples` per task."""
        recorded = {key for one in self.galleries.values() for key in one.documents}
        asked = [sorted(key for key in recorded if key[0] == task)[:samples] for task in self.run.tasks]
        return [self._card(*key) for keys in asked for key in keys]

    def _card(self, task: str, number: int) -> dict[str, Any]:
        before = self.run.baseline.answers(task)[number]
        return {
            "task": task,
            "number": number,
            "question": before.question,
            "target": before.target,
            "tiles": [self._tile(cell, task, number, before) for cell in self.run],
        }

    def _tile(self, cell: Cell, task: str, number: int, before: Answer) -> dict[str, Any]:
        images = self.galleries[cell.id].documents.get((task, number), [])
        now = cell.answers(task)[number]
        flip = flipped(before, now)
        pruned = cell.pruning != BASELINE
        return {
            "cell": cell.id if pruned else "",
            "label": cell.label if pruned else "unpruned",
            "tokens": f"{sum(i.left for i in images)}/{sum(i.total for i in images)}" if images else "",
            "answer": now.answer or "(no answer)",
            "verdict": verdict(now.correct),
            "flip": flip if pruned else "",
            "flip_text": FLIPS[flip] if pruned else "",
            "images": [self._image(shown, cell) for shown in images],
        }

    def _image(self, shown: Shown, cell: Cell) -> dict[str, str]:
        picture = self._picture(shown.picture)
        pruned = cell.pruning != BASELINE
        said = f"{cell.label} keeps {shown.left} of {shown.total} visual tokens" if pruned else "the original picture"
        return {
            "picture": self.name(picture, "jpeg") if picture else "",
            "ratio": f"{shown.grid[1]}/{shown.grid[0]}",
            "alt": f"{said}, {shown.view}" if shown.view else said,
            "tiled": bool(shown.view),
            "kept": self.name(overlays.png(overlays.veil(shown.kept)), "png") if pruned else "",
            "scores": "" if shown.scores is None else self.name(overlays.png(overlays.heat(shown.scores)), "png"),
            "merged": "" if shown.into is None else self.name(overlays.png(overlays.clusters(shown.into)), "png"),
        }

    def _picture(self, name: str) -> bytes | None:
        return next((found for one in self.galleries.values() if (found := one.picture(name))), None)


def verdict(correct: float) -> str:
    """right, wrong, or part of a point."""
    return "right" if correct >= 1 else "wrong" if correct <= 0 else "part"


def flipped(before: Answer, now: Answer) -> str:
    """What pruning did to an answer: lost, won, changed (neither) or same."""
    was, is_ = (bool(statistics.right([answer.correct])[0]) for answer in (before, now))
    if was != is_:
        return "lost" if was else "won"
    return "same" if statistics.normal(before.answer) == statistics.normal(now.answer) else "changed"
