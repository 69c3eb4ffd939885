"""Cuts before, in and behind the vision tower: the pixels, vit and projector stages."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtp_plugin.adapter import Adapter, SharedSpace, Tower
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PruningStrategy
from vtp_plugin.surgery import attention
from vtp_plugin.surgery.call import ROW_SIGNALS, VIEW_SIGNALS, Call
from vtp_plugin.surgery.merging import MASKABLE, MergingBlocks
from vtp_plugin.surgery.pixels import Pixels, fingerprint, patches
from vtp_plugin.surgery.question import EmbeddedQuestions
from vtp_plugin.surgery.undo import Undo
from vtp_plugin.tokens import Selection

if TYPE_CHECKING:
    from vtp_plugin.pruning import Pruned


class VisionCuts:
    """The hooks on one vision tower and its projector. Images of one pass always have equal numbers of tokens."""

    shared_budgets: Collection[Stage] = ()  # where several images of a prompt can share one budget

    def __init__(self, pruned: Pruned, tower: Tower, projector: nn.Module) -> None:
        self.pruned, self.tower, self.projector = pruned, tower, projector
        self.pixels: Pixels | None = None
        self.spaces: dict[tuple[str, str | None, bool], SharedSpace] = {}
        self.merging: list[PruningStrategy] = []  # those that cut inside blocks

    def prepare(self) -> None:
        """Load what the strategies need; raises before anything is attached."""
        self.merging = [s for s in self._at(Stage.VIT) if s.cut_blocks(self._block(None) + 1)]
        for strategy in self.pruned.strategies:
            if strategy.budget == "total" and strategy.stage not in self.shared_budgets:
                raise strategy.error(f"budget=total is not possible at the {strategy.stage.value} stage of this model")
        if self._needing("pixels") or self._needing("fingerprint"):
            self.pixels = Pixels.of(self.pruned.adapter.image_processor)
        for strategy in self._at(Stage.PROJECTOR):
            layer, blocks = strategy.tower_layer, len(self.tower.blocks)
            if layer is not None and not -blocks <= layer < blocks:
                raise strategy.error(f"layer must be in {-blocks} ... {blocks - 1} for this model, got {layer}")
        for strategy in self._needing("text"):
            adapter, checkpoint = self.pruned.adapter, strategy.clip_checkpoint
            llm = strategy.text_encoder == "llm"
            space = EmbeddedQuestions(adapter) if llm else adapter.shared_space(checkpoint)
            space.segments = strategy.segments
            self.spaces[space_of(strategy)] = space

    def install(self, undo: Undo) -> None:
        if self._at(Stage.PIXELS) or self._at(Stage.VIT) or self._needing("fingerprint"):
            undo.after(self.tower.embeddings, self._embedded)
        if self._at(Stage.VIT):
            undo.after(self.tower.patch_embedding, self._patches_embedded)
        self._install_readers(undo)
        for strategy in self.merging:
            MergingBlocks(self.pruned, self.tower, strategy, self._block(None) + 1).install(undo)
        if self._at(Stage.PROJECTOR):
            undo.before(self.projector, self._projecting)

    def _install_readers(self, undo: Undo) -> None:
        for layer in self._read_blocks():
            undo.before(getattr(self.tower.blocks[layer], self.tower.attention), self._row_reader(layer))
        outputs = {
            self._layer(s)
            for s in self._at(Stage.PROJECTOR)
            if "aligned" in s.needs and "aligned" not in behind_projector(s)
        }
        outputs |= {self._block(None) for s in self._at(Stage.PROJECTOR) if "cls" in s.needs}
        for layer in outputs:
            undo.after(self.tower.blocks[layer], self._output_reader(layer))

    def _read_blocks(self) -> set[int]:
        """The blocks whose attention is read."""
        return {self._layer(s) for s in self._at(Stage.PROJECTOR) if set(s.needs) & set(ROW_SIGNALS)}

    def lacking(self, strategy: PruningStrategy) -> str:
        """Why this tower cannot give the strategy what it needs; "" if it can."""
        adapter = self.pruned.adapter
        asks = {"aligned", "text"} & set(strategy.needs) and strategy.text_encoder != "llm"
        if asks and type(adapter).shared_space is Adapter.shared_space:
            return (
                f"{adapter.models} has no CLIP text encoder that matches its vision tower; text_encoder=llm compares "
                f"with the language model's embeddings of the question instead"
            )
        if "class_query" in strategy.needs and not self.tower.prefix:
            return f"it needs a class token, the vision tower of {adapter.models} has none"
        return self._unmergeable(strategy) if strategy.cut_blocks(self._block(None) + 1) else ""

    def _unmergeable(self, strategy: PruningStrategy) -> str:
        """Why tokens cannot be merged inside the blocks; "" if they can."""
        if self.tower.between is None:
            return f"merging inside the blocks is not possible in the tower of {self.pruned.adapter.models}"
        kernel = self.tower.module.config._attn_implementation
        if strategy.proportional and kernel not in MASKABLE:
            return (
                f"proportional attention needs a tower with {' or '.join(MASKABLE)} attention, this one has {kernel}; "
                f"say proportional=false"
            )
        return ""

    # -- pixels and vit -------------------------------------------------------------------------------------------

    def _patches_embedded(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        if self._active:
            self._call.scratch["embedded"] = output.flatten(2).transpose(1, 2)  # [B, N, D]

    def _embedded(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        """Cut [B, prefix + N, D] on its way into the first block."""
        if not self._active:
            return None
        values = args[0] if args else kwargs["pixel_values"]
        images = self.pixels.images(values) if self.pixels else None
        self._identify(images)
        columns, made = self._every_patch(output), False
        for strategy in self._at(Stage.PIXELS) + [s for s in self._at(Stage.VIT) if s not in self.merging]:
            selection = self._cut_patches(strategy, columns, values, images, output)
            if selection.places is not None:
                values, output = self._remade(selection, values, output)
                columns, made = self._every_patch(output), True
            else:
                columns = columns.gather(1, torch.stack(selection.sources))
        if made and columns.shape[1] + self.tower.prefix == output.shape[1]:
            return output
        if columns.shape[1] + self.tower.prefix == output.shape[1]:
            return None
        return torch.cat([output[:, : self.tower.prefix], attention.take(output, columns + self.tower.prefix)], dim=1)

    def _cut_patches(
        self, strategy: PruningStrategy, columns: Tensor, values: Tensor, images: Tensor | None, output: Tensor
    ) -> Selection:
        """What one more strategy leaves of the patches in `columns` [B, N]."""
        with self.pruned.judging(strategy) as cut:
            signals = {}
            if strategy.stage is Stage.PIXELS:
                signals["pixels"] = attention.take(patches(images, self.tower.patch_size), columns)
                tokens = signals["pixels"].flatten(2)
            else:
                tokens = attention.take(self._call.scratch["embedded"], columns)
                signals["centered"] = self._centered(values, columns) if "centered" in strategy.needs else None
                signals["positioned"] = attention.take(output, columns + self.tower.prefix)
            return cut.decide(tokens, self._call.batch, self.tower.grid, signals)

    def _remade(self, selection: Selection, values: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Pixel values (one row of patches) and embeddings [B, prefix + K, D] of new patches at new places."""
        size, embed = self.tower.patch_size, self.tower.patch_embedding
        mean, std = self.pixels.mean.to(values.device), self.pixels.std.to(values.device)
        tiles = torch.stack(selection.tokens).unflatten(2, (3, size, size)).permute(0, 2, 3, 1, 4).flatten(3)
        row = ((tiles.float() / 255 - mean) / std).to(embed.weight.dtype)  # [B, 3, p, K p]
        nothing = torch.zeros_like(values[:1], dtype=embed.weight.dtype)
        blank = embed.forward(nothing).flatten(2).transpose(1, 2)  # a bias, if the family has one
        table = (self.tower.embeddings.forward(nothing)[:, self.tower.prefix :] - blank)[0].float()
        where = torch.stack([interpolated(table, self.tower.grid, places) for places in selection.places])
        embedded = embed.forward(row).flatten(2).transpose(1, 2)
        if "embedded" in self._call.scratch:
            self._call.scratch["embedded"] = embedded
        new = (embedded.float() + where).to(output.dtype)
        return row, torch.cat([output[:, : self.tower.prefix], new], dim=1)

    def _centered(self, values: Tensor, columns: Tensor) -> Tensor:
        """Embeddings of the patches without their mean colour, [B, K, D]."""
        size = self.tower.patch_size
        mean = torch.nn.functional.avg_pool2d(values.float(), size)
        flat = values.float() - mean.repeat_interleave(size, 2).repeat_interleave(size, 3)
        embedded = self.tower.patch_embedding.forward(flat.to(self.tower.patch_embedding.weight.dtype))
        return attention.take(embedded.flatten(2).transpose(1, 2), columns)

    def _every_patch(self, output: Tensor) -> Tensor:
        n = output.shape[1] - self.tower.prefix
        return torch.arange(n, device=output.device).expand(len(output), n)

    def _identify(self, images: Tensor | None) -> None:
        if self._needing("fingerprint"):
            for number, image in zip(self._call.batch, images, strict=True):
                self._call.images[number].fingerprint = fingerprint(image)

    # -- projector ------------------------------------------------------------------------------------------------

    def _row_reader(self, layer: int) -> Any:
        """Reads attention signals where block `layer` begins."""

        def read(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._active:
                return
            hidden = args[0] if args else kwargs["hidden_states"]  # [B, 1 + N, D], normed
            with torch.no_grad(), self.pruned.timed("selector"):
                keys = attention.heads(module, "k_proj", hidden)  # [B, H, 1 + N, d]
                if self.tower.prefix:
                    query = attention.heads(module, "q_proj", hidden[:, :1])[:, :, 0]  # [B, H, d]
                    bias = self._call.scratch.get("key_weights")
                    weights = attention.row(query, keys, attention.scale(module), bias=bias)
                else:  # no class token: the attention that a patch receives from all of them
                    weights = attention.received(
                        attention.heads(module, "q_proj", hidden), keys, attention.scale(module)
                    )
            self._call.scratch["cls_attention", layer] = weights[:, self.tower.prefix :]
            self._call.scratch["keys", layer] = keys.float().mean(1)[:, self.tower.prefix :]
            if self._needing("raw_keys"):
                self._call.scratch["raw_keys", layer] = keys.transpose(1, 2).flatten(2).float()[:, self.tower.prefix :]
            if self.tower.prefix:
                self._call.scratch["class_query", layer] = query.flatten(1).float()
                self._call.scratch["class_key", layer] = keys[:, :, 0].flatten(1).float()

        return read

    def _output_reader(self, layer: int) -> Any:
        """Keeps the output of block `layer`."""

        def read(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self._active:
                self._call.scratch["output", layer] = output[0] if isinstance(output, tuple) else output

        return read

    def _projecting(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], Any] | None:
        """Cut [B, N, D] on its way into the projector."""
        if not self._active:
            return None
        tokens, *rest = args
        columns = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[:2])
        for strategy in self._at(Stage.PROJECTOR):
            selection = self._cut_features(strategy, tokens, columns)
            if not selection.keeps_all:
                tokens = torch.stack(selection.apply(tokens))
                columns = columns.gather(1, torch.stack(selection.sources).clamp(min=0))
        return (tokens, *rest), kwargs

    def _cut_features(self, strategy: PruningStrategy, tokens: Tensor, columns: Tensor) -> Selection:
        with self.pruned.judging(strategy) as cut:
            behind = behind_projector(strategy)
            wanted = [name for name in strategy.needs if name not in ("fingerprint", *behind)]
            signals = {name: self._signal(name, strategy, columns) for name in wanted}
            if behind:
                with torch.no_grad():
                    projected = self.projector.forward(tokens)  # without hooks: not yet the host's turn
                signals |= dict.fromkeys(behind, projected)
            return cut.decide(tokens, self._call.batch, self.tower.grid, signals)

    def _signal(self, name: str, strategy: PruningStrategy, columns: Tensor) -> Tensor | None:
        """One field of VisualTokens for the tokens that are left."""
        layer, call = self._layer(strategy), self._call
        if name in VIEW_SIGNALS:
            return None
        if name == "heads":
            return self._heads(layer)
        if name in ("class_query", "class_key"):
            return call.scratch.get((name, layer))
        if name in ROW_SIGNALS:
            return attention.take(call.scratch[name, layer], columns)
        if name == "cls":
            if not self.tower.prefix:
                return None
            return call.scratch["output", self._block(None)][:, 0]
        space = self.spaces[space_of(strategy)]
        if name == "text":
            return space.text([call.images[i].question for i in call.batch]).to(columns.device)
        hidden = attention.take(call.scratch["output", layer], columns + self.tower.prefix)
        return space.patches(self.tower.post_layernorm(hidden))

    # -- small things ---------------------------------------------------------------------------------------------

    @property
    def _call(self) -> Call:
        return self.pruned.call

    @property
    def _active(self) -> bool:
        return self.pruned.call is not None and bool(self.pruned.call.batch)

    def _at(self, stage: Stage) -> list[PruningStrategy]:
        return [s for s in self.pruned.strategies if s.stage is stage]

    def _needing(self, signal: str) -> Sequence[PruningStrategy]:
        return [s for s in self.pruned.strategies if signal in s.needs]

    def _heads(self, layer: int) -> int:
        """Attention heads of a block."""
        return getattr(self.tower.blocks[layer], self.tower.attention).num_heads

    def _layer(self, strategy: PruningStrategy) -> int:
        return self._block(strategy.tower_layer)

    def _block(self, layer: int | None) -> int:
        """A block number counted from the first."""
        blocks = len(self.tower.blocks)
        layer = self.tower.projected if layer is None else layer
        return layer + blocks if layer < 0 else layer


def space_of(strategy: PruningStrategy) -> tuple[str, str | None, bool]:
    """Which space a strategy compares patches and questions in, and what it does with long questions."""
    return strategy.text_encoder, strategy.clip_checkpoint, strategy.segments


def behind_projector(strategy: PruningStrategy) -> list[str]:
    """The signals of a strategy that are what the projector makes of the tokens."""
    names = ("projected", *(["aligned"] if strategy.text_encoder == "llm" else []))
    return [name for name in names if name in strategy.needs]


def interpolated(table: Tensor, grid: tuple[int, int], places: Tensor) -> Tensor:
    """Bilinear interpolation of position embeddings [N, D] at places [K, 2] (row, column) of the grid, [K, D]."""
    sides = torch.tensor(grid, device=places.device)
    places = places.clamp(min=0).minimum(sides - 1.0)
    low = places.floor().long()
    high, share = (low + 1).minimum(sides - 1), places - low
    total = torch.zeros(len(places), table.shape[1], device=table.device)
    for rows, down in ((low[:, 0], 1 - share[:, 0]), (high[:, 0], share[:, 0])):
        for cols, across in ((low[:, 1], 1 - share[:, 1]), (high[:, 1], share[:, 1])):
            total += (down * across)[:, None] * table[rows * grid[1] + cols]
    return total
