"""MiniCPM-V merges inside its tower: what is read in its blocks belongs to the tokens of the prompt all the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from families import FAMILIES, Processor, pixels
from family_runs import batched, model_of, prompts_of
from torch import Tensor, nn

import vtp_plugin as vtp
from vtp_plugin import PruningStrategy, Selection, Stage, VisualTokens
from vtp_plugin.reporting.observations import Observer

pytestmark = pytest.mark.skipif("minicpmv4_6" not in FAMILIES, reason="transformers 5.19 or later")


@dataclass(kw_only=True)
class Spy(PruningStrategy):
    """Keeps everything, and the attention that it was told."""

    name, stage, paper, needs = "spy", Stage.PROJECTOR, "none", ("cls_attention",)
    budgeted: ClassVar[bool] = False
    block: int = -1
    told: list[Tensor] = field(default_factory=list)

    @property
    def tower_layer(self) -> int:
        return self.block

    def select(self, visual: VisualTokens) -> Selection:
        self.told.extend(visual.cls_attention)
        return Selection.everything(visual.index)


def received(attention: nn.Module, hidden: Tensor) -> list[float]:
    """What every token of one picture [n, D] receives, mean over heads and queries, times n: one query at a time."""
    n, heads = len(hidden), attention.num_heads
    q, k = (getattr(attention, name)(hidden).view(n, heads, -1) for name in ("q_proj", "k_proj"))
    total = torch.zeros(n)
    for query in range(n):
        for head in range(heads):
            total += (k[:, head] @ q[query, head] * attention.head_dim**-0.5).softmax(0) / heads
    return total.tolist()


def squares(values: list[float], rows: int, columns: int, side: int) -> list[float]:
    """Means over squares of a picture's tokens in raster order."""
    found = []
    for top in range(0, rows, side):
        for start in range(0, columns, side):
            places = [(top + r) * columns + start + c for r in range(side) for c in range(side)]
            found.append(sum(values[place] for place in places) / len(places))
    return found


@pytest.mark.parametrize("name", ["minicpmv4_6", "minicpmv4_7"])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize(("block", "side"), [(0, 4), (1, 4), (2, 2), (-1, 2)])  # merged 2 x 2 behind the second
def test_attention_in_the_tower_is_told_of_the_right_token(name: str, cut: bool, block: int, side: int) -> None:
    model, spy, entered = model_of(name, "sdpa"), Spy(block=block), []
    attention = model.model.vision_tower.encoder.layers[block].self_attn
    inputs = batched(FAMILIES[name], prompts_of(name, "batch"))

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        entered.append(kwargs["hidden_states"][0])

    with torch.no_grad(), vtp.prune(model, ["l2", spy] if cut else spy, processor=Processor()) as pruned:
        handle = attention.register_forward_pre_hook(enter, with_kwargs=True)
        model(**inputs)
        handle.remove()
        grids = [(rows // 4, columns // 4) for rows, columns in inputs["target_sizes"].tolist()]
        if cut:  # a picture is a single row of what is left of it
            grids = [(1, count) for count in pruned.events[0].after]
    pictures = entered[0].split([rows * columns * side**2 for rows, columns in grids])
    assert len(spy.told) == len(pictures) == 3
    for told, hidden, (rows, columns) in zip(spy.told, pictures, grids, strict=True):
        with torch.no_grad():
            expected = squares(received(attention, hidden), rows * side, columns * side, side)
        torch.testing.assert_close(told, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_every_picture_of_a_prompt_can_be_looked_at() -> None:
    """Patches lie side by side; what is shown are the levels that they were made of."""
    family, found = FAMILIES["minicpmv4_6"], []
    inputs = family.batch([family.sample(0, 2)])
    with vtp.prune(model_of("minicpmv4_6", "sdpa"), "stride", processor=Processor()) as pruned, torch.no_grad():
        observer = Observer(pruned)
        pruned.finished.append(lambda call: found.extend(observer.observe(call)))
        pruned.model(**inputs)
    for number, (rows, columns) in enumerate(inputs["target_sizes"].tolist()):
        levels = (pixels(3, rows * 4, columns * 4, seed=number) * 0.25 + 0.5) * 255
        assert torch.equal(found[number].pixels, levels.round().to(torch.uint8))
