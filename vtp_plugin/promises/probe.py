"""A strategy that can stand anywhere, and what one pruned call of a model did with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtp_plugin.outcomes import Broken
from vtp_plugin.promises.case import Case
from vtp_plugin.promises.reference import Parts
from vtp_plugin.pruning import prune
from vtp_plugin.stages import Stage
from vtp_plugin.strategy import PlacedStrategy
from vtp_plugin.surgery import cache
from vtp_plugin.surgery.call import PruningEvent
from vtp_plugin.tokens import Selection, VisualTokens

NEW = 3  # of the prefill, of a step behind it, and of one that reads what decoding gave the cache
NOISE = 0.01  # on normalised pixel values


@dataclass(kw_only=True)
class Probe(PlacedStrategy):
    """Keep evenly spaced tokens, at any stage."""

    name, paper = "probe", "none"
    places: ClassVar[Sequence[str]] = tuple(stage.value for stage in Stage)
    default_keep_ratio = 0.4

    @property
    def needs(self) -> Sequence[str]:
        return ("pixels",) if self.stage is Stage.PIXELS else ()

    def select(self, visual: VisualTokens) -> Selection:
        n = visual.tokens.shape[1]
        k = self.count(n)
        columns = torch.arange(k, device=visual.index.device) * n // k
        return Selection.of(columns.expand(len(visual.index), k), n)


@dataclass
class Ran:
    """One generation: new logits [steps, B, V], whole sequences [B, L], cuts, and the cache."""

    logits: Tensor
    sequences: Tensor
    events: list[PruningEvent]
    cache: Any

    @property
    def kept(self) -> list[list[int]]:
        """Per image, the positions that the last cut left."""
        found = {number: kept for event in self.events for number, kept in zip(event.images, event.kept, strict=True)}
        return [found[number].tolist() for number in sorted(found)]


def generate(case: Case, inputs: Mapping[str, Any], *probes: Probe, new: int = NEW) -> Ran:
    """Greedy generation of `new` tokens, pruned by the probes, without any of them unpruned."""
    events: list[PruningEvent] = []
    with ExitStack() as stack:
        pruned = stack.enter_context(prune(case.model, list(probes), processor=case.processor)) if probes else None
        output = case.model.generate(
            **{name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()},
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        events += pruned.events if pruned else []
    return Ran(torch.stack(output.logits), output.sequences, events, cache.of_output(output))


@contextmanager
def entering(case: Case) -> Iterator[list[Tensor]]:
    """What the tower's first block is given while the `with` block runs, [T, L, C] or [S, C] for each pass."""
    seen: list[Tensor] = []

    def listen(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    handle = case.adapter.tower.blocks[0].register_forward_pre_hook(listen, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def noisy(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same prompt with pictures of which no two patches are alike; padding, which is zero, stays what it is."""
    draw, told = torch.Generator().manual_seed(7), dict(inputs)
    for name in (name for name in inputs if name.startswith("pixel_values")):
        noise = torch.randn(inputs[name].shape, generator=draw).to(inputs[name])
        told[name] = inputs[name] + NOISE * noise * (inputs[name] != 0)
    return told


def parts_of(case: Case) -> Parts:
    """Where the family says that the model has what the reference looks at."""
    tower = case.adapter.tower
    return Parts(tower.module, tower.blocks[0], case.adapter.language_model, case.adapter.decoder_layers)


def placeholders(case: Case, inputs: Mapping[str, Any]) -> list[Tensor]:
    """The columns of every image of one prompt."""
    images = case.adapter.images(inputs)
    tokens = torch.tensor([image.token or case.adapter.image_token for image in images])
    columns = torch.isin(inputs["input_ids"][0], tokens).nonzero().flatten()
    return list(columns.split([image.total for image in images]))


def dead(whole: Sequence[Tensor], left: Sequence[Tensor]) -> Tensor:
    """Which tokens that enter the tower without pruning do not enter it any more, [T, L] or [S]."""
    if len(whole) != 1:
        raise Broken(f"one prompt makes {len(whole)} passes of the tower, only one can be compared")
    rows = [row.tobytes() for row in whole[0].float().flatten(0, -2).numpy()]
    seen = {row.tobytes() for entered in left for row in entered.float().flatten(0, -2).numpy()}
    if strange := seen - set(rows):
        raise Broken(f"{len(strange)} tokens enter the tower that are none of the picture's: embeddings were changed")
    return torch.tensor([row not in seen for row in rows]).view(whole[0].shape[:-1])
