"""The gallery of the report: per question the picture, what every configuration kept of it, and the answers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from vtp_plugin.reporting import gallery, overlays, statistics
from vtp_plugin.reporting.gallery import Shown
from vtp_plugin.reporting.rows import Row, rows
from vtp_plugin.reporting.runs import BASELINE, Answer, Cell, Run

PICTURES, GALLERY = "pictures", "gallery"  # folders of a run (shared by its cells) and of a cell
FLIPS = {"lost": "right \u2192 wrong", "won": "wrong \u2192 right", "changed": "another answer", "same": ""}


class Cards:
    """Cards for the page's template; `name` stores a picture in the page and returns its class."""

    def __init__(self, run: Run, name: Callable[[bytes, str], str]) -> None:
        self.run, self.name, self.rows = run, name, rows(run)
        self.galleries = {cell.id: gallery.read(cell.folder / GALLERY, run.folder / PICTURES) for cell in run}

    def cards(self, samples: int | None) -> list[dict[str, Any]]:
        """One card per recorded question, by task and document; at most `samples` per task."""
        recorded = {key for one in self.galleries.values() for key in one.documents}
        asked = [sorted(key for key in recorded if key[0] == task)[:samples] for task in self.run.tasks]
        return [self._card(*key) for keys in asked for key in keys]

    def _card(self, task: str, number: int) -> dict[str, Any]:
        before = self.run.baseline.answers(task)[number]
        return {
            "id": address(task, number),
            "task": task,
            "number": number,
            "question": before.question,
            "target": before.target,
            "tiles": [self._tile(row, task, number, before) for row in self.rows],
        }

    def _tile(self, row: Row, task: str, number: int, before: Answer) -> dict[str, Any]:
        """One configuration; its seeds are together, the first one's picture in front."""
        answers = [cell.answers(task)[number] for cell in row.cells]
        first, *others = (self._seen(cell, task, number) for cell in row.cells)
        flip = flipped(before, answers, row.values[task][number])
        pruned = row.cells[0].pruning != BASELINE
        return {
            "cell": row.id if pruned else "",
            "label": row.label if pruned else "unpruned",
            "tokens": first["tokens"],
            "answer": said(answers),
            "verdict": verdict(row.values[task][number]),
            "flip": flip if pruned else "",
            "flip_text": FLIPS[flip] if pruned else "",
            "images": first["images"],
            "others": [image for seen in others for image in seen["images"]],
        }

    def _seen(self, cell: Cell, task: str, number: int) -> dict[str, Any]:
        images = self.galleries[cell.id].documents.get((task, number), [])
        tokens = f"{sum(i.left for i in images)}/{sum(i.total for i in images)}" if images else ""
        return {"tokens": tokens, "images": [self._image(shown, cell) for shown in images]}

    def _image(self, shown: Shown, cell: Cell) -> dict[str, Any]:
        picture = self._picture(shown.picture)
        pruned = cell.pruning != BASELINE
        text = f"{cell.label} keeps {shown.left} of {shown.total} visual tokens" if pruned else "the original picture"
        return {
            "picture": self.name(picture, "jpeg") if picture else "",
            "ratio": f"{shown.grid[1]}/{shown.grid[0]}",
            "alt": f"{text}, {shown.view}" if shown.view else text,
            "tiled": bool(shown.view),
            "kept": self.name(overlays.png(overlays.veil(shown.kept)), "png") if pruned else "",
            "scores": "" if shown.scores is None else self.name(overlays.png(overlays.heat(shown.scores)), "png"),
            "merged": "" if shown.into is None else self.name(overlays.png(overlays.clusters(shown.into)), "png"),
        }

    def _picture(self, name: str) -> bytes | None:
        return next((found for one in self.galleries.values() if (found := one.picture(name))), None)


def address(task: str, number: int) -> str:
    """What stands behind # in a link to a question."""
    return f"{re.sub(r'[^A-Za-z0-9_-]', '-', task)}-{number}"


def said(answers: Sequence[Answer]) -> str:
    """The answer; of several seeds all of them, the most frequent first."""
    found = Counter(answer.answer or "(no answer)" for answer in answers)
    return ", ".join(f"{text} \u00d7{count}" if len(answers) > 1 else text for text, count in found.most_common())


def verdict(correct: float) -> str:
    """right, wrong, or part of a point."""
    return "right" if correct >= 1 else "wrong" if correct <= 0 else "part"


def flipped(before: Answer, now: Sequence[Answer], value: float) -> str:
    """What pruning did to an answer: lost, won, changed (neither) or same. `value`: the mean over the seeds."""
    was, is_ = (bool(right) for right in statistics.right([before.correct, value]))
    if was != is_:
        return "lost" if was else "won"
    unlike = any(statistics.normal(answer.answer) != statistics.normal(before.answer) for answer in now)
    return "changed" if unlike else "same"
