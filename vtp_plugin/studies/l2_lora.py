"""l2-lora: what low-rank adaptation gives back of an encoder that sees only some of its patches.

Source: the future work of the poster "L2-norm Visual Token Pruning", whose features have a cosine of 0.47 with the
unpruned encoder's at keep 0.5. The teacher is the unpruned encoder, of unlabelled pictures that are not tested on; the
controls are the poster study's, adapted alike, and what the adapted encoder does with all patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from vtp_plugin.errors import PruningError, unknown
from vtp_plugin.reporting.tables import Table
from vtp_plugin.studies.poster_l2 import METHODS, checkpoint_of, classes_of, judged, strategies
from vtp_plugin.studies.study import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vtp_plugin.hosts.transformers.zero_shot import ZeroShot

WHAT = {"cosine": "cosine", "same_decision": "same decision", "accuracy": "accuracy"}
LAST = 10  # steps whose mean loss is shown


class L2Lora(Study):
    """Cosine, decisions and accuracy before and behind the adaptation."""

    name = "l2-lora"
    source = (
        "L2-norm Visual Token Pruning (poster), future work: adapt the encoder to what is left (cosine 0.47 before)"
    )

    def check(self) -> None:
        import peft  # noqa: F401  (a missing package is named before the work)

        self.check_counts("per_picture", "rank", "batch", "epochs")
        said = self.settings
        if not 0 < said["keep"] < 1:
            raise PruningError(f"{self.name}: keep must be a ratio between 0 and 1, got {said['keep']!r}")
        if not said["rate"] > 0:
            raise PruningError(f"{self.name}: rate must be above 0, got {said['rate']!r}")
        if not said["pruning"]:
            raise PruningError(f"{self.name}: pruning names no method")
        for method in said["pruning"]:
            if method not in METHODS:
                raise unknown("method", method, METHODS)
        self.classes = classes_of(said)
        self.learned = self._pictures(said["per_picture"] * len(self.classes.pictures))
        self._encoder()

    def measure(self) -> dict[str, Any]:
        return {
            "pictures": len(self.classes.pictures),
            "class_names": self.classes.names,
            "learned": len(self.learned),
            "arms": [
                self.once(f"arm-{method}", lambda method=method: self._arm(method))
                for method in self.settings["pruning"]
            ],
        }

    def _encoder(self) -> ZeroShot:
        from vtp_plugin.hosts.transformers.zero_shot import ZeroShot

        return ZeroShot(checkpoint_of(self.settings["model"]))

    def _pictures(self, count: int) -> list[Any]:
        """What is learned from: the first of a folder, or scenes that no test scene is among."""
        if not self.settings["learn"]:
            return [_Scene(seed) for seed in range(count)]
        from vtp_plugin.hosts.transformers.zero_shot import pictures_of

        found = pictures_of(Path(self.settings["learn"]))
        if not found:
            raise PruningError(f"no pictures in {self.settings['learn']}")
        return found[:count]

    def _arm(self, method: str) -> dict[str, Any]:
        """One method: the encoder as it is, then adapted to what the method leaves."""
        from vtp_plugin.hosts.transformers.adapting import Plan, adapt

        said, encoder, tested = self.settings, self._encoder(), self.classes.pictures
        texts = encoder.texts(self.classes.names, said["template"])
        cut = strategies(method, said["keep"], said["seed"] if method == "random" else None)
        learned = [each.picture() if isinstance(each, _Scene) else each for each in self.learned]
        whole, targets = encoder.pictures(tested, []), encoder.pictures(learned, [])
        before = judged(encoder.pictures(tested, cut), whole, texts, self.classes.labels)
        plan = Plan(**{field: said[field] for field in ("rank", "rate", "batch", "epochs", "seed")})
        losses = adapt(encoder, learned, targets, cut, plan)
        return {
            "method": method,
            "unpruned": judged(whole, whole, texts, self.classes.labels),
            "before": before,
            "after": judged(encoder.pictures(tested, cut), whole, texts, self.classes.labels),
            "after_whole": judged(encoder.pictures(tested, []), whole, texts, self.classes.labels),
            "losses": losses,
        }

    # -- what it looks like ---------------------------------------------------------------------------------------

    def tables(self, results: Mapping[str, Any]) -> list[Table]:
        columns = ["method", *(f"{shown}{when}" for shown in WHAT.values() for when in ("", ", adapted"))]
        columns += ["all patches, adapted: same decision", "accuracy", "loss, first", f"last {LAST}"]
        table = Table(columns, title=f"Keep {self.settings['keep']:g}, adapted with rank {self.settings['rank']}")
        arms = results["arms"]
        blank = [""] * 5
        table.add("unpruned", *_pair(arms[0], "unpruned", None), *blank[:4])
        for arm in arms:
            whole, losses = arm["after_whole"], arm["losses"]
            table.add(
                arm["method"],
                *_pair(arm, "before", "after"),
                f"{100 * whole['same_decision']:.1f}",
                f"{100 * whole['accuracy']:.1f}",
                f"{losses[0]:.3f}",
                f"{mean(losses[-LAST:]):.3f}",
            )
        table.caption = (
            f"{results['pictures']} pictures of {len(results['class_names'])} classes, adapted on {results['learned']} "
            f"others in {len(arms[0]['losses'])} steps; % but for cosine and loss. Cosine and same decision: with the "
            "unpruned encoder before any adaptation. Loss: 1 - cosine on what is learned from."
        )
        return [table]

    def figures(self, results: Mapping[str, Any]) -> dict[str, Figure]:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 3), layout="constrained")
        for axis, (what, shown) in zip(figure.subplots(1, len(WHAT)), WHAT.items(), strict=True):
            names = [arm["method"] for arm in results["arms"]]
            for shift, when in ((-0.2, "before"), (0.2, "after")):
                heights = [arm[when][what] for arm in results["arms"]]
                axis.bar([place + shift for place in range(len(names))], heights, 0.4, label=when)
            axis.set_xticks(range(len(names)), names, fontsize=7)
            axis.set_ylim(0, 1)
            axis.set_title(shown, fontsize=9)
        figure.axes[0].legend(fontsize=7)
        return {"adapted": figure}


class _Scene:
    """A scene of the training seeds, drawn when it is needed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def picture(self) -> Any:
        from vtp_plugin.tiny.scenes import sample_scene

        return sample_scene("train", self.seed).render()


def _pair(arm: Mapping[str, Any], before: str, after: str | None) -> list[str]:
    """Three pairs of cells."""
    cells = []
    for what in WHAT:
        scale, digits = (1, 3) if what == "cosine" else (100, 1)
        cells += [f"{scale * arm[when][what]:.{digits}f}" if when else "" for when in (before, after)]
    return cells
