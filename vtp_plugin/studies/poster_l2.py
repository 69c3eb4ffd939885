"""poster-l2: is an encoder faster, and does it decide alike, when patches with a small norm never enter it?

Source: the poster "L2-norm Visual Token Pruning". It has no control at the same ratio; this study has three: `random`,
`stride`, and `bottom`, which keeps the patches with the smallest norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any

from vtp_plugin import config
from vtp_plugin.errors import PruningError
from vtp_plugin.reporting.tables import Table
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.studies.study import Study, some

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from vtp_plugin.hosts.transformers.zero_shot import Classes
    from vtp_plugin.reporting.views import View

POSTER = 0.5  # the only ratio with decisions on the poster
METHODS = {
    "l2": ("l2", {}),
    "bottom": ("l2", {"invert": True}),
    "stride": ("stride", {"at": "vit"}),
    "random": ("random", {"at": "vit"}),
}
SHOWN = 3  # pictures of kept patches


class PosterL2(Study):
    """Encoder speed, zero-shot decisions, kept patches."""

    name = "poster-l2"
    source = "L2-norm Visual Token Pruning (poster): 1.50x at keep 0.5, 96.9 % of decisions unchanged, cosine 0.47"

    def check(self) -> None:
        from vtp_plugin.hosts.transformers.shapes import shape_of
        from vtp_plugin.hosts.transformers.zero_shot import ZeroShot

        self.check_counts("batch", "rounds", "seeds")
        self.check_ratios("keep", "speed_keep")
        if min(self.settings["keep"]) == 1:
            raise PruningError(f"{self.name}: keep needs a ratio below 1")
        for shape in self.settings["shapes"]:
            if shape_of(shape).decodes:
                raise PruningError(f"{self.name}: {shape} is no encoder")
        self.classes = classes_of(self.settings)
        self.encoder = ZeroShot(checkpoint_of(self.settings["model"]))

    def measure(self) -> dict[str, Any]:
        return {
            "speed": [
                row for shape in self.settings["shapes"] for row in self.once(f"speed-{shape}", self._speed(shape))
            ],
            "pictures": len(self.classes.pictures),
            "class_names": self.classes.names,
            "decisions": self.once("decisions", self._decisions),
        }

    # -- (a) how fast ---------------------------------------------------------------------------------------------

    def _speed(self, shape: str) -> Callable[[], list[dict[str, Any]]]:
        """How to time one shape, once."""
        said = self.settings
        batch = said["batch"] if said["limit"] < 0 else min(said["batch"], said["limit"])
        return lambda: speed(shape, said["speed_keep"], batch, said["rounds"])

    # -- (b) what it decides --------------------------------------------------------------------------------------

    def _decisions(self) -> list[dict[str, Any]]:
        texts = self.encoder.texts(self.classes.names, self.settings["template"])
        whole, labels = self.encoder.pictures(self.classes.pictures, []), self.classes.labels
        rows = [{"method": "unpruned", "keep": 1.0, "seed": None, **judged(whole, whole, texts, labels)}]
        for keep in (keep for keep in self.settings["keep"] if keep < 1):
            for method, seed in [*((m, None) for m in METHODS if m != "random"), *self._seeds()]:
                pruned = self.encoder.pictures(self.classes.pictures, strategies(method, keep, seed))
                rows.append({"method": method, "keep": keep, "seed": seed, **judged(pruned, whole, texts, labels)})
        return rows

    def _seeds(self) -> list[tuple[str, int]]:
        return [("random", seed) for seed in range(self.settings["seeds"])]

    # -- what it looks like ---------------------------------------------------------------------------------------

    def tables(self, results: Mapping[str, Any]) -> list[Table]:
        return [speed_table(results["speed"]), decision_table(results)]

    def figures(self, results: Mapping[str, Any]) -> dict[str, Figure]:
        return {"decisions": decision_figure(results["decisions"]), "kept": self._kept()}

    def _kept(self) -> Figure:
        """(c) The patches that every method keeps at the poster's ratio."""
        from vtp_plugin.reporting.figures import kept_figure

        spread = self.classes.pictures[:: max(1, len(self.classes.pictures) // SHOWN)][:SHOWN]
        return kept_figure([[self._observe(picture, method) for method in METHODS] for picture in spread])

    def _observe(self, picture: Any, method: str) -> View:
        """What a method keeps of one picture."""
        from vtp_plugin.pruning import prune
        from vtp_plugin.reporting.observations import Observer
        from vtp_plugin.reporting.views import View

        with prune(self.encoder.model, strategies(method, POSTER, 0), processor=self.encoder.processor) as pruned:
            observer, looks = Observer(pruned), []
            pruned.finished.append(lambda call: looks.extend(observer.observe(call)))
            self.encoder.features([picture])
        return View(method, "", "", replace(looks[0], pixels=self.encoder.seen(picture)))


def speed(shape: str, keeps: Sequence[float], batch: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds per batch of an encoder with random weights at every ratio, beside the unpruned and the ideal one."""
    import torch

    from vtp_plugin.bench import rounds as bench
    from vtp_plugin.hosts.transformers import shapes

    sizes = shapes.shape_of(shape)
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = sizes.build(None, where, torch.float16 if where.type == "cuda" else torch.float32, "sdpa")
    timed = bench.compare(sizes, model, [s for keep in keeps for s in strategies("l2", keep, None)], batch, rounds)
    return [
        {
            "shape": shape,
            "keep": timing.keep,
            "batch": batch,
            "tokens": timing.tokens_after,
            "seconds": {side: median(seconds) for side, seconds in timing.seconds.items()},
            "images_per_second": timing.images_per_second,
            "ratio": timing.ttft_ratio,
            "over_ideal": timing.over_ideal,
        }
        for timing in timed
    ]


def strategies(method: str, keep: float, seed: int | None) -> list[PruningStrategy]:
    """A method or a control at a ratio, in front of the first block."""
    spec, fields = METHODS[method]
    return config.resolve(spec, {"keep_ratio": keep, **fields, **({} if method != "random" else {"seed": seed})})


def checkpoint_of(model: str) -> str:
    """Where a CLIP is: the embedded one's folder, or what was said."""
    from vtp_plugin.tiny.checkpoint import NAME, resolve

    return str(resolve(NAME, "clip")) if model == NAME else model


def classes_of(said: Mapping[str, Any]) -> Classes:
    """The pictures of the settings `images`, `classes` and `limit`: those of a folder, or the embedded test scenes."""
    from vtp_plugin.hosts.transformers.zero_shot import Classes, folder_of_classes

    if not said["images"]:
        return Classes(*embedded(said["limit"]))
    found = folder_of_classes(said["images"], said["classes"])
    pairs = some([*zip(found.pictures, found.labels, strict=True)], said["limit"], "limit")
    return Classes(found.names, [picture for picture, _ in pairs], [label for _, label in pairs])


def judged(features: Tensor, whole: Tensor, texts: Tensor, labels: Sequence[int]) -> dict[str, float]:
    """Against the unpruned encoder: same decisions, feature cosine; against the labels: accuracy."""
    decided, before = (features @ texts.T).argmax(-1), (whole @ texts.T).argmax(-1)
    return {
        "same_decision": (decided == before).float().mean().item(),
        "cosine": (features * whole).sum(-1).mean().item(),
        "accuracy": mean(int(found == label) for found, label in zip(decided.tolist(), labels, strict=True)),
    }


def embedded(limit: Any = -1) -> tuple[list[str], list[Any], list[int]]:
    """Names, pictures and labels of the embedded test scenes, classed by the shape that is asked to be counted.

    `limit`: so many of them, spread; only these are drawn. PruningError for a number that means nothing.
    """
    from vtp_plugin.tiny.scenes import SHAPES
    from vtp_plugin.tiny.testset import SCENES, select

    chosen = some(range(SCENES), limit, "limit")
    drawn = select()
    scenes = [drawn[number][1] for number in chosen]
    return list(SHAPES), [scene.render() for scene in scenes], [SHAPES.index(scene.counted) for scene in scenes]


def speed_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Batch latency and images per second without and with L2, as on the poster, and the ideal it lacks."""
    columns = [
        "encoder",
        "keep",
        "patches",
        "full, ms",
        "L2, ms",
        "full, images/s",
        "L2, images/s",
        "speed-up",
        "of ideal",
    ]
    table = Table(columns, title="Encoder speed")
    for row in rows:
        seconds, throughput = row["seconds"], row["images_per_second"]
        table.add(
            row["shape"],
            f"{row['keep']:g}",
            f"{row['tokens']:.0f}",
            *(f"{1e3 * seconds[side]:.0f}" for side in ("unpruned", "pruned")),
            *(f"{throughput[side]:.1f}" for side in ("unpruned", "pruned")),
            f"{1 / row['ratio']:.2f}x",
            f"{row['over_ideal']:.3f}x",
        )
    table.caption = (
        "Random weights in the encoder's shape, selection included; medians. Of ideal: time over that of an encoder "
        "which is given as many patches and no plugin."
    )
    return table


def averaged(rows: Sequence[Mapping[str, Any]], method: str, keep: float, what: str) -> tuple[float, float]:
    """Mean and standard deviation over the seeds; the latter is 0 for a method without any."""
    values = [row[what] for row in rows if row["method"] == method and row["keep"] == keep]
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def decision_table(results: Mapping[str, Any]) -> Table:
    rows = results["decisions"]
    table = Table(["keep", "method", "same decision", "cosine", "accuracy"], title="Zero-shot decisions")
    keeps = sorted({row["keep"] for row in rows}, reverse=True)
    for keep in keeps:
        for method in dict.fromkeys(row["method"] for row in rows if row["keep"] == keep):
            cells = [averaged(rows, method, keep, what) for what in ("same_decision", "cosine", "accuracy")]
            spread = [f" ± {100 * sd:.1f}" if sd else "" for _, sd in cells]
            same, cosine, right = (value for value, _ in cells)
            table.add(
                f"{keep:g}", method, f"{100 * same:.1f}{spread[0]}", f"{cosine:.3f}", f"{100 * right:.1f}{spread[2]}"
            )
    table.caption = (
        f"{results['pictures']} pictures, {len(results['class_names'])} classes; % and, for random, ± the standard "
        "deviation over its seeds. Same decision and cosine: against the unpruned encoder."
    )
    return table


def decision_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Share of unchanged decisions against keep ratio."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for method in METHODS:
        keeps = sorted({row["keep"] for row in rows if row["method"] == method})
        means, spreads = zip(*(averaged(rows, method, keep, "same_decision") for keep in keeps), strict=True)
        axis.errorbar(keeps, [100 * m for m in means], [100 * s for s in spreads], label=method, marker="o", capsize=2)
    axis.set_xlabel("keep ratio")
    axis.set_ylabel("decisions unchanged, %")
    axis.legend()
    return figure
