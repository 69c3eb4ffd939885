"""FlashVID restated with lists and loops: what is left of one video."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

import slow

from vtp_plugin import VisualTokens

Row = list[float]


def mean(rows: list[Row]) -> Row:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


@dataclass
class Restated:
    """One video."""

    seen: VisualTokens
    b: int
    k: int
    fields: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.f = {"share": 0.7, "scene": 0.9, "segments": 8, "join": 0.8, "neighbours": 7} | self.fields
        self.x: list[Row] = self.seen.tokens[self.b].double().tolist()
        self.attention: Row = self.seen.cls_attention[self.b].double().tolist()
        self.frames: dict[int, list[int]] = {frame: [] for frame in range(self.seen.film[0])}
        for column, frame in enumerate(self.seen.frame[self.b].tolist()):
            self.frames[frame].append(column)

    def answer(self) -> tuple[list[int], dict[int, Row]]:
        """The columns that are left, and their values."""
        chosen = [column for own in self.frames.values() for column in self.representatives(own)]
        rest = [column for column in range(len(self.x)) if column not in chosen]
        parent = self.parents(rest, len(rest) - (self.k - len(chosen)))
        trees = defaultdict(list)
        for column in rest:
            root = column
            while root in parent:
                root = parent[root]
            trees[root].append(column)
        values = {root: mean([self.x[column] for column in own]) for root, own in trees.items()}
        clusters = self.clusters(values, self.k - len(chosen))
        made = {centre: mean([values[root] for root in own]) for centre, own in clusters.items()}
        made |= {column: self.x[column] for column in chosen}
        return sorted(made), made

    def representatives(self, own: list[int]) -> list[int]:
        """Farthest points of one frame."""
        number = min(int(self.f["share"] * self.k / len(self.frames) + 1e-9), len(own))
        picks: list[int] = []
        for _ in range(number):
            rivals = picks or own

            def gain(j: int, rivals: list[int] = rivals) -> float:
                apart = [1 - slow.cosine(self.x[i], self.x[j]) for i in rivals if i != j]
                return self.attention[j] * min(apart, default=4.0)

            picks.append(slow.argmax([j for j in own if j not in picks], gain))
        return picks

    def begins(self) -> set[int]:
        """The frames that begin a segment."""
        means = [mean([self.x[c] for c in own]) if own else [0.0] for own in self.frames.values()]
        alike = {
            f: slow.cosine(means[f - 1], means[f]) if self.frames[f] and self.frames[f - 1] else 0.0
            for f in range(1, len(means))
        }
        least = sorted(alike, key=lambda f: (alike[f], f))[: self.f["segments"] - 1]
        return {0, *least, *(f for f, value in alike.items() if value < self.f["scene"])}

    def parents(self, rest: list[int], most: int) -> dict[int, int]:
        found, begins = {}, self.begins()
        for frame, own in self.frames.items():
            before = [c for c in self.frames.get(frame - 1, []) if c in rest]
            for column in (c for c in own if c in rest and before and frame not in begins):
                best = slow.argmax(before, lambda j, i=column: slow.cosine(self.x[i], self.x[j]))
                found[column] = best, slow.cosine(self.x[column], self.x[best])
        found = {column: pair for column, pair in found.items() if pair[1] > self.f["join"]}
        order = sorted(found, key=lambda column: (-found[column][1], column))
        return {column: found[column][0] for column in order[:most]}

    def clusters(self, values: dict[int, Row], number: int) -> dict[int, list[int]]:
        """DPC-kNN."""
        roots, width = sorted(values), len(self.x[0])
        apart = {i: {j: math.dist(values[i], values[j]) / math.sqrt(width) for j in roots} for i in roots}
        near = {i: sorted(apart[i].values())[: self.f["neighbours"]] for i in roots}
        density = {i: math.exp(-sum(d * d for d in own) / len(own)) for i, own in near.items()}
        largest, peak = max(max(own.values()) for own in apart.values()), {}
        for i in roots:
            denser = [apart[i][j] for j in roots if (density[j], -j) > (density[i], -i)]
            peak[i] = density[i] * min(denser, default=largest)
        centres = sorted(roots, key=lambda i: (-peak[i], i))[:number]
        if not centres:
            return {}
        found = {centre: [] for centre in centres}
        for i in roots:
            found[i if i in found else min(centres, key=lambda c: (apart[i][c], c))].append(i)
        return found
