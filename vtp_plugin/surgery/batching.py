"""Images that are alike are worked on together, and what the host knows travels in one copy.

A device is asked for every operator separately: eight images one by one cost eight times what they cost at once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


def alike(facts: Sequence[Hashable]) -> list[list[int]]:
    """The numbers of those with equal facts, in the order in which they come first."""
    groups: dict[Hashable, list[int]] = {}
    for number, fact in enumerate(facts):
        groups.setdefault(fact, []).append(number)
    return list(groups.values())


def moved(indices: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Whole numbers [n] of the host on a device, in one copy that nobody waits for."""
    if not indices:
        return ()
    every = torch.cat(list(indices))
    if device.type == "cuda" and torch.cuda.is_available():
        every = every.pin_memory()  # else the copy waits for everything that the device was given before
    return every.to(device, non_blocking=True).split([len(index) for index in indices])


def at_once(find: Callable[..., Tensor], *values: Sequence[Tensor]) -> list[Tensor]:
    """find(values of some images [G, ...], ...) of all images whose values have equal shapes; per image."""
    found: dict[int, Tensor] = {}
    for numbers in alike([tuple(value.shape for value in own) for own in zip(*values, strict=True)]):
        found |= zip(numbers, find(*(torch.stack([of[n] for n in numbers]) for of in values)), strict=True)
    return [found[number] for number in range(len(values[0]))]


def joined(values: Sequence[Any]) -> Any:
    """Signals of several images or groups one after the other: tensors [1, ...], or a tuple of one for each."""
    if len(values) == 1 or values[0] is None:
        return values[0]
    return torch.cat(list(values)) if isinstance(values[0], Tensor) else sum(map(tuple, values), ())


def stacked(parts: Sequence[Any]) -> Any:
    """What a host answers of several images from what it answers of each, shorter ones filled up with zeros.

    Tensors [b, ...], tuples of these by layer, and outputs by name; None where nothing was asked for.
    """
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, Mapping):
        return type(first)({name: stacked([part[name] for part in parts]) for name in first})
    if isinstance(first, tuple):
        return tuple(stacked(layer) for layer in zip(*parts, strict=True))
    longest = [max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True)]
    missing = [[(0, most - size) for size, most in zip(part.shape, longest, strict=True)][:0:-1] for part in parts]
    return torch.cat([pad(part, sum(more, ())) for part, more in zip(parts, missing, strict=True)])
