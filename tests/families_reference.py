"""What one sample of any family must answer, given which of its tokens were kept: `vtp_plugin.promises.reference`.

Nothing in here knows a family. Which tokens of the tower a decision means is seen by repeating it on noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from families import Processor
from torch import Tensor, nn

from vtp_plugin import Selection, VisualTokens
from vtp_plugin.promises import Case, reference
from vtp_plugin.promises.probe import Probe, dead, entering, generate, noisy, parts_of, placeholders
from vtp_plugin.promises.reference import Dropped


@dataclass
class Kept:
    """Decisions about the images of one sample, one entry per image; None where the stage does not cut."""

    units: list[Tensor] | None = None  # pixels and vit: merge units of all tiles
    rows: list[Tensor] | None = None  # projector: rows that the host makes
    late: list[Tensor] | None = None  # llm: rows
    layer: int = 2
    shifted: bool = False  # every kept row has the values of the next one that may be dropped, as if it was merged
    positions: str = ""  # original or compact; else what the family does, and original between layers


@dataclass(kw_only=True)
class Repeat(Probe):
    """Keep in front of the tower's blocks what was decided elsewhere."""

    at: str = "vit"
    masks: list[Tensor] = field(default_factory=list)  # bool, of every image

    def select(self, visual: VisualTokens) -> Selection:
        keep = torch.cat(self.masks)[: visual.index.numel()].view(visual.index.shape)
        self.masks = [torch.cat(self.masks)[visual.index.numel() :]]
        return Selection(keep)


class Reference:
    """What one sample must give."""

    def __init__(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        totals: list[int],
        kept: Kept,
        later: Mapping[str, int] | None = None,
    ) -> None:
        self.model, self.inputs, self.kept, self.ids = model, inputs, kept, inputs["input_ids"][0]
        self.case = Case(model, [inputs], processor=Processor())
        self.parts, self.where = parts_of(self.case), placeholders(self.case, inputs)
        assert [len(columns) for columns in self.where] == totals
        family = kept.positions or self.case.adapter.default_positions
        self.dropped = Dropped(positions="original" if kept.late else family, layer=kept.layer, later=later or {})
        self.dropped.late_positions = kept.positions or "original"
        if kept.units is not None:
            self.dropped.tower = self._dead(kept.units)
        elif kept.rows is not None:
            self.dropped.columns, self.dropped.merged = self._without(kept.rows), self._merged()
        elif kept.late is not None:
            self.dropped.late = self._without(kept.late)
        self.columns = reference.left(model, self.parts, inputs, self.dropped)  # of the prompt that are left

    @property
    def hidden(self) -> Tensor:
        """Which of these the last layers do not see."""
        late = self.dropped.late
        return torch.isin(self.columns, late if late is not None else torch.zeros(0, dtype=torch.long))

    def logits(self, new: list[int]) -> Tensor:
        """Logits behind the prompt and every new token but the last, [len(new), V]."""
        return reference.logits(self.model, self.parts, self.inputs, self.dropped, new)

    @cached_property
    def _judged(self) -> list[Tensor]:
        """Per image, the columns of what may be dropped: all but newlines."""
        every = generate(self.case, self.inputs, Probe(at="projector", keep_ratio=1.0), new=1).kept
        return [columns[rows] for columns, rows in zip(self.where, every, strict=True)]

    def _without(self, kept: Sequence[Tensor]) -> Tensor:
        pairs = zip(self._judged, self.where, kept, strict=True)
        return torch.cat([judged[~torch.isin(judged, columns[rows])] for judged, columns, rows in pairs])

    def _merged(self) -> Any:
        if not self.kept.shifted:
            return None
        judged = self._judged
        return torch.cat([columns[:-1] for columns in judged]), torch.cat([columns[1:] for columns in judged])

    def _dead(self, units: Sequence[Tensor]) -> Tensor:
        told, images = noisy(self.inputs), self.case.adapter.images(self.inputs)
        square = self.case.adapter.tower.block**2
        totals = [(image.patches or image.total) // square for image in images]
        masks = [torch.isin(torch.arange(n), kept) for n, kept in zip(totals, units, strict=True)]
        with entering(self.case) as whole:
            generate(self.case, told, new=1)
        with entering(self.case) as entered:
            generate(self.case, told, Repeat(keep_ratio=0.5, masks=masks), new=1)
        return dead(whole, entered)
