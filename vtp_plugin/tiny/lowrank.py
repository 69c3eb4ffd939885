"""Low-rank adaptation of a language model (LoRA, arXiv 2106.09685): small factors beside every frozen matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRank(nn.Module):
    """The product of two thin matrices, zero at first, that is added to what a linear layer gives."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / linear.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def add(self, linear: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        """A forward hook."""
        down, up = self.down.to(output.dtype), self.up.to(output.dtype)
        return output + F.linear(F.linear(args[0], down), up)


def adapt(model: nn.Module, rank: int) -> nn.ModuleDict:
    """Freeze a model and hook factors to every linear layer; the factors, by the layers' names with / for dots."""
    model.requires_grad_(False)
    beside = nn.ModuleDict()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            beside[name.replace(".", "/")] = factors = LowRank(module, rank)
            module.register_forward_hook(factors.add)
    return beside


def merged(weights: dict[str, Tensor], factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights with the products added, in their own precision; `factors` are a state of what `adapt` gave."""
    result = dict(weights)
    for key in (key.removesuffix(".up") for key in factors if key.endswith(".up")):
        name = f"{key.replace('/', '.')}.weight"
        product = factors[f"{key}.up"].float() @ factors[f"{key}.down"].float()
        result[name] = (weights[name].float() + product).to(weights[name].dtype)
    return result
