"""The embedded models' weights in the package: once, in half precision, without loss as small as they get."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = Path(__file__).parent / "weights"
FILES = ("model.safetensors", "tokenizer.model", "clip/vocab.json", "clip/merges.txt")
CLIP_FACTORS = "clips.safetensors"  # of the video model
QWEN_WEIGHTS = "qwen.safetensors"  # of the model with a merger


def load_weights(*parts: str, prefixed: bool = False) -> dict[str, Tensor]:
    """Tensors of some of the parts `clip`, `projector`, `llama`; of a single one by their names within the part."""
    found = {name: value for name, value in read(WEIGHTS / FILES[0]).items() if name.split(".")[0] in parts}
    return {name.split(".", 1)[1] if len(parts) == 1 and not prefixed else name: found[name] for name in found}


def export(clip, projector, llama, source: Path, target: Path = WEIGHTS) -> None:
    """Store trained networks in the package, once, in half precision."""
    parts = {"clip": clip, "projector": projector, "llama": llama}
    state = {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}
    (target / "clip").mkdir(parents=True, exist_ok=True)
    write(target / FILES[0], state)
    for file in FILES[1:]:
        shutil.copy(source / file, target / file)


def write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Tensors in half precision: `low`, the lower bytes of all numbers, and `high`, the upper ones, compressed.

    The upper bytes hold sign and exponent, which are much alike; the lower ones are as good as random.
    """
    import torch
    from safetensors.torch import save_file

    flat = torch.cat([value.detach().cpu().half().flatten() for value in tensors.values()])
    low, high = (part.contiguous() for part in flat.view(torch.uint8).unflatten(0, (-1, 2)).unbind(1))
    small = torch.frombuffer(bytearray(zlib.compress(high.numpy().tobytes(), 9)), dtype=torch.uint8)
    shapes = json.dumps({name: list(value.shape) for name, value in tensors.items()})
    save_file({"low": low, "high": small}, file, metadata={"shapes": shapes})


def read(file: Path) -> dict[str, Tensor]:
    """Tensors that `write` stored, in half precision."""
    import torch
    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        shapes = json.loads(stored.metadata()["shapes"])
        low, small = stored.get_tensor("low"), stored.get_tensor("high")
    high = torch.frombuffer(bytearray(zlib.decompress(small.numpy().tobytes())), dtype=torch.uint8)
    flat = torch.stack([low, high], 1).flatten().view(torch.float16)
    parts = flat.split([torch.Size(shape).numel() for shape in shapes.values()])
    return {name: part.view(shape).clone() for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def read_parts(file: Path, *parts: str) -> dict[str, dict[str, Tensor]]:
    """The same part by part, each by its names within the part."""
    stored = read(file)
    return {
        part: {name.removeprefix(f"{part}."): value for name, value in stored.items() if name.startswith(f"{part}.")}
        for part in parts
    }
