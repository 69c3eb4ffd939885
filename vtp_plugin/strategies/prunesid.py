"""PruneSID: groups of tokens along principal directions, thinned out group by group.

Source: arXiv 2603.09480 (ICLR 2026) and the authors' code, with x the tower's features and a the CLS attention:
1. principal components of sigmoid(x) over the tokens, max(1, K // 4) of them, as far as there are directions; a token
   belongs to the component on which its loading is largest in size;
2. in every group, by falling attention, a token stays that is not more similar (cosine of x) than `threshold` K / 32
   times the mean cosine of all pairs to one that stays already;
3. groups get parts of the budget in proportion to what stayed in them, and spend it by attention;
4. the class token is one of the K, in front.
The order is that of the groups (`order=raster` sorts). Positions are renumbered.

Ours: exact components (the code's are randomised), centred as there; exactly K tokens: what rounding leaves over goes
to the largest remainders, and a group with too few survivors takes from its others by attention. Towers without a class
token keep K patches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vtp_plugin.selectors import cosines
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import ComparingStrategy
from vtp_plugin.tokens import Selection, VisualTokens


@dataclass(kw_only=True)
class PruneSID(ComparingStrategy):
    """Group tokens by principal directions and thin out every group."""

    name = "prunesid"
    stage = Stage.PROJECTOR
    paper = "PruneSID: Synergistic Importance-Diversity for Token Pruning, https://arxiv.org/abs/2603.09480"
    merges = True  # the class token's row is new
    default_keep_ratio = 64 / 576

    threshold: float = 1.0  # times K / 32 and the mean cosine
    order: str = "group"  # group or raster

    def validate(self) -> None:
        self.check_number("threshold", 0)
        self.check_choice("order", ("group", "raster"))

    @property
    def needs(self) -> tuple[str, ...]:
        return ("cls", "cls_attention", *self.reads())

    def select(self, visual: VisualTokens) -> Selection:
        k, class_token = self.wanted(visual), visual.cls is not None
        images = zip(self.judged(visual, visual.tokens).float(), visual.cls_attention, strict=True)
        read = torch.stack([self._compared(*image, k) for image in images]).cpu()  # what follows is a walk on the host
        picks = torch.tensor([self._kept(one, k - class_token) for one in read], dtype=torch.long)
        picks = picks.to(visual.index.device)
        rows, sources = [], []
        for b, (x, kept) in enumerate(zip(visual.tokens.float(), picks, strict=True)):
            first = visual.cls[b, None].float() if class_token else x[:0]
            rows.append(torch.cat([first, x[kept]]))
            sources.append(torch.cat([kept.new_full((len(first),), -1), kept]))
        chosen = Selection.of(picks, visual.index.shape[1], scores=visual.cls_attention)
        return replace(chosen, tokens=tuple(rows), source=tuple(sources))

    def _compared(self, x: Tensor, attention: Tensor, k: int) -> Tensor:
        """Of one image [N, D]: which pairs differ enough, the order of attention, and the groups, [N + 2, N]."""
        order, groups = attention.sort(descending=True, stable=True).indices, _groups(x, max(1, k // 4))
        alike = cosines(x[None])[0]
        differs = alike <= self.threshold * k / 32 * alike.mean()
        compared = torch.empty(len(x) + 2, len(x), dtype=torch.int32, device=x.device)
        compared[:-2], compared[-2], compared[-1] = differs, order, groups
        return compared

    def _kept(self, compared: Tensor, wanted: int) -> list[int]:
        """The `wanted` patches that stay of one image, group by group; on the host."""
        differs, order, group = compared[:-2].bool(), compared[-2].long(), compared[-1]
        members = [order[group[order] == number] for number in group.unique()]
        ranked = [_thinned(columns, differs) for columns in members]
        quotas = _parts([stayed for _, stayed in ranked], [len(columns) for columns in members], wanted)
        kept = torch.cat([columns[:quota] for (columns, _), quota in zip(ranked, quotas, strict=True)]).tolist()
        return sorted(kept) if self.order == "raster" else kept


def _groups(x: Tensor, number: int) -> Tensor:
    """The principal component of sigmoid(x) that every token [N, D] loads on most, [N]."""
    squashed = x.double().sigmoid_()
    squashed -= squashed.mean(0)
    _, sizes, directions = torch.linalg.svd(squashed, full_matrices=False)
    rank = (sizes > 1e-9 * sizes[0].clamp(min=1e-300)).sum().clamp(min=1)
    loadings = squashed @ directions[:number].T
    none = torch.arange(loadings.shape[1], device=x.device) >= rank
    return loadings.abs().masked_fill(none, -1).argmax(-1)


def _thinned(columns: Tensor, differs: Tensor) -> tuple[Tensor, int]:
    """The columns [n], those first that are not too similar to one before them, and how many these are."""
    stay: list[int] = []
    for column in columns.tolist():
        if not stay or bool(differs[column, stay].all()):
            stay.append(column)
    first = columns.new_tensor(stay)
    return torch.cat([first, columns[~torch.isin(columns, first)]]), len(stay)


def _parts(weights: list[int], room: list[int], k: int) -> list[int]:
    """k divided in proportion to the weights, as far as there is room, by largest remainders."""
    parts = [0] * len(weights)
    while (left := k - sum(parts)) > 0:
        open_ = [n for n, part in enumerate(parts) if part < room[n]]
        total = sum(weights[n] for n in open_)
        exact = {n: left * weights[n] / total for n in open_}
        whole = {n: min(int(share + 1e-9), room[n] - parts[n]) for n, share in exact.items()}
        if not any(whole.values()):
            for n in sorted(open_, key=lambda n: (-exact[n], n))[:left]:
                parts[n] += 1
            continue
        for n, part in whole.items():
            parts[n] += part
    return parts
