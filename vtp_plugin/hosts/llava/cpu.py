"""The authors' `llava` package on a machine without CUDA.

Its loader always makes fp16 weights and its users always cast images to fp16. On a CPU the weights are turned into
fp32 here, and images are cast where they enter the model; everything is on the instance.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn


def run_on_cpu(model: nn.Module) -> None:
    """Make a LlavaLlamaForCausalLM in fp16 run in fp32, images of any precision accepted."""
    model.float()
    original = model.encode_images

    @wraps(original)
    def encode_images(images: Tensor) -> Any:
        return original(images.to(next(model.parameters()).dtype))

    model.encode_images = encode_images


def needs_care(model: nn.Module) -> bool:
    """Whether a model of the package is in half precision, on a CPU."""
    weight = next(model.parameters())
    return weight.device.type == "cpu" and weight.dtype is torch.float16
