"""Raw patches: uint8, exactly as the image processor saw them before it normalised them."""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from vtp_plugin.errors import PruningError
from vtp_plugin.surgery.undo import Undo

MEMORY = 64  # processed images that are remembered until the model asks for them
TOLERANCE = 4  # a bf16 value is up to two levels away from the level that it came from


class Pixels:
    """Turns normalised pixel values back into the image processor's uint8 image.

    In fp32 and fp16 the levels are recovered exactly by rounding. bf16 is too coarse for that, so images that were
    seen leaving the processor (`remember`) are matched to what arrives in the model.
    """

    def __init__(self, mean: Any, std: Any) -> None:
        self.mean_and_std = torch.tensor([list(mean), list(std)]).view(2, 3, 1, 1)
        self.seen: deque[Tensor] = deque(maxlen=MEMORY)

    @classmethod
    def of(cls, image_processor: Any) -> Pixels:
        """With the mean and standard deviation of an image processor."""
        if image_processor is None:
            raise PruningError("this strategy looks at raw pixels: pass the model's processor (processor=...)")
        if not getattr(image_processor, "do_normalize", True):
            return cls([0.0] * 3, [1.0] * 3)
        return cls(image_processor.image_mean, image_processor.image_std)

    def remember(self, outputs: Any) -> None:
        """Keep the levels of images that an image processor has just made."""
        for value in outputs["pixel_values"]:
            value = torch.as_tensor(value)
            if value.is_floating_point() and value.ndim >= 3:
                self.seen.extend(self.levels(value.flatten(0, -4) if value.ndim > 3 else value[None]))

    def levels(self, values: Tensor) -> Tensor:
        """Nearest grey levels, [B, 3, H, W] normalised -> uint8."""
        mean, std = self.scale(values.device)
        return ((values.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)

    def scale(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation on a device, copied there once."""
        if self.mean_and_std.device != device:
            self.mean_and_std = self.mean_and_std.to(device)
        return tuple(self.mean_and_std)

    def images(self, values: Tensor) -> Tensor:
        """The uint8 images behind pixel values [B, 3, H, W]."""
        levels = self.levels(values)
        return torch.stack([self._remembered(image) for image in levels]) if values.dtype is torch.bfloat16 else levels

    def _remembered(self, image: Tensor) -> Tensor:
        """The remembered image nearest to one that was recovered from bf16; the recovered one if none is near."""
        best, distance = image, float("inf")
        for other in (seen.to(image.device) for seen in self.seen if seen.shape == image.shape):
            difference = (other.short() - image.short()).abs()
            if difference.amax() <= TOLERANCE and (total := difference.sum().item()) < distance:
                best, distance = other, total
        return best


_WATCHED: dict[int, tuple[Undo, list[Callable[[Any, Any, float], None]]]] = {}  # image processors by identity


def watch(processor: Any, listener: Callable[[Any, Any, float], None]) -> Callable[[], None]:
    """Call listener(images, outputs, seconds) whenever this image processor has run; the answer ends it.

    All listeners of one processor share one wrapper, which goes with the last of them, in whatever order they leave.
    """
    if id(processor) not in _WATCHED:
        undo, listeners = Undo(), []

        def preprocess(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            outputs = original(*args, **kwargs)
            seconds = time.perf_counter() - started
            for each in list(listeners):
                each(args[0] if args else kwargs.get("images"), outputs, seconds)
            return outputs

        original = undo.override(processor, "preprocess", preprocess)
        _WATCHED[id(processor)] = undo, listeners
    undo, listeners = _WATCHED[id(processor)]
    listeners.append(listener)

    def end() -> None:
        listeners.remove(listener)
        if not listeners:
            del _WATCHED[id(processor)]
            undo.close()

    return end


def patches(images: Tensor, size: int) -> Tensor:
    """Raster-ordered patches, [B, 3, H, W] -> [B, N, 3, p, p]; a rest at the border is left out."""
    tiles = images.unfold(2, size, size).unfold(3, size, size)  # [B, 3, rows, cols, p, p]
    return tiles.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


def squares(levels: Tensor, block: int, size: int, video: bool) -> Tensor:
    """Units as larger patches: [K, b * b, 3, t * p, p] -> [K, 3, b * p, b * p]; of a video its frames stacked."""
    split = levels.unflatten(1, (block, block)).unflatten(4, (-1, size))  # [K, b, b, 3, t, p, p]
    split = split if video else split[:, :, :, :, :1]
    return split.permute(0, 3, 4, 1, 5, 2, 6).flatten(5, 6).flatten(2, 4)


def fingerprints(images: Iterable[Tensor]) -> list[int]:
    """Numbers that stand for the content of uint8 images [3, H, W], coarse enough to survive half precision."""
    small = [torch.nn.functional.adaptive_avg_pool2d(image.float(), 8).round().to(torch.uint8) for image in images]
    return [zlib.crc32(one.contiguous().numpy().tobytes()) for one in torch.stack(small).cpu()]


def laid_out(row: Tensor, rows: int, columns: int) -> Tensor:
    """Patches side by side in raster order [C, p, rows columns p] -> the picture [C, rows p, columns p]."""
    return row.unflatten(-1, (rows, columns, -1)).permute(0, 2, 1, 3, 4).flatten(3).flatten(1, 2)
