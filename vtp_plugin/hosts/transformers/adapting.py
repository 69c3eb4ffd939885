"""Low-rank adaptation of an encoder to what pruning leaves of its patches: peft, image features as the only teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtp_plugin.hosts.transformers.zero_shot import ZeroShot
from vtp_plugin.pruning import prune
from vtp_plugin.strategy import PruningStrategy

TARGETS = r".*vision_model.*\.(q_proj|v_proj)"  # of the tower alone, as LoRA's paper adapts: queries and values


@dataclass(frozen=True)
class Plan:
    """How long and how freely is learned."""

    rank: int
    rate: float  # of learning, falling to zero in a straight line
    batch: int
    epochs: int
    seed: int


def adapt(
    encoder: ZeroShot, pictures: Sequence[Any], targets: Tensor, strategies: Sequence[PruningStrategy], plan: Plan
) -> list[float]:
    """Let the pruned encoder learn the unpruned one's unit features `targets` [P, D]; the loss 1 - cosine per step.

    The encoder's own weights stay as they are; its adapters are part of it afterwards.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(plan.seed)
    model = get_peft_model(encoder.model, LoraConfig(r=plan.rank, lora_alpha=2 * plan.rank, target_modules=TARGETS))
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(learned, plan.rate, weight_decay=0.0), []
    batches = list(_batches(len(pictures), plan))
    encoder.model.train()
    with prune(encoder.model, list(strategies), processor=encoder.processor):
        for step, chosen in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = plan.rate * (1 - step / len(batches))
            found = encoder.embedded(encoder.values([pictures[number] for number in chosen]))
            loss = 1 - (found * targets[torch.tensor(chosen)]).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    encoder.model.eval()
    return losses


def _batches(count: int, plan: Plan) -> Iterator[list[int]]:
    """The pictures in another order every time; the last batch may be smaller."""
    draw = torch.Generator().manual_seed(plan.seed)
    for _ in range(plan.epochs):
        yield from (part.tolist() for part in torch.randperm(count, generator=draw).split(plan.batch))
