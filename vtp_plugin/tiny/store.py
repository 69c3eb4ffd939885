"""The embedded models' weights in the package: once, in half precision."""

from __future__ import annotations

import shutil
from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
FILES = ("model.safetensors", "tokenizer.model", "clip/vocab.json", "clip/merges.txt")
CLIP_FACTORS = "clips.safetensors"  # of the video model
QWEN_WEIGHTS = "qwen.safetensors"  # of the model with a merger


def load_weights(*parts: str, prefixed: bool = False) -> dict:
    """Tensors of some of the parts `clip`, `projector`, `llama`; of a single one by their names within the part."""
    from safetensors import safe_open

    with safe_open(WEIGHTS / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.split(".")[0] in parts]  # noqa: SIM118
        return {
            name.split(".", 1)[1] if len(parts) == 1 and not prefixed else name: file.get_tensor(name) for name in names
        }


def export(clip, projector, llama, source: Path, target: Path = WEIGHTS) -> None:
    """Store trained networks in the package, once, in half precision."""
    from safetensors.torch import save_file

    parts = {"clip": clip, "projector": projector, "llama": llama}
    state = {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}
    (target / "clip").mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in state.items()}, target / FILES[0])
    for file in FILES[1:]:
        shutil.copy(source / file, target / file)
