"""BLIP-2: EVA tower, Q-Former, OPT or T5. The Q-Former asks the tower's tokens with a fixed number of queries.

So the prompt never gets shorter: pixels and vit cut inside the tower, projector cuts what the Q-Former attends to (the
class token always stays). Where images keep unequal numbers, the shorter ones are filled up and masked.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vtp_plugin.adapter import Adapter, Tower
from vtp_plugin.errors import PruningError
from vtp_plugin.facts.costs import matrices
from vtp_plugin.hosts.transformers.contract import FAMILIES
from vtp_plugin.signals import BlockView
from vtp_plugin.stages import Stage
from vtp_plugin.surgery.batching import stacked
from vtp_plugin.surgery.call import Image
from vtp_plugin.surgery.layout import Block, Layout, class_token_view
from vtp_plugin.surgery.passes import TowerPass
from vtp_plugin.surgery.session import Session
from vtp_plugin.surgery.undo import Undo
from vtp_plugin.surgery.whole import WholeEarly, WholeLate


class Blip2(Adapter):
    """transformers' BLIP-2 with a language model."""

    family = "blip2"
    touches = FAMILIES["blip2"]
    models = "BLIP-2"
    names = ("Blip2ForConditionalGeneration",)
    uniform = True
    stages = {
        Stage.PIXELS: "",
        Stage.VIT: "",
        Stage.PROJECTOR: "",
        Stage.LLM: "its language model sees the queries of the Q-Former, which belong to no place of the image",
    }

    fixed_positions = "the Q-Former always answers with the same number of tokens"

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__(model, processor)
        vision = model.vision_model
        side = vision.config.image_size // vision.config.patch_size
        self.tower = Tower(
            module=vision,
            embeddings=vision.embeddings,
            patch_embedding=vision.embeddings.patch_embedding,
            blocks=vision.encoder.layers,
            post_layernorm=vision.post_layernorm,
            prefix=1,
            grid=(side, side),
            patch_size=vision.config.patch_size,
            projected=-1,
        )
        self.layout = Layout(WholeEarly, QueriedLate, fused_block)
        self.projector = model.qformer
        self.language_model = model.language_model
        decoder = getattr(getattr(model.language_model, "model", None), "decoder", None)
        self.decoder_layers = decoder.layers if decoder is not None else ()  # T5: nothing is counted

    def install(self, pruned: Session, undo: Undo) -> None:
        self.pruned = pruned
        self.encode = undo.override(self.tower.module, "forward", self._encode)
        for name in ("generate", "forward"):
            undo.override(self.model, name, self._calling(getattr(self.model, name)))

    def _calling(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.pruned.call is not None:
                return original(*args, **kwargs)
            with self.pruned.calling() as call:
                prompt = signature.bind(*args, **kwargs).arguments
                call.valid = _real(prompt.get("input_ids"), prompt.get("attention_mask"))
                call.rows = 1 if call.valid is None else len(call.valid)
                return original(*args, **kwargs)

        return call

    def _encode(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The tower, image by image where they may keep unequal numbers; zeros at the end of the shorter ones."""
        call = self.pruned.call
        if call is None:
            return self.encode(pixel_values, *args, **kwargs)
        if kwargs.get("interpolate_pos_encoding"):
            raise PruningError("blip2: images of another size than the model's cannot be pruned")
        raster = torch.arange(self.tower.grid[0] * self.tower.grid[1], device=pixel_values.device)
        everything = list(range(len(pixel_values)))
        call.images = [Image(total=len(raster), index=raster, sample=number) for number in everything]
        outputs = []
        for batch in [[number] for number in everything] if self.pruned.one_by_one else [everything]:
            with call.in_tower(batch) as passing:
                outputs.append(self.encode(pixel_values[batch], *args, **{**kwargs, "return_dict": True}))
            call.waiting |= {number: passing.of_image(number) for number in batch}  # the Q-Former is asked later
        return stacked(outputs)

    # -- what FLOPs are counted from ------------------------------------------------------------------------------

    @property
    def projectors(self) -> Sequence[nn.Module]:
        return ()

    def reading_macs(self, tokens: int) -> int:
        """The Q-Former on an image's tokens and the class token, and the projection of its queries."""
        queries = self.model.query_tokens.shape[1]
        layers = sum(_layer_macs(layer, queries, tokens + 1) for layer in self.projector.encoder.layer)
        return layers + queries * matrices(self.model.language_projection)


def fused_block(block: Block, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BlockView:
    """A block whose attention makes q, k and v at once, called with normed hidden states [B, 1 + N, D]."""
    module = block.attention
    hidden = args[0] if args else kwargs["hidden_states"]
    split = module.qkv(hidden).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [3, B, H, 1 + N, d]
    query, keys, values = split[0], split[1], split[2][:, :, block.prefix :]
    return class_token_view(block, query[:, :, 0], keys, lambda: query, lambda: values)


class QueriedLate(WholeLate):
    """Cuts in front of a Q-Former, which takes tokens [B, 1 + N, D] and a mask by keyword."""

    def install(self, undo: Undo) -> None:
        undo.before(self.family.projector, self._masking)

    def _masking(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        call = self.call
        if call is None or not call.images:
            return None
        hidden, kept = kwargs["encoder_hidden_states"], []
        for number, image in enumerate(call.images):
            with call.passing(call.waiting.pop(number, TowerPass([number]))):
                kept.append(self._one(hidden[number, : 1 + len(image.index)]))
        return args, {**kwargs, **_padded(kept)}

    def _one(self, tokens: Tensor) -> Tensor:
        """The class token and what is left of one image, [1 + N, D] -> [1 + K, D]."""
        return torch.cat([tokens[:1], self.cut(tokens[None, 1:])[0]])


def _real(ids: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Which columns of a prompt are no padding, [B, L] bool."""
    if mask is not None:
        return mask.bool()
    return None if ids is None else torch.ones_like(ids, dtype=torch.bool)


def _layer_macs(layer: nn.Module, queries: int, tokens: int) -> int:
    """One layer of a Q-Former: its queries see each other, in some layers the tokens, and pass their own MLP."""
    width = layer.attention.attention.query.out_features
    per_query = matrices(layer.attention) + matrices(layer.intermediate_query) + matrices(layer.output_query)
    macs = queries * per_query + 2 * queries**2 * width
    if not layer.has_cross_attention:
        return macs
    cross = layer.crossattention
    read = matrices(cross.attention.key) + matrices(cross.attention.value)
    return macs + queries * (matrices(cross) - read) + tokens * read + 2 * queries * tokens * width


def _padded(kept: list[Tensor]) -> dict[str, Tensor]:
    """Tokens [n, D] of every image as one batch [B, longest, D], and the mask of the real ones [B, longest]."""
    lengths = torch.tensor([len(rows) for rows in kept], device=kept[0].device)
    hidden = pad_sequence(kept, batch_first=True)
    mask = (torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]).long()
    return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}
