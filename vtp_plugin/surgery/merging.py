"""Merging inside the blocks of a vision tower, between attention and MLP, without rewriting a block.

A block computes h + mlp(norm(h)) behind its attention. The norm is given the merged h, the MLP's output is spread to
the members of every merged token, and the block's output is merged in the same way: the mean of h + the same MLP row,
which is the merged h + its MLP row. What a family has around the MLP (a layer scale) stays its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin import signals
from vtp_plugin.facts.family import Family
from vtp_plugin.facts.tower import Tower
from vtp_plugin.signals import MergingView
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery import attention, checkpointing
from vtp_plugin.surgery.passes import Merged, TowerPass
from vtp_plugin.surgery.session import Session
from vtp_plugin.surgery.undo import Undo
from vtp_plugin.tokens import Selection

MASKABLE = ("eager", "sdpa")  # attention kernels that take an additive mask


def unmergeable(family: Family, strategy: PruningStrategy, *, arranged: bool) -> str:
    """Why tokens cannot be merged inside the blocks; "" if they can."""
    if arranged:
        return f"merging inside the blocks is not possible, {family.models} arranges the tower's tokens by their places"
    if family.tower.between is None:
        return f"merging inside the blocks is not possible in the tower of {family.models}"
    kernel = family.tower.module.config._attn_implementation
    if strategy.proportional and kernel not in MASKABLE:
        return (
            f"proportional attention needs a tower with {' or '.join(MASKABLE)} attention, this one has {kernel}; "
            f"say proportional=false"
        )
    return ""


@dataclass
class MergingBlocks:
    """The hooks of one strategy on the blocks of one tower; the first `depth` of them count."""

    session: Session
    strategy: PruningStrategy
    depth: int

    def install(self, undo: Undo) -> None:
        self.cuts = self.strategy.cut_blocks(self.depth)
        norm, mlp = self.tower.between
        for number in self.cuts:
            block = self.tower.blocks[number]
            undo.before(block, self._entering)
            undo.after(self.tower.attention_of(number).k_proj, self._keys_read)
            undo.before(getattr(block, norm), self._merging(number))
            undo.after(getattr(block, mlp), self._spreading)
            undo.after(block, self._leaving)
        if self.strategy.proportional:
            for number in range(self.cuts[0] + 1, len(self.tower.blocks)):
                undo.before(self.tower.attention_of(number), self._weighting)

    # -- hooks, in the order in which a block meets them ----------------------------------------------------------

    def _entering(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """What is merged here would not be when the backward pass runs the block again."""
        if self._passing is not None and checkpointing.runs_again(module, args[0] if args else kwargs["hidden_states"]):
            raise self.strategy.error(
                "gradient checkpointing runs the tower's blocks again in the backward pass, where nothing is merged: "
                "train without it, or with another strategy"
            )

    def _weighting(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """A key counts as often as patches were merged into it: log(size) on its logits."""
        bias = None if self._passing is None else self._passing.key_weights
        if bias is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        return args[:1], {**kwargs, "attention_mask": bias[:, None].to(hidden.dtype)}  # [B, 1, 1, L]

    def _keys_read(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """Keep the keys of a block that merges, [B, prefix + N, H d]."""
        passing = self._passing
        if passing is not None:
            passing.merged = passing.merged or self._unmerged(output)
            passing.merged.keys = output

    def _unmerged(self, keys: Tensor) -> Merged:
        count = keys.shape[1] - self.tower.prefix
        return Merged(torch.ones(len(keys), count, device=keys.device), count)

    def _merging(self, number: int) -> Any:
        """Before the norm of a block: merge [B, prefix + N, D]."""

        def merge(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
            passing = self._passing
            if passing is None:
                return None
            hidden, merged = args[0], passing.merged
            selection = self._decide(number, hidden, passing)
            if selection.owner is None:
                return None
            merged.selection, merged.before = selection, merged.sizes
            self._take_over(passing)
            tokens = torch.stack(selection.tokens).to(hidden.dtype)
            return (torch.cat([hidden[:, : self.tower.prefix], tokens], dim=1), *args[1:]), kwargs

        return merge

    def _spreading(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        """Every token gets what the MLP made of the one that it is part of."""
        selection, prefix = self._selection, self.tower.prefix
        if selection is None:
            return None
        return torch.cat([output[:, :prefix], attention.take(output, selection.owner + prefix)], dim=1)

    def _leaving(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Merge what the block puts out."""
        selection = self._selection
        if selection is None:
            return None
        merged = self._passing.merged
        sizes, merged.selection, merged.before = merged.before, None, None
        if isinstance(output, tuple):
            return (self._merged(output[0], selection, sizes), *output[1:])
        return self._merged(output, selection, sizes)

    # -- small things ---------------------------------------------------------------------------------------------

    def _decide(self, number: int, hidden: Tensor, passing: TowerPass) -> Selection:
        """Ask about hidden states [B, prefix + N, D] of one block."""
        prefix, merged, call = self.tower.prefix, passing.merged, self.session.call
        with self.session.judging(self.strategy, layer=number) as cut:
            view = MergingView(
                projected_keys=merged.keys,
                width=self.tower.attention_of(number).head_dim,
                prefix=prefix,
                sizes=merged.sizes,
                hidden=hidden,
                fingerprint=tuple(call.images[image].fingerprint for image in passing.batch),
            )
            merged.keys = None
            facts = {"cut": (self.cuts.index(number), len(self.cuts)), "entered": merged.entered}
            found = signals.found_in(self.strategy, view, inside=True)
            return cut.decide(hidden[:, prefix:], passing.batch, self.tower.grid, found, **facts)

    def _merged(self, values: Tensor, selection: Selection, sizes: Tensor) -> Tensor:
        """[B, prefix + N, D] -> [B, prefix + K, D]."""
        prefix = self.tower.prefix
        tokens = selection.merged(values[:, prefix:], sizes).to(values.dtype)
        return torch.cat([values[:, :prefix], tokens], dim=1)

    def _take_over(self, passing: TowerPass) -> None:
        """Sizes, and signals that were read before, for the tokens that are left."""
        merged, selection, sizes = passing.merged, passing.merged.selection, passing.merged.before
        counts = torch.stack([s.new_zeros(len(c)) for s, c in zip(sizes, selection.sources, strict=True)])
        merged.sizes = counts.scatter_add_(1, selection.owner, sizes)
        if self.strategy.proportional:
            weights = torch.nn.functional.pad(merged.sizes.log(), (self.tower.prefix, 0))
            passing.key_weights = weights[:, None]
        passing.maps = {key: selection.merged(value, sizes) for key, value in passing.maps.items()}
        passing.outputs = {key: self._merged(value, selection, sizes) for key, value in passing.outputs.items()}

    @property
    def tower(self) -> Tower:
        return self.session.adapter.tower

    @property
    def _passing(self) -> TowerPass | None:
        return None if self.session.call is None else self.session.call.tower

    @property
    def _selection(self) -> Selection | None:
        """Of the block that is running; None where it merges nothing."""
        passing = self._passing
        return passing.merged.selection if passing is not None and passing.merged is not None else None
