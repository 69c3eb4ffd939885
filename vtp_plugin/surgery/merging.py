"""Merging inside the blocks of a vision tower, between attention and MLP, without rewriting a block.

A block computes h + mlp(norm(h)) behind its attention. The norm is given the merged h, the MLP's output is spread to
the members of every merged token, and the block's output is merged in the same way: the mean of h + the same MLP row,
which is the merged h + its MLP row. What a family has around the MLP (a layer scale) stays its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtp_plugin.adapter import Tower
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery import attention
from vtp_plugin.surgery.undo import Undo
from vtp_plugin.tokens import Selection

if TYPE_CHECKING:
    from vtp_plugin.pruning import Pruned

MASKABLE = ("eager", "sdpa")  # attention kernels that take an additive mask
PER_PATCH = ("cls_attention", "keys", "raw_keys")  # signals that were read before a merge
WITH_PREFIX = ("output",)


@dataclass
class MergingBlocks:
    """The hooks of one strategy on the blocks of one tower; the first `depth` of them count."""

    pruned: Pruned
    tower: Tower
    strategy: PruningStrategy
    depth: int

    def install(self, undo: Undo) -> None:
        self.cuts = self.strategy.cut_blocks(self.depth)
        norm, mlp = self.tower.between
        for number in self.cuts:
            block = self.tower.blocks[number]
            undo.after(getattr(block, self.tower.attention).k_proj, self._keys_read)
            undo.before(getattr(block, norm), self._merging(number))
            undo.after(getattr(block, mlp), self._spreading)
            undo.after(block, self._leaving)
        if self.strategy.proportional:
            for block in self.tower.blocks[self.cuts[0] + 1 :]:
                undo.before(getattr(block, self.tower.attention), self._weighting)

    # -- hooks, in the order in which a block meets them ----------------------------------------------------------

    def _weighting(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """A key counts as often as patches were merged into it: log(size) on its logits."""
        bias = self._scratch.get("key_weights") if self._active else None
        if bias is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        return args[:1], {**kwargs, "attention_mask": bias[:, None].to(hidden.dtype)}  # [B, 1, 1, L]

    def _keys_read(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        if self._active:
            self._scratch["block_keys"] = output

    def _merging(self, number: int) -> Any:
        def merge(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
            if not self._active:
                return None
            hidden, prefix = args[0], self.tower.prefix
            sizes = self._sizes(hidden)
            with self.pruned.judging(self.strategy, layer=number) as cut:
                signals = self._signals(number, hidden, sizes)
                facts = {"cut": (self.cuts.index(number), len(self.cuts)), "entered": self._scratch["entered"]}
                selection = cut.decide(hidden[:, prefix:], self.pruned.call.batch, self.tower.grid, signals, **facts)
            if selection.owner is None:
                return None
            self._scratch["selection"] = selection, sizes
            self._take_over(selection, sizes)
            tokens = torch.stack(selection.tokens).to(hidden.dtype)
            return (torch.cat([hidden[:, :prefix], tokens], dim=1), *args[1:]), kwargs

        return merge

    def _spreading(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        """Every token gets what the MLP made of the one that it is part of."""
        if not self._active or "selection" not in self._scratch:
            return None
        selection, prefix = self._scratch["selection"][0], self.tower.prefix
        return torch.cat([output[:, :prefix], attention.take(output, selection.owner + prefix)], dim=1)

    def _leaving(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not self._active or "selection" not in self._scratch:
            return None
        selection, sizes = self._scratch.pop("selection")
        if isinstance(output, tuple):
            return (self._merged(output[0], selection, sizes), *output[1:])
        return self._merged(output, selection, sizes)

    # -- small things ---------------------------------------------------------------------------------------------

    def _merged(self, values: Tensor, selection: Selection, sizes: Tensor) -> Tensor:
        """[B, prefix + N, D] -> [B, prefix + K, D]."""
        prefix = self.tower.prefix
        tokens = selection.merged(values[:, prefix:], sizes).to(values.dtype)
        return torch.cat([values[:, :prefix], tokens], dim=1)

    def _take_over(self, selection: Selection, sizes: Tensor) -> None:
        """Sizes, and signals that were read before, for the tokens that are left."""
        counts = torch.stack([s.new_zeros(len(c)) for s, c in zip(sizes, selection.sources, strict=True)])
        self._scratch["sizes"] = counts.scatter_add_(1, selection.owner, sizes)
        if self.strategy.proportional:
            weights = self._scratch["sizes"].log()
            self._scratch["key_weights"] = torch.nn.functional.pad(weights, (self.tower.prefix, 0))[:, None]
        for key in [key for key in self._scratch if isinstance(key, tuple)]:
            if key[0] in PER_PATCH:
                self._scratch[key] = selection.merged(self._scratch[key], sizes)
            elif key[0] in WITH_PREFIX:
                self._scratch[key] = self._merged(self._scratch[key], selection, sizes)

    def _sizes(self, hidden: Tensor) -> Tensor:
        count = hidden.shape[1] - self.tower.prefix
        self._scratch.setdefault("entered", count)
        return self._scratch.setdefault("sizes", torch.ones(len(hidden), count, device=hidden.device))

    def _signals(self, number: int, hidden: Tensor, sizes: Tensor) -> dict[str, Tensor | None]:
        module = getattr(self.tower.blocks[number], self.tower.attention)
        keys = self._scratch.pop("block_keys").unflatten(-1, (-1, module.head_dim)).float().mean(2)
        cls = hidden[:, 0] if self.tower.prefix else None
        return {"keys": keys[:, self.tower.prefix :], "sizes": sizes, "cls": cls}

    @property
    def _active(self) -> bool:
        return self.pruned.call is not None and bool(self.pruned.call.batch)

    @property
    def _scratch(self) -> dict[Any, Any]:
        return self.pruned.call.scratch
