"""InternVL with code of its own (`trust_remote_code`): InternViT, pixel shuffle, MLP, transformers' Qwen or LLaMA.

`chat` and `batch_chat` write one placeholder per token of a tile and call `generate`, which puts features in their
places and hands embeddings to the language model. Here prompt, mask and features are shortened in front of that, so
that the host merges what is left. Images, tiles and squares of patches are those of transformers' InternVL.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugin.adapter import Adapter, Tower
from vtp_plugin.adapters.internvl import InternVL
from vtp_plugin.contract import TouchPoint
from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.compatibility import TRANSFORMERS
from vtp_plugin.hosts.transformers.contract import SHARED, decoder
from vtp_plugin.signals import BlockView
from vtp_plugin.surgery import asking, lengths
from vtp_plugin.surgery.binding import bound
from vtp_plugin.surgery.call import Call
from vtp_plugin.surgery.columns import Rows
from vtp_plugin.surgery.layout import Block, Layout, class_token_view
from vtp_plugin.surgery.placeholders import Prompt, padding
from vtp_plugin.surgery.rows import RowsLate
from vtp_plugin.surgery.session import Session
from vtp_plugin.surgery.tiles import TiledEarly
from vtp_plugin.surgery.turns import Turn
from vtp_plugin.surgery.undo import Undo

IMAGENET = SimpleNamespace(image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225), do_normalize=True)
TOWER, _At = ".vision_model", partial(TouchPoint, TRANSFORMERS)


def fused_block(block: Block, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BlockView:
    """A block that makes q, k and v at once, called with normed hidden states [B, prefix + N, D]."""
    module, hidden = block.attention, args[0] if args else kwargs["hidden_states"]
    query, key, value = module.qkv(hidden).unflatten(-1, (3, module.num_heads, -1)).unbind(2)  # [B, prefix + N, H, d]
    if module.qk_normalization:  # over all heads at once
        query, key = module.q_norm(query.flatten(-2)).view_as(key), module.k_norm(key.flatten(-2)).view_as(key)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return class_token_view(block, query[:, :, 0], key, lambda: query, lambda: value[:, :, block.prefix :])


def tower_of(vision: nn.Module, config: Any, side: int) -> Tower:
    """Where the tower has its parts, in the checkpoint's code and inside vLLM, for tiles of `side` pixels."""
    patch = config.vision_config.patch_size
    return Tower(
        module=vision,
        embeddings=vision.embeddings,
        patch_embedding=vision.embeddings.patch_embedding,
        blocks=vision.encoder.layers,
        post_layernorm=None,
        prefix=1,
        grid=(side // patch, side // patch),
        patch_size=patch,
        projected=-1,
        attention="attn",
        block=round(1 / config.downsample_ratio),
    )


class InternVLChat(InternVL):
    """The `InternVLChatModel` that comes with InternVL's checkpoints."""

    family = "internvl_chat"
    models = "InternVL (its own code)"
    names = ("InternVLChatModel",)
    facts = {"select_layer": -1, "ps_version": "v2"}
    layout = Layout(TiledEarly, RowsLate, fused_block)
    touches = (
        *SHARED,
        *decoder(".language_model.model"),
        _At(
            ".generate", "calls of the model", takes=("pixel_values", "input_ids", "attention_mask", "visual_features")
        ),
        _At(".", "placeholders of a prompt", has=("img_context_token_id", "mlp1", "config")),
        _At(".language_model.generate", "answers from embeddings", takes=("inputs", "generation_config")),
        _At(".extract_feature", "features of the tiles", takes=("pixel_values",)),
        _At(".pixel_shuffle", "squares of patches", takes=("x", "scale_factor")),
        _At(TOWER, "the vision tower", takes=("pixel_values",), has=("embeddings", "encoder")),
        _At(f"{TOWER}.embeddings.patch_embedding", "patches"),
        _At(f"{TOWER}.encoder.layers.0.attn", "attention rows", has=("qkv", "num_heads", "scale", "qk_normalization")),
    )

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        Adapter.__init__(self, model, processor)
        config = model.config
        self.core, self.projector, self.language_model = model, model.mlp1, model.language_model.model
        self.decoder_layers = self.language_model.layers
        self.tower = tower_of(model.vision_model, config, config.force_image_size or config.vision_config.image_size)

    @classmethod
    def unlike(cls, model: nn.Module) -> str:
        language = type(model.language_model)
        if not language.__module__.startswith("transformers.models."):
            return f"its language model {language.__name__} has code of its own, only transformers' are possible yet"
        return super().unlike(model)

    def install(self, pruned: Session, undo: Undo) -> None:
        self.pruned, self.prompt = pruned, Prompt(pruned, self)
        self.generate = undo.override(self.model, "generate", self._generate)
        self.forward = undo.override(self.model, "forward", self._forward)

    # -- the host's entry points ----------------------------------------------------------------------------------

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        with self.pruned.alone():
            inputs, decoder = bound(self.generate, args, kwargs), self.model.language_model
            images = self.has_images(inputs)
            asking.check(self.pruned, inputs, images, generating=True)
            if images and self.pruned.strategies:
                asking.refuse_settings(decoder, self.pruned.strategies, inputs)
                if inputs.get("visual_features") is not None:
                    raise PruningError("pruning needs pixels: visual_features were never seen by a strategy")
            with self.pruned.calling() as call, torch.no_grad(), lengths.of_the_whole_prompt(decoder, call):
                call.rows = 1 if inputs.get("input_ids") is None else len(inputs["input_ids"])
                if images and inputs.get("visual_features") is None:
                    inputs |= self._shortened(call, inputs)
                return self.generate(**inputs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = bound(self.forward, args, kwargs)
        if self.pruned.strategies and self.has_images(inputs):
            raise PruningError(f"the forward of {self.models} is not pruned: call its chat, batch_chat or generate")
        return self.forward(**inputs)

    def _shortened(self, call: Call, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What is left of a prompt, for the host's merge of text and features."""
        self.image_token = self.model.img_context_token_id
        ids, real = inputs["input_ids"], self.prompt.real(inputs)
        columns, features = self.prompt.shortened(call, inputs)
        if columns is None:
            return {"visual_features": features}
        turn = Turn(self.pruned.number, ids, real, columns, self.pruned.positions.prompt, by_column=False)
        call.positions, call.dropped = turn.table(), columns.length - columns.short
        ids = columns.take(ids, padding(self.model.language_model))
        return {"input_ids": ids, "attention_mask": columns.valid.long(), "visual_features": features}

    # -- its images -----------------------------------------------------------------------------------------------

    def encode(self, call: Call, inputs: Mapping[str, Any]) -> tuple[Tensor, list[Rows]]:
        """Rows of all images [R, D] and which every image has."""
        values, images = inputs["pixel_values"], call.images
        owners = [number for number, image in enumerate(images) for _ in range(image.tiles)]
        facts = {"owners": owners, "lengths": [image.patches for image in images], "values": values, "inputs": inputs}
        with call.in_tower(range(len(images)), **facts):
            tiles = self.model.extract_feature(values)  # [T, n, D]
            pairs = self.pruned.vision.rows(self._by_image(tiles, inputs))
        return torch.cat([rows for rows, _ in pairs]), [kept for _, kept in pairs]

    # -- facts ----------------------------------------------------------------------------------------------------

    @property
    def head(self) -> nn.Module:
        return self.model.language_model.get_output_embeddings()

    @property
    def image_processor(self) -> Any:
        """The processor that was given; without one, the mean and deviation that the family always has."""
        given = super().image_processor
        return given if hasattr(given, "image_mean") else IMAGENET

    @property
    def tokenizer(self) -> Any:
        """The family comes with a tokenizer only, which may stand for the processor."""
        return getattr(self.processor, "tokenizer", self.processor)
