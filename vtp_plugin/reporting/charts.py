"""Accuracy against a cost, drawn with matplotlib as an SVG that takes its colours and font from the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (4.4, 3.3)  # inches; the page scales it
INK, MUTED, GRID = "#010101", "#020202", "#030303"  # stand for the page's variables --ink, --muted, --line
GROUP = "#0405{:02x}"  # stands for --g0, --g1, ...
MARKERS = "osD^vPXph<>d"  # one per colour of the page; the star is the unpruned model
WHOLE = 100.0  # %, where the accuracy axis ends


@dataclass(frozen=True)
class Point:
    """One configuration."""

    name: str  # of the point, for its tooltip
    group: int  # points of one method have one colour and are joined
    x: float  # cost relative to the unpruned model
    y: float  # accuracy in %
    low: float | None = None  # its interval
    high: float | None = None


def front(points: Sequence[Point]) -> list[Point]:
    """The Pareto front by rising cost: no other point is at most as costly and at least as accurate."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -p.y)):
        if not best or point.y > best[-1].y:
            best.append(point)
    return best


def scatter(points: Sequence[Point], unpruned: Point, cost: str, name: str) -> str:
    """An SVG to put into a page; `name` keeps its ids apart from those of other pictures there."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    _frame(axes, cost)
    _front(axes, front([*points, unpruned]))
    titles = {}
    for group, members in groupby(sorted(points, key=lambda p: (p.group, p.x)), key=lambda p: p.group):
        _group(axes, group, list(members), titles)
    _end_at_whole(axes, [*points, unpruned])
    axes.axhline(unpruned.y, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
    mark = axes.plot(
        unpruned.x, unpruned.y, marker="*", markersize=12, color=INK, linestyle="none", zorder=5, clip_on=False
    )[0]
    mark.set_gid("point-unpruned")
    titles["point-unpruned"] = _title(unpruned)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _embedded(buffer.getvalue(), titles, name, f"Accuracy against {cost}")


def marker(group: int) -> str:
    """The mark of a method alone, as an SVG to stand in the legend."""
    from matplotlib.markers import MarkerStyle

    style = MarkerStyle(MARKERS[group % len(MARKERS)])
    path = style.get_path().transformed(style.get_transform())
    corners = path.to_polygons()[0]
    scale = 4.6 / np.abs(corners).max()
    points = " ".join(f"{scale * x + 6:.1f},{6 - scale * y:.1f}" for x, y in corners)
    return f'<svg class="mark" viewBox="0 0 12 12" aria-hidden="true"><polygon points="{points}"/></svg>'


def _frame(axes: Axes, cost: str) -> None:
    axes.set_xlabel(f"{cost}, relative to unpruned", color=MUTED, fontsize=10)
    axes.set_ylabel("mean accuracy, %", color=MUTED, fontsize=10)
    axes.tick_params(colors=MUTED, labelsize=9, length=0)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.margins(x=0.06, y=0.1)


def _end_at_whole(axes: Axes, points: Sequence[Point]) -> None:
    """No accuracy is above 100 % or below 0: neither is the axis. Some room above and below where there is some."""
    ends = [end for p in points for end in (p.y, p.low, p.high) if end is not None]
    room = max(2.0, 0.08 * (max(ends) - min(ends)))
    axes.set_ylim(max(0.0, min(ends) - room), min(WHOLE, max(ends) + room))


def _front(axes: Axes, best: Sequence[Point]) -> None:
    line = axes.step([p.x for p in best], [p.y for p in best], where="post", color=INK, linewidth=1.1, alpha=0.55)[0]
    line.set_zorder(2)
    line.set_gid("pareto-front")


def _group(axes: Axes, group: int, members: Sequence[Point], titles: dict[str, str]) -> None:
    colour = GROUP.format(group)
    axes.plot([p.x for p in members], [p.y for p in members], color=colour, linewidth=1, alpha=0.45, zorder=3)
    for number, point in enumerate(members):
        if point.low is not None and point.high is not None:
            ends = np.clip([point.low, point.high], 0, WHOLE)
            axes.plot([point.x] * 2, ends, color=colour, linewidth=1.4, alpha=0.35, zorder=3)
        marker = MARKERS[group % len(MARKERS)]
        style = {"marker": marker, "markersize": 7, "linestyle": "none", "clip_on": False}
        drawn = axes.plot(point.x, point.y, color=colour, zorder=4, **style)[0]
        drawn.set_markeredgewidth(0)
        drawn.set_gid(f"point-{group}-{number}")
        titles[f"point-{group}-{number}"] = _title(point)


def _title(point: Point) -> str:
    interval = "" if point.low is None else f" (95 % interval {point.low:.1f} to {point.high:.1f})"
    return f"{point.name}: {point.y:.1f} %{interval} at {point.x:.2f}x"


def _embedded(svg: str, titles: dict[str, str], name: str, label: str) -> str:
    """The picture alone, with the page's colours, its own ids, tooltips and a label."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    for gid, title in titles.items():
        svg = svg.replace(f'<g id="{gid}">', f'<g id="{gid}" class="point"><title>{escape(title)}</title>')
    svg = re.sub(r'id="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    for colour, variable in ((INK, "ink"), (MUTED, "muted"), (GRID, "line")):
        svg = svg.replace(colour, f"var(--{variable})")
    svg = re.sub(r"#0405([0-9a-f]{2})", lambda m: f"var(--g{int(m[1], 16)})", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    head = re.compile(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>')
    return head.sub(rf'<svg viewBox="\1" role="img" aria-label="{label}">', svg, count=1)
