"""VisionZip: the tokens that CLS attends to stay, the rest is merged into a few contextual tokens.

Source: arXiv 2412.04467 (CVPR 2025), section 3.2 and the authors' code, whose details are followed where they differ:
1. dominant: the CLS token itself and the `dominant - 1` patches with the highest CLS attention, in raster order;
2. of the remaining P patches every s-th, s = max(1, P // contextual), is a target, the first `contextual` of them;
3. every other remaining patch joins the target whose key is most similar (cosine);
4. contextual token = x_target + mean(x of the patches that joined it), a sum, not divided by two.
Output: [CLS, dominant patches, contextual tokens], `dominant + contextual` tokens in all; positions are renumbered.
Towers without a class token, or whose rows are made of several patches, have no CLS to keep: all dominant tokens are
patches then, and where there is no class token the attention that a patch receives (mean over queries) ranks them.
A budget (`keep_tokens`, `keep_ratio`) is split like the paper's settings, 54 + 10 of 64: one part in 6.4 is contextual.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtp_plugin.selectors import mean_by_owner
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.tokens import Selection, VisualTokens, at, top_k, true_columns, without


@dataclass(kw_only=True)
class VisionZip(PruningStrategy):
    """Keep `dominant` tokens (CLS included) and merge the others into `contextual` tokens."""

    name = "visionzip"
    stage = Stage.PROJECTOR
    paper = "VisionZip: Longer is Better but Not Necessary in VLMs, https://arxiv.org/abs/2412.04467"
    needs = ("cls", "cls_attention", "keys")
    merges = True

    dominant: int | None = None  # 54 unless a budget is given
    contextual: int | None = None  # 10 unless a budget is given

    def __post_init__(self) -> None:
        counts = (self.dominant, self.contextual)
        if counts != (None, None):
            if None in counts:
                raise self.error("give both dominant and contextual, or keep_tokens or keep_ratio")
            if self.keep_ratio is not None or self.keep_tokens is not None:
                raise self.error("give dominant and contextual, or keep_tokens, or keep_ratio; not both kinds")
            self.check_whole("dominant", 1)
            self.check_whole("contextual", 0)
            self.keep_tokens = self.dominant + self.contextual
        elif self.keep_ratio is None and self.keep_tokens is None:
            self.dominant, self.contextual, self.keep_tokens = 54, 10, 64
        super().__post_init__()

    def split(self, n: int) -> tuple[int, int]:
        """The numbers of dominant (CLS included) and contextual tokens for an image of n patches."""
        if self.contextual is not None:
            return self.dominant, self.contextual
        k = self.count(n)
        contextual = min(k - 1, max(1, round(k * 10 / 64)))
        return k - contextual, contextual

    def select(self, visual: VisualTokens) -> Selection:
        dominant, contextual = self.split(visual.tokens.shape[1])
        class_token = visual.cls is not None
        keep = top_k(visual.cls_attention, dominant - class_token)  # [B, N]
        columns = true_columns(keep, dominant - class_token)
        others = true_columns(~keep, keep.shape[1] - columns.shape[1])
        targets = _targets(others, contextual)
        x, keys = visual.tokens.float(), normalize(visual.keys, dim=-1)
        merged, into = _merge(x, keys, others, targets)
        rows, sources = [at(x, columns), merged], [columns, targets]
        if class_token:
            rows.insert(0, visual.cls[:, None].float())
            sources.insert(0, columns.new_full((len(columns), 1), -1))
        return Selection(
            keep.scatter(1, targets, True),
            tokens=torch.cat(rows, dim=1).unbind(),
            source=torch.cat(sources, dim=1).unbind(),
            scores=visual.cls_attention,
            into=into.unbind(),
        )


def _targets(rest: Tensor, number: int) -> Tensor:
    """Every s-th of the remaining columns, [B, P] -> [B, number]."""
    return rest[:, :: max(1, rest.shape[1] // max(1, number))][:, :number]


def _merge(x: Tensor, keys: Tensor, rest: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Contextual tokens [B, M, D] of the targets [B, M] among the remaining columns [B, P]; where all went [B, N]."""
    others, into = without(rest, targets, x.shape[1]), torch.full(x.shape[:2], -1, device=x.device)
    if 0 in (targets.shape[1], others.shape[1]):
        return at(x, targets), into
    owner = (at(keys, others) @ at(keys, targets).mT).argmax(dim=-1)  # [B, P - M]
    into = into.scatter(1, others, targets.gather(1, owner))
    return at(x, targets) + mean_by_owner(at(x, others), owner, targets.shape[1]), into
