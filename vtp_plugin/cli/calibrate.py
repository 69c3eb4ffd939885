"""Find the threshold with which V-PRUNE removes a given share of the patches of a folder of pictures."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.progress import track

from vtp_plugin.errors import PruningError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


class Method(str, Enum):
    """Strategies whose number of tokens follows from a threshold."""

    vprune = "vprune"


def command(
    method: Annotated[Method, typer.Argument(help="The strategy.")],
    images: Annotated[Path, typer.Argument(help="A picture, or a folder of pictures.")],
    target: Annotated[float, typer.Option(help="Share of the patches to remove, e.g. 0.22.")],
    pruning_args: Annotated[str, typer.Option(help="Other parameters, e.g. chi2_threshold=10,color_space=hsv.")] = "",
    size: Annotated[int, typer.Option(help="Side of the picture after resizing, in pixels.")] = 336,
    patch: Annotated[int, typer.Option(help="Side of a patch, in pixels.")] = 14,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the setting to this YAML.")] = None,
) -> None:
    from vtp_plugin.config import parse_pairs
    from vtp_plugin.metrics.calibration import calibrate, removed_share
    from vtp_plugin.surgery.pixels import patches

    if not 0 < target < 1:
        raise PruningError(f"--target must be a share between 0 and 1, got {target}")
    fields = parse_pairs(pruning_args)
    paths = _pictures(images)
    tiles = [patches(_loaded(path, size), patch) for path in track(paths, "reading", transient=True)]
    chosen = calibrate(method.value, "cosine_threshold", fields, tiles, size // patch, target)
    share = removed_share(chosen, tiles, size // patch)
    setting = yaml.safe_dump({"strategy": method.value, **chosen.config()}, sort_keys=False)
    comment = f"# removes {share:.1%} of the patches of {len(paths)} pictures (asked: {target:.1%})\n"
    if output is not None:
        output.write_text(comment + setting)
    Console(highlight=False).print(comment + setting, end="")


def _pictures(path: Path) -> list[Path]:
    if not path.exists():
        raise PruningError(f"not found: {path}")
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise PruningError(f"no pictures ({', '.join(sorted(SUFFIXES))}) in {path}")
    return found


def _loaded(path: Path, size: int) -> Any:
    """[1, 3, size, size] uint8, resized by the shorter side and cropped in the middle, as CLIP's processor does."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        picture = Image.open(path).convert("RGB")
    except (UnidentifiedImageError, OSError):
        raise PruningError(f"not a picture that can be read: {path}") from None
    fitted = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)[None]
