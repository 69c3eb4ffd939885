"""Peaks of live bytes on the pretend device, of models that are wide enough for a picture to matter less than a layer.

Published shapes at a quarter of their width and half of their depth, heads and pictures as large as they are; bf16, one
prompt of one picture, one new token. So maps of all pairs of tokens weigh four times as much beside a layer as they do
in the real model. Weights are not multiplied (see `pretend.Device`): a peak costs seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from families import Processor
from pretend import Device
from torch import nn
from transformers.initialization import no_init_weights

import vtp_plugin as vtp
from vtp_plugin import PruningStrategy, Stage, plugins
from vtp_plugin.errors import PruningError
from vtp_plugin.hosts.transformers.shapes import Shape, shape_of

MODELS = {"llava-1.5-7b": "LLaVA-1.5", "llava-next-7b": "LLaVA-NeXT", "qwen2.5-vl-7b": "Qwen2.5-VL"}
PART = 4  # a quarter
FEW = 1 / 16  # a share of the tokens that greedy methods have soon
MERGED = 1 / 4  # what two blocks, of three in the tower, can leave by merging pairs
SIZES = ("hidden_size", "intermediate_size", "out_hidden_size")
SIZES += ("num_attention_heads", "num_key_value_heads", "num_heads")
BLOCKS = {"num_hidden_layers": 3, "depth": 3, "fullatt_block_indexes": [2]}  # of the tower, where nothing adds up


def shape(name: str, part: int = PART) -> Shape:
    """A published shape at one `part`th of its width and half of its depth, with three blocks in the tower."""
    whole = shape_of(name)
    vision, text = (
        {name: size // part if name in SIZES else size for name, size in sizes.items()}
        for sizes in (whole.vision, whole.text)
    )
    depth = {"num_hidden_layers": text["num_hidden_layers"] // 2}
    return replace(whole, vision=vision | {k: v for k, v in BLOCKS.items() if k in vision}, text=text | depth)


def peaks(shape: Shape, keep: float | None = None, strategies: Iterable[str] = ()) -> Iterator[tuple[str | None, int]]:
    """Of the unpruned model (None) and of every strategy, or those named, that it can run: the most bytes of one call.

    `keep`: the share of the tokens that is left, where a method has no other label for it; None: its default.
    """
    model = drawn(shape)
    inputs = shape.inputs(model, 1)
    with Device(lazy=True) as device:
        device.move(model)
        for name in [None, *(strategies or plugins.strategies())]:
            given = device.put(inputs)
            try:
                attached = name and vtp.prune(model, fitting(name, keep), processor=Processor())
            except PruningError:  # what the family has not
                continue
            with device.counting() as counts:
                model.generate(**given, do_sample=False, max_new_tokens=1)
            if attached:
                attached.detach()
            yield name, counts.peak_bytes - counts.before_bytes


def drawn(shape: Shape) -> nn.Module:
    """A model whose embeddings and norms have values; nobody reads the other weights."""
    with no_init_weights():
        model = shape.build(None, torch.device("cpu"), torch.bfloat16, "sdpa")
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            nn.init.constant_(weight, float("norm" in name and "bias" not in name))
        elif "embed" in name:
            nn.init.normal_(weight, std=0.1)
    return model


def fitting(name: str, keep: float | None) -> PruningStrategy:
    """A strategy at its defaults but for the budget, at layers that a short model has."""
    cls, words = vtp.get_strategy(name), {"text_encoder": "llm", "shallow": 1}
    given: dict[str, Any] = {field: value for field, value in words.items() if field in cls.fields()}
    if cls.stage is Stage.LLM and "layer" in cls.fields():
        given["layer"] = 2
    if keep is not None and cls.budgeted and not cls.nominal:
        given["keep_ratio"] = max(keep, MERGED) if cls.merges and cls.stage is Stage.VIT else keep
    return cls(**given)
