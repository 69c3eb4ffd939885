"""Selections that one kernel makes from the first pick to the last, on a device that Triton knows: `kernels`.

A kernel that lasts costs one launch instead of a handful per pick, and holds what it knows of the tokens in registers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from vtp_plugin.replay import undisturbed

TOKENS = 4096  # of an image, for which the registers of one program suffice

failed: list[str] = []  # what was said when a kernel did not work; none is tried again


def fused(longest: int) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """A function of tensors, replaced by the one of its name in `kernels` where that works, to the same bits.

    That is on a CUDA device, in fp32, without gradients, for rows of at most `longest` numbers. A kernel that cannot be
    made (no Triton, no C compiler, an old card) is warned of once.
    """

    def decorated(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @wraps(function)
        def called(*args: Any, **kwargs: Any) -> Tensor:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if _possible(tensors, longest):
                try:
                    from vtp_plugin import kernels  # Triton is not everywhere, and takes a while

                    with torch.cuda.device_of(tensors[0]):
                        return getattr(kernels, function.__name__)(*args, **kwargs)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    failed.append(f"{type(error).__name__}: {error}")
                    told = f"greedy selections take longer, kernels of Triton do not work: {failed[-1]}"
                    warnings.warn(told, RuntimeWarning, stacklevel=2)
            return function(*args, **kwargs)

        return called

    return decorated


def _possible(tensors: list[Tensor], longest: int) -> bool:
    return (
        not failed
        and undisturbed(tensors)
        and tensors[0].shape[-1] <= longest
        and all(tensor.numel() and tensor.dtype in (torch.float32, torch.long) for tensor in tensors)
    )
